#include "entry.cuh"
#include "gemm.inl.h"

namespace dynquant {
template void Stream::launch<GemmKernel<LowTile>>(const Grid&, int, const ProductArgs&) const;
}  // namespace dynquant
