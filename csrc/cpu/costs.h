// What a product takes on one core, by its Costs; and by that, which of a set's products to use.
#pragma once

#include "kernels.h"
#include "layout.h"

namespace dynquant {

inline double multiply_nanoseconds(const Costs& costs, double rows, double panels, double k) {
  const double each = rows * costs.multiply_add;
  const double value = each > costs.weight_byte ? each : costs.weight_byte;
  return panels * (value * static_cast<double>(kPanelColumns) * k + rows * costs.panel_row);
}

inline double stage_nanoseconds(const Costs& costs, double rows, double k) {
  return rows * k * costs.quantized_value;
}

// M rows, staging included, by a weight [N, K].
inline double product_nanoseconds(int64_t m, int64_t n, int64_t k, const Costs& costs) {
  const double rows = static_cast<double>(m), depth = static_cast<double>(k);
  return stage_nanoseconds(costs, rows, depth) +
         multiply_nanoseconds(costs, rows, static_cast<double>(panels_of(n)), depth);
}

// By weight_byte even where a weight outgrows the L2 cache: both products then wait for it.
inline const Product& product_for(const Kernels& kernels, int64_t m, int64_t n, int64_t k) {
  const Product& first = kernels.product;
  if (kernels.unit_product == nullptr) return first;
  const Product& unit = *kernels.unit_product;
  const double with_unit = kernels.unit_start + product_nanoseconds(m, n, k, unit.costs);
  return with_unit < product_nanoseconds(m, n, k, first.costs) ? unit : first;
}

}  // namespace dynquant
