#include "cuda_call.h"

#include <dlfcn.h>

#include "device.h"

namespace dynquant {
namespace {

thread_local int32_t device_of_call = -1;

// torch's current stream. The functions that give it are newer than the stable ABI that this
// library is built for, or belong to libtorch_cuda, which it must load without.
cudaStream_t current_stream(int32_t device) {
  using NativeHandle = AOTITorchError (*)(StreamHandle, void**);
  static const NativeHandle native_handle =
      reinterpret_cast<NativeHandle>(dlsym(RTLD_DEFAULT, "torch_stream_native_handle"));
  void* stream = nullptr;
  if (native_handle != nullptr) {
    StreamHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const AOTITorchError error = native_handle(handle, &stream);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_delete_stream(handle));
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    return static_cast<cudaStream_t>(stream);
  }
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const CurrentStream current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<CurrentStream>(
                                    dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  check(current != nullptr, "this torch does not tell its current CUDA stream");
  STABLE_TORCH_ERROR_CODE_CHECK(current(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would otherwise be taken for the next launch's
  fail("CUDA: ", cudaGetErrorString(error));
}

}  // namespace

Device current_device() { return {aoti_torch_device_type_cuda(), device_of_call}; }

void prepare_allocator() {}

void prepare_large(void*, int64_t) {}

void check_device(const Tensor& t, const char* name) {
  check(t.is_cuda() && t.get_device_index() == device_of_call, name,
        " must be on cuda:", device_of_call, " like the other arguments");
}

CudaCall::CudaCall(const Tensor& first, const char* name) : outer_(device_of_call) {
  check(first.defined(), name, " must be a tensor, got None");
  check(first.is_cuda(), name, " must be on a CUDA device like the other arguments");
  index_ = first.get_device_index();
  guard_.emplace(index_);
  // The CUDA runtime within this library is not torch's.
  check_cuda(cudaSetDevice(index_));
  stream_.emplace(current_stream(index_));
  check_cuda(stream_->error());
  device_of_call = index_;
}

CudaCall::~CudaCall() { device_of_call = outer_; }

void CudaCall::check_launches() const { check_cuda(stream_->error()); }

void CudaCall::check_not_capturing(const char* op) const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream_->stream(), &status));
  check(status == cudaStreamCaptureStatusNone, op,
        " looks for values that it refuses, on the host, and cannot be captured in a CUDA graph");
}

Tensor CudaCall::new_flag() const {
  Tensor flag = empty({1}, ScalarType::Int);
  check_cuda(cudaMemsetAsync(flag.mutable_data_ptr(), 0, sizeof(int32_t), stream_->stream()));
  return flag;
}

int32_t CudaCall::read(const Tensor& flag) const {
  int32_t value = 0;
  check_cuda(cudaMemcpyAsync(&value, flag.const_data_ptr(), sizeof value, cudaMemcpyDeviceToHost,
                             stream_->stream()));
  check_cuda(cudaStreamSynchronize(stream_->stream()));
  return value;
}

}  // namespace dynquant
