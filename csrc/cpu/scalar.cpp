// Plain C++ for every processor. Eight lanes let the compiler use what vectors the baseline has.
#include "generic_isa.h"
#include "sets.h"
#include "table.inl.h"

namespace dynquant {

const Kernels* scalar_kernels() {
  static constexpr Kernels table = table_of<GenericIsa<8, 2, 7>>("scalar");
  return &table;
}

}  // namespace dynquant
