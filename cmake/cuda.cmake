# The CUDA kernels as the object library dynquant_cuda_kernels, which knows nothing of torch. Sets
# DYNQUANT_CUDA_FOUND.
set(DYNQUANT_CUDA_FOUND OFF)
if(NOT DYNQUANT_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "DYNQUANT_CUDA is ${DYNQUANT_CUDA}; allowed: auto, on, off")
endif()
if(DYNQUANT_CUDA STREQUAL "off")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(DYNQUANT_CUDA STREQUAL "on")
    message(FATAL_ERROR "DYNQUANT_CUDA is on, but nvcc was not found (set CUDACXX to its path)")
  endif()
  return()
endif()
# Machine code of Turing, Ampere, Ada and Hopper; PTX of 80, which newer processors compile.
set(CMAKE_CUDA_ARCHITECTURES "75-real;80;89-real;90-real")
enable_language(CUDA)
set(DYNQUANT_CUDA_FOUND ON)

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")

# Every rounding is part of the specification. constexpr functions are the device's as well. The PTX
# stays readable, for the tests. CI makes ptxas's warnings errors, by CUDAFLAGS: no register spills.
set(DYNQUANT_CUDA_FLAGS
    --expt-relaxed-constexpr -fmad=false -ftz=false -prec-div=true -no-compress
    -Xptxas=--warn-on-spills -Xcompiler=-Wall)

add_library(dynquant_cuda_kernels OBJECT
  csrc/cuda/gemm_large.cu
  csrc/cuda/gemm_least.cu
  csrc/cuda/gemm_low.cu
  csrc/cuda/gemm_square.cu
  csrc/cuda/gemm_wide.cu
  csrc/cuda/gemv.cu
  csrc/cuda/quantize_bf16.cu
  csrc/cuda/quantize_f16.cu
  csrc/cuda/quantize_f32.cu
  csrc/cuda/stream.cpp
  csrc/cuda/weight.cu)
target_compile_options(dynquant_cuda_kernels PRIVATE
                       "$<$<COMPILE_LANGUAGE:CUDA>:${DYNQUANT_CUDA_FLAGS}>")
target_include_directories(dynquant_cuda_kernels SYSTEM PRIVATE
                           ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
