// What holds for a thread while it works for an op, whatever the op does.
#pragma once

#include "../cpu/float_env.h"
#include "scratch.h"
#include "unit.h"

namespace dynquant {

// The arithmetic of the specification, a bound on the memory that the thread keeps afterwards, and
// no matrix unit left configured, even by an exception.
// One at the entry of each op (implement.h) and one in each task of another thread (parallel.h).
class OpScope {
 public:
  OpScope() { begin_scratch(); }
  ~OpScope() {
    release_unit();
    end_scratch();
  }
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;

 private:
  const FloatEnv env_;
};

}  // namespace dynquant
