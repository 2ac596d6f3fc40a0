// The matrix unit that the products of an op leave configured in their thread, for the next ones.
#pragma once

#include "../cpu/kernels.h"

namespace dynquant {

inline UnitState& unit_of_thread() {
  static thread_local UnitState state = {};
  return state;
}

// Before anything but this library's own work goes on in the thread: other libraries configure the
// unit for themselves, and the system saves with each switch of threads what is configured.
inline void release_unit() {
  UnitState& unit = unit_of_thread();
  if (unit.release == nullptr) return;
  unit.release();
  unit = {};
}

}  // namespace dynquant
