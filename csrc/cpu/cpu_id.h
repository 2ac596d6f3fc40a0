// What CPUID says, for features that not every compiler's __builtin_cpu_supports knows.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace dynquant {

// The registers of a leaf; zeros where the processor has no such leaf.
struct CpuId {
  unsigned a = 0, b = 0, c = 0, d = 0;
  CpuId(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

}  // namespace dynquant
#endif
