// Whether the emulated AMX (amx_trap.h) can be believed: each mistake is refused, and operands are
// found wherever an instruction may name them.
#include "amx_trap_test.h"

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>

namespace dynquant {
namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  Config& tile(int number, int of_rows, int of_bytes) {
    rows[number] = static_cast<uint8_t>(of_rows);
    row_bytes[number] = static_cast<uint16_t>(of_bytes);
    return *this;
  }
};

// The tiles of C[m, n] += A[m, 4 * k] * B[k, n] are 1, 2 and 3.
Config product(int m, int n, int k) {
  return Config().tile(1, m, 4 * n).tile(2, m, 4 * k).tile(3, k, 4 * n);
}

void configure(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
void release() { asm volatile("tilerelease" : : : "memory"); }
void zero() { asm volatile("tilezero %%tmm1" : : : "memory"); }
void multiply() { asm volatile("tdpbusd %%tmm3, %%tmm2, %%tmm1" : : : "memory"); }
void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(from), "r"(stride) : "memory");
}

struct Mistake {
  const char* message;
  void (*make)();
};

void configure_with_1_at(int byte) {
  Config config = product(1, 1, 1);
  reinterpret_cast<uint8_t*>(&config)[byte] = 1;
  configure(config);
}

constexpr Mistake kMistakes[] = {
    {"no tiles are configured", [] { zero(); }},
    {"no tiles are configured", [] { release(); }},
    {"no tiles are configured", [] { configure(product(1, 1, 1)), release(), multiply(); }},
    {"this tile is not configured", [] { configure(Config().tile(2, 1, 4)), zero(); }},
    {"the palette is not 1",
     [] {
       Config config = product(1, 1, 1);
       config.palette = 0;
       configure(config);
     }},
    {"a restart in the middle", [] { configure_with_1_at(1); }},
    {"a reserved byte is not 0", [] { configure_with_1_at(2); }},
    {"a reserved byte is not 0", [] { configure_with_1_at(32); }},
    {"a reserved byte is not 0", [] { configure_with_1_at(63); }},
    {"more than 16 rows", [] { configure(product(17, 1, 1)); }},
    {"more than 64 bytes", [] { configure(product(1, 17, 1)); }},
    {"with rows and no bytes", [] { configure(Config().tile(1, 3, 0)); }},
    {"no multiple of four", [] { configure(Config().tile(1, 3, 6)), zero(); }},
    {"not the same rows", [] { configure(product(2, 3, 4).tile(2, 3, 16)), multiply(); }},
    {"not the same columns", [] { configure(product(2, 3, 4).tile(1, 2, 16)), multiply(); }},
    {"the depths of the operands differ",
     [] { configure(product(2, 3, 4).tile(2, 2, 12)), multiply(); }},
    {"given twice",
     [] {
       configure(product(4, 4, 4));
       asm volatile(".byte 0xC4, 0xE2, 0x61, 0x5E, 0xC9" : : : "memory");  // tmm3, tmm1, tmm1
     }},
    {"none of AMX's", [] { asm volatile("ud2"); }},
    {"undefined",  // signed by signed
     [] {
       configure(product(1, 1, 1));
       asm volatile("tdpbssd %%tmm3, %%tmm2, %%tmm1" : : : "memory");
     }},
};

// How a child ends that does this, and what it says.
template <class F>
std::string ends_with(const F& f, int* status) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    f();
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string text;
  char buffer[256];
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof buffer)) > 0;) {
    text.append(buffer, static_cast<size_t>(n));
  }
  close(pipe_ends[0]);
  waitpid(child, status, 0);
  return text;
}

int unrefused_mistakes() {
  int count = 0;
  for (const Mistake& mistake : kMistakes) {
    int status = 0;
    const std::string text = ends_with(mistake.make, &status);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT &&
        text.find(mistake.message) != std::string::npos) {
      continue;
    }
    ++count;
    std::printf("amx_trap: not refused as \"%s\": %s\n", mistake.message, text.c_str());
  }
  return count;
}

constexpr int kM = 5, kN = 3, kK = 7, kStride = 80;

