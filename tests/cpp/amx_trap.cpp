// The set `amx_trapped`: that of AMX, whose instructions a signal handler emulates (amx_trap.h).
#include "amx_trap.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "cpu_id.h"
#include "sets.h"

namespace dynquant {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows, row_bytes;
  uint8_t bytes[kRows][kRowBytes];
};
thread_local Tile tiles[kTiles];

// An instruction, from its VEX prefix on: what it is called and where it stands, for messages.
struct Instruction {
  const char* name;
  const uint8_t* at;

  [[noreturn]] void refuse(const char* why) const {
    char text[256];
    const int length =
        snprintf(text, sizeof text, "amx_trap: %s at %p (%02x %02x %02x %02x %02x): %s\n", name,
                 static_cast<const void*>(at), at[0], at[1], at[2], at[3], at[4], why);
    if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) _exit(1);
    abort();
  }
  void require(bool holds, const char* otherwise) const {
    if (!holds) refuse(otherwise);
  }

  Tile& tile(int number) const {
    require(amx_trap_holds_tiles, "no tiles are configured");
    require(number < kTiles, "there are eight tiles");
    require(tiles[number].rows > 0, "this tile is not configured");
    require(tiles[number].row_bytes % 4 == 0, "a row of this tile is no multiple of four bytes");
    return tiles[number];
  }
};

// The fields of a VEX prefix of three bytes and of the ModRM byte after the opcode.
struct Fields {
  explicit Fields(const uint8_t* at)
      : r((~at[1] >> 4) & 8),
        x((~at[1] >> 3) & 8),
        b((~at[1] >> 2) & 8),
        map(at[1] & 31),
        w(at[2] >> 7),
        v((~at[2] >> 3) & 15),
        l(at[2] >> 2 & 1),
        pp(at[2] & 3),
        opcode(at[3]),
        mod(at[4] >> 6),
        reg(at[4] >> 3 & 7),
        rm(at[4] & 7) {}
  int r, x, b, map, w, v, l, pp, opcode, mod, reg, rm;
};
constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;  // Fields::pp
constexpr int kHasSib = 4, kRegisterOperand = 3;     // Fields::rm, Fields::mod

// An operand in memory: base and displacement, and the scaled index, which is the stride of tiles.
struct Address {
  uint64_t start, index;
  const uint8_t* end;  // of the instruction

  Address(const Fields& f, const uint8_t* at, const greg_t (&registers)[NGREG])
      : start(0), index(0), end(at + 5) {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
    const auto value = [&](int number) { return static_cast<uint64_t>(registers[kOrder[number]]); };
    bool wide = f.mod == 2, relative = false;
    if (f.rm == kHasSib) {
      const int sib = *end++, scale = sib >> 6, number = (sib >> 3 & 7) | f.x, base = sib & 7;
      if (number != 4) index = value(number) << scale;
      if (base == 5 && f.mod == 0) {
        wide = true;
      } else {
        start = value(base | f.b);
      }
    } else if (f.rm == 5 && f.mod == 0) {
      wide = relative = true;
    } else {
      start = value(f.rm | f.b);
    }
    if (wide) {
      int32_t displacement;
      memcpy(&displacement, end, sizeof displacement);
      start += static_cast<uint64_t>(int64_t{displacement});
      end += sizeof displacement;
    } else if (f.mod == 1) {
      start += static_cast<uint64_t>(int64_t{static_cast<int8_t>(*end++)});
    }
    if (relative) start += reinterpret_cast<uint64_t>(end);
  }

  uint8_t* row(int r) const {
    return reinterpret_cast<uint8_t*>(start + static_cast<uint64_t>(r) * index);
  }
};

void configure(const Instruction& now, const void* from) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config;
  static_assert(sizeof config == 64);
  memcpy(&config, from, sizeof config);
  now.require(config.palette == 1, "the palette is not 1");
  now.require(config.start_row == 0, "a restart in the middle of a tile");
  for (uint8_t byte : config.reserved) now.require(byte == 0, "a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    if (t >= kTiles) {
      now.require(rows == 0 && row_bytes == 0, "a reserved byte is not 0");
      continue;
    }
    now.require(rows <= kRows, "a tile of more than 16 rows");
    now.require(row_bytes <= kRowBytes, "a tile of more than 64 bytes a row");
    now.require((rows == 0) == (row_bytes == 0), "a tile with rows and no bytes, or the other way");
    tiles[t] = {};
    tiles[t].rows = rows;
    tiles[t].row_bytes = row_bytes;
  }
  amx_trap_holds_tiles = true;
}

void release() {
  memset(tiles, 0, sizeof tiles);
  amx_trap_holds_tiles = false;
}

// Only the bytes of the tile's rows are touched: what the processor must not read faults here too.
void load(Tile& tile, const Address& from) {
  Tile loaded = {};
  for (int r = 0; r < tile.rows; ++r) {
    memcpy(loaded.bytes[r], from.row(r), static_cast<size_t>(tile.row_bytes));
  }
  memcpy(tile.bytes, loaded.bytes, sizeof tile.bytes);
}

