// The set `amx_emulated`: all of amx but the tiles' instructions, for tests on machines without it.
#include "emulated_tiles.h"
#include "sets.h"
#include "tiles.inl.h"
#include "zmm.h"

namespace dynquant {

const TileKernels* amx_emulated_tile_kernels() {
  constexpr Costs kCosts = {0.1, 0.1, 1.0, 60.0}, kVectorCosts = {0.0043, 0.011, 0.13, 6.0};
  static constexpr TileKernels kernels = {tile_product<Zmm, EmulatedTiles>(kCosts), kAlways,
                                          kVectorCosts, &peak_tiles<EmulatedTiles>};
  return &kernels;
}

}  // namespace dynquant
