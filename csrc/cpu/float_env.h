// The arithmetic of the specification: round to nearest even, subnormals kept, exceptions masked,
// whatever the caller has set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <fenv.h>
#endif

namespace dynquant {

class FloatEnv {
 public:
#if defined(__x86_64__)
  FloatEnv() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatEnv() { _mm_setcsr(saved_); }
#else
  FloatEnv() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~FloatEnv() { fesetenv(&saved_); }
#endif
  FloatEnv(const FloatEnv&) = delete;
  FloatEnv& operator=(const FloatEnv&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#else
  fenv_t saved_;
#endif
};

}  // namespace dynquant
