// What surrounds an op's kernels on CUDA: the device, the stream, memory, errors.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/stream.h"
#include "tensors.h"

namespace dynquant {

// One op's work on the device and the current stream of its first tensor. While it lives, that is
// the device of check_tensor and empty, and the current one of torch and of the CUDA runtime.
class CudaCall {
 public:
  CudaCall(const Tensor& first, const char* name);
  ~CudaCall();
  CudaCall(const CudaCall&) = delete;

  const Stream& stream() const { return *stream_; }

  // Throws what CUDA said of the launches so far.
  void check_launches() const;

  // An error where the stream is being captured: `op` has to look at a value on the host.
  void check_not_capturing(const char* op) const;

  // An int32 [1] of zero, which a kernel may set; `read` waits for the stream and gives its value.
  Tensor new_flag() const;
  int32_t read(const Tensor& flag) const;

 private:
  int32_t index_;
  int32_t outer_;  // that of the call around this one, or -1
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<Stream> stream_;
};

// Activations in 16 bits are computed on the CPU alone.
inline void check_cuda_bits(const char* name, int64_t bits) {
  check(bits == 8, name, " must be 8 for CUDA tensors (16 is there on the CPU), got ", bits);
}

// Memory of several kinds in one tensor: `take` all, then `allocate`, then ask for pointers.
class CudaMemory {
 public:
  // Gives where `count` elements of that size start.
  int64_t take(int64_t count, size_t size) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(size) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  void allocate() {
    memory_ = empty({bytes_}, ScalarType::Byte);
    base_ = static_cast<uint8_t*>(memory_.mutable_data_ptr());
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t bytes_ = 0;
  Tensor memory_;
  uint8_t* base_ = nullptr;
};

}  // namespace dynquant
