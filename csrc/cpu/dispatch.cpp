// The one list of instruction sets, best first.
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "cpu_id.h"
#include "sets.h"

namespace dynquant {

#if defined(__x86_64__)
const char* avx512vnni_missing() {
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return "the processor or the operating system has no AVX-512 (F, BW, VL, DQ)";
  }
  return __builtin_cpu_supports("avx512vnni") ? nullptr : "the processor has no AVX512-VNNI";
}
#endif

namespace {

const char* nothing_missing() { return nullptr; }

#if defined(__x86_64__)
#if defined(DYNQUANT_AMX_EMULATED)
const Kernels* amx_emulated_kernels() {
  static const Kernels table =
      with_tiles("amx_emulated", *avx512vnni_kernels(), *amx_emulated_tile_kernels());
  return &table;
}
#endif

const char* avx2_missing() {
  constexpr unsigned kF16c = 1u << 29;
  const bool is_there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return is_there && (CpuId(1, 0).c & kF16c) != 0
             ? nullptr
             : "the processor or the operating system has no AVX2 with FMA and F16C";
}

const char* avxvnni_missing() {
  constexpr unsigned kAvxVnni = 1u << 4;
  if (avx2_missing() != nullptr) return avx2_missing();
  return (CpuId(7, 1).a & kAvxVnni) != 0 ? nullptr : "the processor has no AVX-VNNI";
}
#endif

constexpr IsaEntry kEntries[] = {
#if defined(__x86_64__)
    {&amx_kernels, &amx_missing},
#if defined(DYNQUANT_AMX_EMULATED)
    {&amx_emulated_kernels, &avx512vnni_missing},
    {&amx_trapped_kernels, &amx_trapped_missing},
#endif
    {&avx512vnni_kernels, &avx512vnni_missing},
    {&avxvnni_kernels, &avxvnni_missing},
    {&avx512vnni_ymm_kernels, &avx512vnni_missing},
    {&avx2_kernels, &avx2_missing},
#endif
    {&scalar_kernels, &nothing_missing},
};

const Kernels* initial_kernels() {
  const char* forced = getenv("DYNQUANT_ISA");
  if (forced != nullptr && forced[0] != '\0') return find_kernels(forced);
  for (const IsaEntry& entry : kEntries) {
    if (entry.missing() == nullptr) return entry.kernels();
  }
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{initial_kernels()};
  return kernels;
}

}  // namespace

const IsaEntry* isa_entries(int* count) {
  *count = static_cast<int>(sizeof kEntries / sizeof kEntries[0]);
  return kEntries;
}

const Kernels* find_kernels(const char* name) {
  for (const IsaEntry& entry : kEntries) {
    if (strcmp(entry.kernels()->name, name) == 0) {
      return entry.missing() == nullptr ? entry.kernels() : nullptr;
    }
  }
  return nullptr;
}

// Some tables are made when they are first asked for: whoever sees one sees what it holds.
const Kernels* current_kernels() { return current().load(std::memory_order_acquire); }

bool set_kernels(const char* name) {
  const Kernels* kernels = find_kernels(name);
  if (kernels == nullptr) return false;
  current().store(kernels, std::memory_order_release);
  return true;
}

}  // namespace dynquant
