#include "emulated_tiles.h"
#include "generic_isa.h"
#include "plain_sets.h"
#include "table.inl.h"
#include "tiles.inl.h"

namespace dynquant {

const Kernels* plain_4x7x40() {
  static constexpr Kernels table = table_of<GenericIsa<4, 7, 40>>("plain 4x7x40");
  return &table;
}

const Product* plain_tiles() {
  static constexpr Product tiles =
      tile_product<GenericIsa<4, 7, 40>, EmulatedTiles>({0.1, 0.1, 1.0, 60.0});
  return &tiles;
}

}  // namespace dynquant
