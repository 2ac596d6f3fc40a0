// Freed memory that the C library keeps for the next call.
#pragma once

namespace dynquant {

// Makes glibc reuse the memory of tensors up to 32 MiB instead of giving it back at every call, as
// it does by itself once a program has freed a block of that size. Once a process.
//
// Until then each block larger than those freed before is mapped again, and what is free at the end
// of the heap is unmapped: thousands of page faults a call, a quarter of the time of a small
// encoder. A program that sets MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ or mallopt keeps
// its own settings, and other allocators are left as they are. DYNQUANT_KEEP_MEMORY=0 leaves glibc
// alone, too. See "Dynamic adjustment of the mmap threshold" in mallopt(3).
void keep_freed_memory();

}  // namespace dynquant
