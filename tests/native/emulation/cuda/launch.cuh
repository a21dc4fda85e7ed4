// The operators on the host: registered for CPU tensors, run by the emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define ADAKERNELS_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(adakernels_cuda, CPU, m)

namespace adakernels {

class Stream {
 public:
  explicit Stream(const torch::stable::Tensor&) {}

  // So few that small tests have enough for all of them, unless they ask for more.
  int multiprocessors() const {
    const char* count = std::getenv("ADAKERNELS_EMULATED_MULTIPROCESSORS");
    return count == nullptr ? 1 : std::atoi(count);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
              const Arguments&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "adakernels: a grid of ", blocks, " blocks is too large");
    emulation::run_grid({unsigned(blocks)}, {unsigned(threads)}, size_t(shared_bytes),
                        [&] { kernel(Parameters(arguments)...); });
  }
};

}  // namespace adakernels
