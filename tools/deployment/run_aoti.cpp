// Run a package of export_aoti.py from C++, without Python.
//
//   run_aoti PACKAGE.pt2 LIBVRWKV_OPS_CPU.SO BATCH CHANNELS HEIGHT WIDTH
//
// It prints the shape and the first values of each output for images of ones, to compare with
// PyTorch. Build it with g++ and a Python that has torch (docs/deployment.md has the line).
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 7) {
    std::fprintf(stderr, "usage: %s PACKAGE LIBRARY BATCH CHANNELS HEIGHT WIDTH\n", argv[0]);
    return 2;
  }
  // The library registers the operators of vrwkv_ops when it is loaded.
  if (!dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "Error: cannot load the library: %s\n", dlerror());
    return 1;
  }
  std::vector<int64_t> shape;
  for (int i = 3; i < argc; ++i) {
    shape.push_back(std::atoll(argv[i]));
  }
  try {
    const c10::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader package(argv[1]);
    for (const at::Tensor& output : package.run({at::ones(shape)})) {
      std::printf("shape");
      for (const int64_t side : output.sizes()) {
        std::printf(" %lld", static_cast<long long>(side));
      }
      const at::Tensor values = output.contiguous().flatten();
      std::printf("\nvalues");
      for (int64_t i = 0; i < std::min<int64_t>(5, values.numel()); ++i) {
        std::printf(" %.6g", values[i].item<float>());
      }
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "Error: %s\n", error.what());
    return 1;
  }
  return 0;
}
