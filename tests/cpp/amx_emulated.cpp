// The set `amx_emulated`: all of amx but the tiles' instructions, for tests on machines without it.
#include "emulated_tiles.h"
#include "sets.h"
#include "tiles.inl.h"
#include "zmm.h"

namespace dynquant {

const TileKernels* amx_emulated_tile_kernels() {
  static constexpr TileKernels kernels = {tile_product<Zmm, EmulatedTiles>({0.1, 0.1, 1.0, 60.0}),
                                          kAlways, &peak_tiles<EmulatedTiles>};
  return &kernels;
}

}  // namespace dynquant
