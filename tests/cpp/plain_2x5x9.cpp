#include "generic_isa.h"
#include "plain_sets.h"
#include "table.inl.h"

namespace dynquant {

const Kernels* plain_2x5x9() {
  static constexpr Kernels table = table_of<GenericIsa<2, 5, 9>>("plain 2x5x9");
  return &table;
}

}  // namespace dynquant
