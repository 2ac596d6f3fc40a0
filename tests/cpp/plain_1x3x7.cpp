#include "generic_isa.h"
#include "plain_sets.h"
#include "table.inl.h"

namespace dynquant {

const Kernels* plain_1x3x7() {
  static constexpr Kernels table = table_of<GenericIsa<1, 3, 7>>("plain 1x3x7");
  return &table;
}

}  // namespace dynquant
