// The CUDA implementations of torch.ops.dynquant, and what Python asks of this library.
#include <cuda_runtime_api.h>

#include "implement.h"

STABLE_TORCH_LIBRARY_IMPL(dynquant, CUDA, m) {
  dynquant::Implementations ops(m);
  dynquant::implement(ops);
}

extern "C" {

// Null where there is a device that the CUDA runtime can use, otherwise its reason.
__attribute__((visibility("default"))) const char* dynquant_cuda_unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? nullptr : "there is no device";
}

// The CUDA version that it was built with, 13000 for 13.0.
__attribute__((visibility("default"))) int dynquant_cuda_version() { return CUDART_VERSION; }
}
