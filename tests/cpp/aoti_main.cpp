// Runs a package of AOTInductor in a process without Python: libdynquant alone provides its ops.
// Arguments: libdynquant.so, the package, rows and columns of the input. Prints the output.
#include <ATen/ops/arange.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 3;
  }
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const int64_t rows = std::atoll(argv[3]), columns = std::atoll(argv[4]);
  const at::Tensor x = at::arange(rows * columns, at::kFloat).remainder(7).sub(3).div(4);
  const at::Tensor y = loader.run({x.view({rows, columns})})[0].contiguous();
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%a\n", y.const_data_ptr<float>()[i]);
}
