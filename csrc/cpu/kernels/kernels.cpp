#include "kernels.h"

#include "direct.h"

namespace adakernels::ADAKERNELS_ISA {

const Kernels kernels = {kRows, kVectors * kLanes, convolve_direct};

}  // namespace adakernels::ADAKERNELS_ISA