struct Operands {
  uint8_t a[kM][kStride];
  int8_t b[kK][kStride];
  int32_t c[kM][kStride / 4];

  Operands() {
    uint32_t drawn = 1;
    const auto fill = [&](auto& rows) {
      for (auto& row : rows) {
        for (auto& value : row) {
          drawn = drawn * 1664525 + 1013904223;
          value = static_cast<std::remove_reference_t<decltype(value)>>(drawn >> 8);
        }
      }
    };
    fill(a), fill(b), fill(c);
  }
  Operands product() const {
    Operands result = *this;
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int k = 0; k < 4 * kK; ++k) result.c[m][n] += a[m][k] * b[k / 4][4 * n + k % 4];
      }
    }
    return result;
  }
  bool operator==(const Operands& other) const {
    return std::memcmp(this, &other, sizeof other) == 0;
  }
};

// Loads from all over the registers, with each kind of displacement and scale.
bool product_is_right() {
  const Config config = product(kM, kN, kK);
  Operands found;
  const Operands wanted = found.product();
  const auto address = [](const void* at) { return reinterpret_cast<uint64_t>(at); };
  register const uint64_t a asm("r13") = address(found.a);
  register const uint64_t b asm("r12") = address(found.b) + 1000;
  register const uint64_t c asm("rbx") = address(found.c) - 100;
  register const uint64_t stride asm("r15") = kStride, half asm("r9") = kStride / 2;
  register const uint64_t at asm("r8") = address(&config) - 4 * kStride - 16;
  asm volatile(
      "ldtilecfg 16(%[at],%[stride],4)\n\t"
      "tileloadd (%[a],%[stride],1), %%tmm2\n\t"
      "tileloaddt1 -1000(%[b],%[half],2), %%tmm3\n\t"
      "tileloadd 100(%[c],%[stride]), %%tmm1\n\t"
      "tdpbusd %%tmm3, %%tmm2, %%tmm1\n\t"
      "tilestored %%tmm1, 100(%[c],%[stride])\n\t"
      "tilerelease"
      :
      : [a] "r"(a), [b] "r"(b), [c] "r"(c), [at] "r"(at), [stride] "r"(stride), [half] "r"(half),
        "m"(config)
      : "memory");
  return found == wanted;
}

alignas(64) const Config fixed = product(1, 1, 1);

// Relative to the instruction; and without an index, whose stride is 0.
bool fixed_addresses_are_right() {
  const uint8_t from[4] = {1, 2, 3, 4};
  uint8_t to[4] = {};
  asm volatile(
      "ldtilecfg %[config]\n\t"
      "tileloadd (%[from]), %%tmm2\n\t"
      "tilestored %%tmm2, (%[to])\n\t"
      "tilerelease"
      :
      : [config] "m"(fixed), [from] "r"(from), [to] "r"(to)
      : "memory");
  return std::memcmp(from, to, sizeof to) == 0;
}

// What lies behind the last row's last byte may be missing, and nothing less.
bool only_the_rows_are_read() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  char* end = static_cast<char*>(memory) + page;
  if (mprotect(end, page, PROT_NONE) != 0) return false;
  const auto load_rows_up_to = [](const char* to) {
    configure(product(3, 1, 7));
    load(to - 2 * 40 - 28, 40);
    release();
  };
  load_rows_up_to(end);
  int status = 0;
  ends_with([&] { load_rows_up_to(end + 1); }, &status);
  munmap(memory, 2 * page);
  return status != 0;
}

}  // namespace

int amx_trap_failures() {
  int failures = unrefused_mistakes();
  const auto count = [&](bool holds, const char* what) {
    if (holds) return;
    ++failures;
    std::printf("amx_trap: %s\n", what);
  };
  count(product_is_right(), "a product from all kinds of addresses is wrong");
  count(fixed_addresses_are_right(), "a tile is not what lies at an address");
  count(only_the_rows_are_read(), "more or less is read than the rows of a tile");
  return failures;
}

}  // namespace dynquant
#else
namespace dynquant {
int amx_trap_failures() { return 0; }
}  // namespace dynquant
#endif
