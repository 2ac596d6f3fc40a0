// AMX where no processor has it: its instructions are undefined there, so they trap, and a signal
// handler does what Intel's manual says of them. That runs the machine code of csrc/cpu/amx.cpp
// itself, its operands and addresses included. Each thread has a unit of its own.
//
// What a processor would refuse, and what this project must not do with it (a palette other than 1,
// a restart in the middle of a tile), ends the process with a message.
#pragma once

#include <atomic>

namespace dynquant {

// How often each instruction was emulated in this process.
struct AmxTrapCounts {
  std::atomic<long> ldtilecfg, tilezero, tileload, tdpbusd, tilestored, tilerelease;
};
inline AmxTrapCounts amx_trap_counts;

// Whether the calling thread has configured tiles and not released them.
inline thread_local bool amx_trap_holds_tiles = false;

}  // namespace dynquant
