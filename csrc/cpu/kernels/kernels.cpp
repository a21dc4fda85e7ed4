#include "kernels.h"

#include "depthwise.h"
#include "direct.h"
#include "fuse.h"
#include "weight_gradient.h"
#include "winograd.h"

namespace adakernels::ADAKERNELS_ISA {

const Kernels kernels = {kRows, kVectors * kLanes, kLanes, convolve_direct, convolve_winograd,
                         convolve_depthwise, winograd_weights, gradient_points, copy_gradient, add_weight_gradient,
                         mix_planes, dot_planes};

}  // namespace adakernels::ADAKERNELS_ISA
