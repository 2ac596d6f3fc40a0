#include "entry.cuh"
#include "weight.inl.h"

namespace dynquant {
template void Stream::launch<StageKernel>(const Grid&, int, const StageArgs&) const;
template void Stream::launch<PackKernel>(const Grid&, int, const PackArgs&) const;
template void Stream::launch<UnpackKernel>(const Grid&, int, const UnpackArgs&) const;
}  // namespace dynquant
