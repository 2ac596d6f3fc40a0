#include "entry.cuh"
#include "gemv.inl.h"

namespace dynquant {
template void Stream::launch<GemvKernel<1>>(const Grid&, int, const ProductArgs&) const;
template void Stream::launch<GemvKernel<2>>(const Grid&, int, const ProductArgs&) const;
template void Stream::launch<GemvKernel<3>>(const Grid&, int, const ProductArgs&) const;
template void Stream::launch<GemvKernel<4>>(const Grid&, int, const ProductArgs&) const;
template void Stream::launch<SumKernel>(const Grid&, int, const SumArgs&) const;
}  // namespace dynquant
