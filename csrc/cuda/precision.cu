#include "cuda/precision.cuh"

#include <atomic>

#include <torch/csrc/stable/library.h>

namespace adakernels {

namespace {

// torch's own setting is of the whole process too, but no part of its stable interface.
std::atomic<bool> exactly = true;

void multiply_exactly(bool exact) { exactly = exact; }

}  // namespace

bool multiplies_exactly() { return exactly; }

STABLE_TORCH_LIBRARY_FRAGMENT(adakernels_cuda, m) { m.def("multiply_exactly(bool exact) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(adakernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("multiply_exactly", TORCH_BOX(&multiply_exactly));
}

}  // namespace adakernels
