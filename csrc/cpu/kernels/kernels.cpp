#include "kernels.h"

#include "depthwise.h"
#include "direct.h"
#include "fuse.h"
#include "patch_gather.h"
#include "reconstruct.h"
#include "weight_gradient.h"
#include "winograd.h"

namespace adakernels::ADAKERNELS_ISA {

const Kernels kernels = {
    .pixel_block = kVectors * kLanes,
    .lanes = kLanes,
    .convolve_direct = convolve_direct,
    .convolve_winograd = convolve_winograd,
    .convolve_depthwise = convolve_depthwise,
    .depthwise_columns = depthwise_columns,
    .winograd_points_size = winograd_points_size,
    .winograd_point_stride = winograd_point_stride,
    .winograd_weights = winograd_weights,
    .gradient_points = gradient_points,
    .copy_gradient = copy_gradient,
    .add_weight_gradient = add_weight_gradient,
    .mix_planes = mix_planes,
    .dot_planes = dot_planes,
    .gather_patch = gather_patch,
    .differentiate_patch = differentiate_patch,
    .spread_patches = spread_patches,
    .reconstruct = reconstruct,
};

}  // namespace adakernels::ADAKERNELS_ISA
