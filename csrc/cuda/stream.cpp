#include "stream.h"

namespace dynquant {

Stream::Stream(cudaStream_t stream) : stream_(stream) {
  int device = 0, major = 0, minor = 0;
  error_ = cudaGetDevice(&device);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error_ == cudaSuccess) error_ = cudaDeviceGetAttribute(value, attribute, device);
  };
  read(&processors_, cudaDevAttrMultiProcessorCount);
  read(&major, cudaDevAttrComputeCapabilityMajor);
  read(&minor, cudaDevAttrComputeCapabilityMinor);
  capability_ = 10 * major + minor;
}

}  // namespace dynquant
