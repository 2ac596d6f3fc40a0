// Launching kernels on a CUDA stream.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu.h"

namespace dynquant {

// Remembers the first error, after which it launches no more.
class Stream {
 public:
  // Of the current device.
  explicit Stream(cudaStream_t stream);

  // entry.cuh defines it; each kernel is instantiated in one .cu file.
  template <class Kernel>
  void launch(const Grid& grid, int shared_bytes, const typename Kernel::Args& args) const;

  int64_t processors() const { return processors_; }
  bool async_copies() const { return capability_ >= 80; }
  cudaStream_t stream() const { return stream_; }
  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  int processors_ = 1;
  int capability_ = 0;  // 75 is 7.5
  mutable cudaError_t error_;
};

}  // namespace dynquant
