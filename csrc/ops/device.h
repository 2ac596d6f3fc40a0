// The device that this library's ops work on. libdynquant has the CPU's (device.cpp),
// libdynquant_cuda that of the call under way (cuda_call.cpp).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace dynquant {

struct Device {
  int32_t type;
  int32_t index;
};
Device current_device();

// Prepares the allocator there, before it makes the first tensor of some size.
void prepare_allocator();

// Prepares the memory of a new tensor of many elements there, before it is written to.
void prepare_large(void* data, int64_t bytes);

// An error that names the argument where it lies elsewhere.
void check_device(const torch::stable::Tensor& t, const char* name);

}  // namespace dynquant
