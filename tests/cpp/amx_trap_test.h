// The tests of the emulated AMX, for where the set `amx_trapped` runs.
#pragma once

namespace dynquant {

// Prints each failure, and returns how many there were.
int amx_trap_failures();

}  // namespace dynquant
