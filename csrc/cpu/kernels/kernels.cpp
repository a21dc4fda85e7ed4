#include "kernels.h"

#include "convolve.h"

namespace adakernels::ADAKERNELS_ISA {

const Kernels kernels = {kRows, kVectors * kLanes, convolve};

}  // namespace adakernels::ADAKERNELS_ISA