void store(const Tile& tile, const Address& to) {
  for (int r = 0; r < tile.rows; ++r) {
    memcpy(to.row(r), tile.bytes[r], static_cast<size_t>(tile.row_bytes));
  }
}

// Unsigned bytes of `a` times signed ones of `b`, added to `c` without saturation.
void multiply(const Instruction& now, int c, int a, int b) {
  now.require(c != a && a != b && c != b, "an operand is given twice");
  Tile& sums = now.tile(c);
  const Tile &left = now.tile(a), &right = now.tile(b);
  now.require(sums.rows == left.rows, "sums and left operand have not the same rows");
  now.require(left.row_bytes == 4 * right.rows, "the depths of the operands differ");
  now.require(sums.row_bytes == right.row_bytes,
              "sums and right operand have not the same columns");
  const int columns = sums.row_bytes / 4, depth = left.row_bytes;
  int16_t weights[kRowBytes][kRows] = {};  // [k, n]
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < columns; ++n) {
      weights[k][n] = static_cast<int8_t>(right.bytes[k / 4][4 * n + k % 4]);
    }
  }
  for (int m = 0; m < sums.rows; ++m) {
    uint32_t row[kRows];
    memcpy(row, sums.bytes[m], sizeof row);
    for (int k = 0; k < depth; ++k) {
      const int16_t value = left.bytes[m][k];
      for (int n = 0; n < kRows; ++n) row[n] += static_cast<uint32_t>(value * weights[k][n]);
    }
    memcpy(sums.bytes[m], row, sizeof row);
  }
}

// Emulates the instruction at `at` and returns where the next one begins.
const uint8_t* emulate(const uint8_t* at, const greg_t (&registers)[NGREG]) {
  Instruction now = {"an instruction that is none of AMX's", at};
  now.require(at[0] == 0xC4, "undefined");
  const Fields f(at);
  now.require(f.map == 2 && f.w == 0 && f.l == 0, "undefined");
  const bool memory = f.mod != kRegisterOperand, no_third = f.v == 0;
  const int tile = f.reg | f.r;
  const uint8_t* const end = at + 5;
  if (f.opcode == 0x49 && f.pp == kNone && memory) {
    now.name = "LDTILECFG";
    now.require(no_third && f.reg == 0, "undefined");
    const Address operand(f, at, registers);
    configure(now, reinterpret_cast<const void*>(operand.start + operand.index));
    ++amx_trap_counts.ldtilecfg;
    return operand.end;
  }
  if (f.opcode == 0x49 && f.pp == kNone) {
    now.name = "TILERELEASE";
    now.require(no_third && f.reg == 0 && f.rm == 0, "undefined");
    now.require(amx_trap_holds_tiles, "no tiles are configured");  // allowed, and never meant
    release();
    ++amx_trap_counts.tilerelease;
    return end;
  }
  if (f.opcode == 0x49 && f.pp == kF2 && !memory) {
    now.name = "TILEZERO";
    now.require(no_third && f.rm == 0, "undefined");
    memset(now.tile(tile).bytes, 0, sizeof tiles[0].bytes);
    ++amx_trap_counts.tilezero;
    return end;
  }
  if (f.opcode == 0x4B && f.pp != kNone && memory) {
    now.name = f.pp == kF3 ? "TILESTORED" : f.pp == kF2 ? "TILELOADD" : "TILELOADDT1";
    now.require(no_third && f.rm == kHasSib, "undefined");
    Tile& operand = now.tile(tile);
    const Address address(f, at, registers);
    f.pp == kF3 ? store(operand, address) : load(operand, address);
    ++(f.pp == kF3 ? amx_trap_counts.tilestored : amx_trap_counts.tileload);
    return address.end;
  }
  if (f.opcode == 0x5E && f.pp == k66 && !memory) {
    now.name = "TDPBUSD";
    multiply(now, tile, f.rm | f.b, f.v);
    ++amx_trap_counts.tdpbusd;
    return end;
  }
  now.refuse("undefined");
}

void on_undefined(int, siginfo_t*, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  greg_t& next = machine.gregs[REG_RIP];
  next = reinterpret_cast<greg_t>(emulate(reinterpret_cast<const uint8_t*>(next), machine.gregs));
}

bool install() {
  struct sigaction action = {};
  action.sa_sigaction = &on_undefined;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) == 0;
}

}  // namespace

const Kernels* amx_trapped_kernels() {
  static const Kernels table =
      with_tiles("amx_trapped", *avx512vnni_kernels(), *amx_tile_kernels());
  return &table;
}

const char* amx_trapped_missing() {
  constexpr unsigned kAmxTile = 1u << 24;
  if (const char* reason = avx512vnni_missing()) return reason;
  if ((CpuId(7, 0).d & kAmxTile) != 0) return "the processor has AMX, so nothing would trap";
  if (amx_trap_holds_tiles) return "an op has left its tiles configured";
  // Whenever the set is asked for: Python's faulthandler may have taken the signal since.
  if (!install()) return "the system installs no signal handler";
  static const bool right = amx_product_is_right();
  return right ? nullptr : "the emulated AMX gives a wrong product";
}

}  // namespace dynquant
