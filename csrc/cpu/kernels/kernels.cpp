#include "kernels.h"

#include "direct.h"
#include "winograd.h"

namespace adakernels::ADAKERNELS_ISA {

const Kernels kernels = {kRows, kVectors * kLanes, convolve_direct, convolve_winograd, winograd_weights};

}  // namespace adakernels::ADAKERNELS_ISA
