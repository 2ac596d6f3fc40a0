#include "entry.cuh"
#include "gemm.inl.h"

namespace dynquant {
template void Stream::launch<GemmKernel<SquareTile>>(const Grid&, int, const ProductArgs&) const;
}  // namespace dynquant
