// Instantiates the quantization kernels of the dtype D, which the including file names.
#include "entry.cuh"
#include "quantize.inl.h"

namespace dynquant {
using Args = QuantizeRowsArgs;
template void Stream::launch<QuantizeRowsKernel<D, 32, false>>(const Grid&, int, const Args&) const;
template void Stream::launch<QuantizeRowsKernel<D, 128, false>>(const Grid&, int,
                                                                const Args&) const;
template void Stream::launch<QuantizeRowsKernel<D, 512, false>>(const Grid&, int,
                                                                const Args&) const;
template void Stream::launch<QuantizeRowsKernel<D, 1024, false>>(const Grid&, int,
                                                                 const Args&) const;
template void Stream::launch<QuantizeRowsKernel<D, 512, true>>(const Grid&, int, const Args&) const;
template void Stream::launch<QuantizeKnownKernel<D, false>>(const Grid&, int, const Args&) const;
template void Stream::launch<QuantizeKnownKernel<D, true>>(const Grid&, int, const Args&) const;
template void Stream::launch<RangeKernel<D>>(const Grid&, int, const RangeArgs&) const;
}  // namespace dynquant
