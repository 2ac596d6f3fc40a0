// One factory for each instruction set's file.
#pragma once

#include "kernels.h"

namespace dynquant {

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_ymm_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amx_kernels();

// Null where the machine can run the set, else what it lacks.
const char* avx512vnni_missing();
const char* amx_missing();

// What a matrix unit adds to a set of vectors.
struct TileKernels {
  Product product;
  double start;        // what it takes to set the unit up, in nanoseconds
  Costs vector_costs;  // of the vectors' own product, on processors that have the unit
  int64_t (*peak)(int64_t steps);
};
const TileKernels* amx_tile_kernels();
constexpr double kAlways = -1e300;  // a start that makes the unit seem the fastest for any product

// Whether a first product of those is right; the unit must be there.
bool amx_product_is_right();

// Of the tests: the same algorithm over tiles in plain C++, and the same machine code where a
// signal handler emulates its instructions.
const TileKernels* amx_emulated_tile_kernels();
const Kernels* amx_trapped_kernels();
const char* amx_trapped_missing();

inline Kernels with_tiles(const char* name, const Kernels& vectors, const TileKernels& tiles) {
  Kernels t = vectors;
  t.name = name;
  t.product.costs = tiles.vector_costs;
  t.unit_product = &tiles.product;
  t.unit_start = tiles.start;
  t.peak = tiles.peak;
  return t;
}

}  // namespace dynquant
