// The functions that exist once per instruction set, and the table through which they are called.
#pragma once

#include "../domain.h"
#include "../patch.h"
#include "../reconstruct.h"

namespace adakernels {

// What a tile reads again for every group of rows: half of a second-level cache of 512 KiB. The weights stream through
// the other half.
constexpr int64_t kSourceBytes = 256 * 1024;

// Memory of one thread, kept between tasks so that no task allocates.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // At least `bytes` bytes at a 64-byte boundary; what the same arena held before is lost.
  void* reserve(int64_t bytes, int arena = 0);
  // Gives large arenas back: a call of unusual size is not paid for by all later ones.
  void trim();

 private:
  static constexpr int kArenas = 2;
  void* data_[kArenas] = {};
  int64_t capacity_[kArenas] = {};
};

struct Kernels {
  // The pixels that a register tile spans, and those of one vector.
  int pixel_block, lanes;
  // Computes and stores one tile of each of some units of one frame.
  void (*convolve_direct)(const Convolution&, const Unit*, int64_t unit_count, const Tile&, Scratch&);
  // The same for a tile that counts blocks of grid points and takes whole rows of them.
  void (*convolve_winograd)(const Convolution&, const Unit&, const Tile&, Scratch&);
  // The same for a depthwise convolution; tile rows count through all of the units, which may be of several frames.
  void (*convolve_depthwise)(const Convolution&, const Unit*, int64_t unit_count, const Tile&, Scratch&);
  // Fills the columns of such a convolution of channels-last planes. columns: [weight_row + 1, column_count]
  void (*depthwise_columns)(const Convolution&, float* columns, int64_t column_count);
  // Floats that the transformed source of a tile takes.
  int64_t (*winograd_points_size)(const Convolution&, const Unit&, const Tile&);
  // Distance of two points of a transformed kernel.
  int64_t (*winograd_point_stride)(int64_t channel_count);
  // The transformed kernels of one row of weights for all `channel_count` channels.
  void (*winograd_weights)(const Convolution&, int64_t row, int64_t channel_count, float* transformed,
                           int64_t point_stride);
  // Grid points of a frame as the two functions below number them.
  int64_t (*gradient_points)(const Convolution&);
  // Copies one row's gradient plane to `points`: [gradient_points + lanes].
  void (*copy_gradient)(const Convolution&, const Planes& gradient, int64_t frame, const Route& row, float* points);
  // Adds a unit's part to the weight gradient, for some of its live channels.
  // gradients: [rows][gradient_points + lanes]
  void (*add_weight_gradient)(const Convolution&, const Unit&, const float* gradients, int64_t live_begin,
                              int64_t live_end, float* grad_weight, Scratch&);
  // Plane of `frame` in target = here * source[frame] + other * source[other_frame]; zero factors read nothing.
  void (*mix_planes)(const Planes& target, int64_t frame, int64_t channel, const Planes& source, float here,
                     float other, int64_t other_frame);
  // The sum over a channel's plane of the products of two stacks' frames.
  double (*dot_planes)(const Planes& a, int64_t a_frame, const Planes& b, int64_t b_frame, int64_t channel);
  // The rows of a patch: bilinear samples, scaled and shifted. target: [row_count, count] of float32, or of the
  // patch's scalar type if that is bf16
  void (*gather_patch)(const PatchRows&, void* target, Scratch&);
  // Adds to `sums` the derivatives along y and x of the sum of the products of the rows' samples, scaled, and a
  // gradient of the target's form.
  void (*differentiate_patch)(const PatchRows&, const void* gradient, double* sums, Scratch&);
  // Rows of a frame's gradient from those of the patches that cover it.
  void (*spread_patches)(const FrameRows&, const PatchGradient*, int64_t patch_count, Scratch&);
  // Finishes some groups of frames, for some classes of channels.
  void (*reconstruct)(const Reconstruction&, int64_t frame_begin, int64_t frame_end, int64_t class_begin,
                      int64_t class_end, Scratch&);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace adakernels
