// Which instruction sets there are, which of them this machine runs, and which one is in use.
#pragma once

#include "kernels.h"

namespace dynquant {

struct IsaEntry {
  const Kernels* (*kernels)();
  const char* (*missing)();  // null where the machine can run it, else what it lacks
};

// The Python module shares these with the ops.
#pragma GCC visibility push(default)

// Best first. `count` receives the number of entries.
const IsaEntry* isa_entries(int* count);

// The entry of that name that this machine can run, or null.
const Kernels* find_kernels(const char* name);

// The kernels in use: those forced by set_kernels or by the environment variable DYNQUANT_ISA, else
// the best. Null where the variable names a set that cannot run here.
const Kernels* current_kernels();

// False, and nothing changes, where the name is unknown or cannot run here.
bool set_kernels(const char* name);

#pragma GCC visibility pop

}  // namespace dynquant
