// patch_gather for the CPU: finds the taps of every patch and hands its rows to the kernels.
#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "schedule.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Numbers of a strip, the unit of work: rows of one plane of one patch.
constexpr int64_t kStrip = 8 * 1024;
constexpr int64_t kStripsPerTask = 4;
// Of the gradient to a frame, whose rows cost little where no patch covers them.
constexpr int64_t kFrameStrip = 32 * 1024;

// Where a patch lies along one dimension: its samples are `fraction` behind the pixels from `first` on. In a frame
// with room for it to move the pixel behind every sample exists, at the last place with weight 1.
struct Place {
  int64_t first;
  float fraction;
  bool clamped;

  Place(float origin, int64_t room) {
    const float last = float(room);
    clamped = !(origin >= 0 && origin <= last);
    const float inside = origin >= 0 ? std::min(origin, last) : 0.f;
    first = std::min(int64_t(inside), std::max<int64_t>(room - 1, 0));
    fraction = inside - float(first);
  }

  // The same place such that a pixel of weight 0 is always the one behind.
  void settle() {
    if (fraction == 1) {
      ++first;
      fraction = 0;
    }
  }
};

// The arguments of a call, checked, since a caller past the public function may get anything wrong.
class Patches {
 public:
  Patches(const Tensor& origin,                      // [M, 2]
          const std::optional<Tensor>& frame_index,  // [M]
          const std::optional<Tensor>& mean,         // [C]
          const std::optional<Tensor>& std,          // [C]
          const std::vector<int64_t>& frames,        // N, C, H, W
          int64_t height, int64_t width, bool channels_last, float unit)
      : count(origin.size(0)), channels(frames[1]), height(height), width(width), frame_height(frames[2]),
        frame_width(frames[3]), channels_last(channels_last) {
    STD_TORCH_CHECK(origin.dim() == 2 && origin.size(1) == 2 && origin.scalar_type() == ScalarType::Float &&
                        origin.is_contiguous(),
                    "patch_gather: expected a contiguous float32 origin of shape [M, 2]");
    STD_TORCH_CHECK(frames[0] >= 0 && channels >= 0 && height >= 1 && width >= 1 && height <= frame_height &&
                        width <= frame_width,
                    "patch_gather: expected a size within the frame");
    origins_ = static_cast<const float*>(origin.const_data_ptr());
    if (!frame_index.has_value()) {
      STD_TORCH_CHECK(frames[0] == count, "patch_gather: expected an origin for each frame, or a frame_index");
    } else {
      STD_TORCH_CHECK(frame_index->dim() == 1 && frame_index->size(0) == count &&
                          frame_index->scalar_type() == ScalarType::Long && frame_index->is_contiguous(),
                      "patch_gather: expected a contiguous int64 frame_index of shape [M]");
      frames_ = static_cast<const int64_t*>(frame_index->const_data_ptr());
      for (int64_t m = 0; m < count; ++m)
        // The dispatcher hands this type on to Python as a ValueError.
        if (frames_[m] < 0 || frames_[m] >= frames[0])
          throw std::invalid_argument("patch_gather: expected frame_index values from 0 to N - 1 = " +
                                      std::to_string(frames[0] - 1) + ", got " + std::to_string(frames_[m]));
    }
    set_normalisation(mean, std, unit);
  }

  int64_t frame(int64_t patch) const { return frames_ == nullptr ? patch : frames_[patch]; }
  Place y(int64_t patch) const { return {origins_[2 * patch], frame_height - height}; }
  Place x(int64_t patch) const { return {origins_[2 * patch + 1], frame_width - width}; }

  // Planes are channels, or whole frames channels-last; a row of them is a run of numbers.
  int64_t planes() const { return channels_last ? 1 : channels; }
  int64_t right() const { return channels_last ? channels : 1; }
  int64_t row() const { return width * right(); }
  int64_t frame_row() const { return frame_width * right(); }
  Normalisation normalisation(int64_t plane) const {
    if (scale_.size() == 1) plane = 0;
    return {scale_.data() + plane, shift_.data() + plane, channels_last && scale_.size() > 1 ? 1 : 0};
  }

  const int64_t count, channels, height, width, frame_height, frame_width;
  const bool channels_last;

 private:
  void set_normalisation(const std::optional<Tensor>& mean, const std::optional<Tensor>& std, float unit) {
    scale_ = {1.f};
    shift_ = {0.f};
    if (!std.has_value() || channels == 0) return;
    for (const auto* constant : {&mean, &std})
      STD_TORCH_CHECK(!constant->has_value() ||
                          ((*constant)->dim() == 1 && (*constant)->size(0) == channels &&
                           (*constant)->scalar_type() == ScalarType::Float && (*constant)->is_contiguous()),
                      "patch_gather: expected contiguous float32 mean and std of shape [C]");
    const auto* deviation = static_cast<const float*>(std->const_data_ptr());
    const auto* middle = mean.has_value() ? static_cast<const float*>(mean->const_data_ptr()) : nullptr;
    // Channels-last once for every number of a row.
    const int64_t length = channels_last ? row() : channels;
    scale_.resize(size_t(length));
    shift_.resize(size_t(length));
    for (int64_t i = 0; i < length; ++i) {
      const int64_t c = i % channels;
      scale_[size_t(i)] = 1 / (unit * deviation[c]);
      shift_[size_t(i)] = middle == nullptr ? 0.f : -middle[c] / deviation[c];
    }
  }

  const float* origins_;
  const int64_t* frames_ = nullptr;
  std::vector<float> scale_, shift_;
};

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

Scalar scalar_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float      ? Scalar::f32
         : tensor.scalar_type() == ScalarType::BFloat16 ? Scalar::bf16
                                                        : Scalar::u8;
}

// Whether frames are channels-last; throws unless they are such that the kernels can read them.
bool check_frames(const Tensor& input) {  // [N, C, H, W]
  STD_TORCH_CHECK(input.dim() == 4, "patch_gather: expected an input of 4 dimensions");
  if (input.scalar_type() != ScalarType::Byte) check_features(input, "patch_gather: input");
  const bool channels_last = is_channels_last(input);
  STD_TORCH_CHECK(has_format(input, channels_last), "patch_gather: expected a contiguous or channels-last input");
  return channels_last;
}

float unit_of(const Tensor& input) { return input.scalar_type() == ScalarType::Byte ? 255.f : 1.f; }

const void* at(const void* data, int64_t offset, Scalar scalar) {
  constexpr int64_t sizes[] = {4, 2, 1};
  return static_cast<const char*>(data) + offset * sizes[int(scalar)];
}

// Some rows of one plane of one patch.
struct Strip {
  int64_t patch, plane, begin, end;
};

// Every patch cut into strips, the same whatever the number of threads.
class Strips {
 public:
  explicit Strips(const Patches& patches) : patches_(patches) {
    rows_ = std::clamp<int64_t>(kStrip / std::max<int64_t>(1, patches.row()), 1, patches.height);
    per_plane_ = ceil_div(patches.height, rows_);
    count = patches.count * patches.planes() * per_plane_;
  }

  Strip operator[](int64_t i) const {
    const int64_t plane = i / per_plane_, begin = i % per_plane_ * rows_;
    return {plane / patches_.planes(), plane % patches_.planes(), begin, std::min(begin + rows_, patches_.height)};
  }

  int64_t per_patch() const { return patches_.planes() * per_plane_; }

  int64_t count;

 private:
  const Patches& patches_;
  int64_t rows_, per_plane_;
};

// Calls run(i, strip, scratch) for every strip.
template <typename Run>
void for_strips(const Patches& patches, const Strips& strips, const Run& run) {
  const double work = 4. * double(patches.count * patches.planes()) * double(patches.height * patches.row());
  run_tasks(ceil_div(strips.count, kStripsPerTask), work, [&](int64_t task, Scratch& scratch) {
    for (int64_t i = task * kStripsPerTask; i < std::min((task + 1) * kStripsPerTask, strips.count); ++i)
      run(i, strips[i], scratch);
  });
}

// A strip in its frame, whose patch lies at (y, x).
PatchRows rows_of(const Patches& patches, const Strip& strip, const Place& y, const Place& x, const void* input,
                  Scalar scalar) {
  const int64_t plane = patches.frame(strip.patch) * patches.planes() + strip.plane;
  const int64_t first = ((plane * patches.frame_height + y.first + strip.begin) * patches.frame_width + x.first) *
                        patches.right();
  return {scalar,
          at(input, first, scalar),
          patches.frame_row(),
          strip.end - strip.begin,
          patches.row(),
          patches.frame_width > patches.width ? patches.right() : 0,
          patches.frame_height > patches.height ? patches.frame_row() : 0,
          y.fraction,
          x.fraction,
          patches.normalisation(strip.plane)};
}

// Offset of a strip in a tensor of patches.
int64_t offset_of(const Patches& patches, const Strip& strip) {
  return ((strip.patch * patches.planes() + strip.plane) * patches.height + strip.begin) * patches.row();
}

Tensor patch_gather(const Tensor& input,   // [N, C, H, W]
                    const Tensor& origin,  // [M, 2]
                    std::vector<int64_t> size,
                    const std::optional<Tensor>& frame_index,  // [M]
                    const std::optional<Tensor>& mean,         // [C]
                    const std::optional<Tensor>& std) {        // [C]
  const bool channels_last = check_frames(input);
  STD_TORCH_CHECK(size.size() == 2, "patch_gather: expected two sizes of a patch");
  const Patches patches(origin, frame_index, mean, std, sizes_of(input), size[0], size[1], channels_last,
                        unit_of(input));
  Tensor output = empty_like_format(input, {patches.count, patches.channels, size[0], size[1]},
                                    input.scalar_type() == ScalarType::Byte);
  if (output.numel() == 0) return output;
  const Kernels& kernels = best_kernels();
  const Scalar from = scalar_of(input), to = scalar_of(output);
  const void* source = input.const_data_ptr();
  void* target = output.mutable_data_ptr();
  for_strips(patches, Strips(patches), [&](int64_t, const Strip& strip, Scratch& scratch) {
    Place y = patches.y(strip.patch), x = patches.x(strip.patch);
    y.settle();
    x.settle();
    kernels.gather_patch(rows_of(patches, strip, y, x, source, from),
                         const_cast<void*>(at(target, offset_of(patches, strip), to)), scratch);
  });
  return output;
}

Tensor patch_gather_grad_origin(const Tensor& grad,                        // [M, C, P_h, P_w]
                                const Tensor& input,                       // [N, C, H, W]
                                const Tensor& origin,                      // [M, 2]
                                const std::optional<Tensor>& frame_index,  // [M]
                                const std::optional<Tensor>& std) {        // [C]
  const bool channels_last = check_frames(input);
  check_features(grad, "patch_gather: gradient");
  const Patches patches(origin, frame_index, std::nullopt, std, sizes_of(input), grad.size(2), grad.size(3),
                        channels_last, unit_of(input));
  const ScalarType output =
      input.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  STD_TORCH_CHECK(grad.size(0) == patches.count && grad.size(1) == patches.channels &&
                      has_format(grad, channels_last) && grad.scalar_type() == output,
                  "patch_gather: expected a gradient of the output's shape, dtype and memory format");
  Tensor grad_origin = torch::stable::new_zeros(origin, {patches.count, 2});
  if (grad.numel() == 0) return grad_origin;
  const Kernels& kernels = best_kernels();
  const Scalar from = scalar_of(input), scalar = scalar_of(grad);
  const void* source = input.const_data_ptr();
  const void* gradient = grad.const_data_ptr();
  const Strips strips(patches);
  std::vector<double> sums(size_t(2 * strips.count), 0.);
  for_strips(patches, strips, [&](int64_t i, const Strip& strip, Scratch& scratch) {
    kernels.differentiate_patch(
        rows_of(patches, strip, patches.y(strip.patch), patches.x(strip.patch), source, from),
        at(gradient, offset_of(patches, strip), scalar), sums.data() + 2 * i, scratch);
  });
  float* to = static_cast<float*>(grad_origin.mutable_data_ptr());
  for (int64_t m = 0; m < patches.count; ++m) {
    double y = 0, x = 0;
    for (int64_t i = m * strips.per_patch(); i < (m + 1) * strips.per_patch(); ++i) {
      y += sums[size_t(2 * i)];
      x += sums[size_t(2 * i + 1)];
    }
    to[2 * m] = patches.y(m).clamped || patches.height == patches.frame_height ? 0.f : float(y);
    to[2 * m + 1] = patches.x(m).clamped || patches.width == patches.frame_width ? 0.f : float(x);
  }
  return grad_origin;
}

Tensor patch_gather_grad_input(const Tensor& grad,                        // [M, C, P_h, P_w]
                               const Tensor& origin,                      // [M, 2]
                               const std::optional<Tensor>& frame_index,  // [M]
                               const std::optional<Tensor>& std,          // [C]
                               std::vector<int64_t> input_shape) {
  check_features(grad, "patch_gather: gradient");
  const bool channels_last = is_channels_last(grad);
  STD_TORCH_CHECK(has_format(grad, channels_last) && input_shape.size() == 4 && input_shape[1] == grad.size(1) && origin.size(0) == grad.size(0),
                  "patch_gather: expected a contiguous or channels-last gradient of the output's shape");
  const Patches patches(origin, frame_index, std::nullopt, std, input_shape, grad.size(2), grad.size(3), channels_last,
                        1.f);
  Tensor grad_input = empty_like_format(grad, input_shape);
  if (grad_input.numel() == 0) return grad_input;
  const Scalar scalar = scalar_of(grad);
  const int64_t frame_count = input_shape[0], planes = patches.planes();

  // The patches of each frame in their order: those of frame n are by_frame[starts[n]] to by_frame[starts[n + 1]].
  std::vector<int64_t> starts(size_t(frame_count + 1), 0), by_frame(size_t(patches.count));
  for (int64_t m = 0; m < patches.count; ++m) ++starts[size_t(patches.frame(m) + 1)];
  for (int64_t n = 0; n < frame_count; ++n) starts[size_t(n + 1)] += starts[size_t(n)];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t m = 0; m < patches.count; ++m) by_frame[size_t(next[size_t(patches.frame(m))]++)] = m;

  const Kernels& kernels = best_kernels();
  const void* gradient = grad.const_data_ptr();
  void* target = grad_input.mutable_data_ptr();
  const int64_t rows = std::clamp<int64_t>(kFrameStrip / patches.frame_row(), 1, patches.frame_height);
  const int64_t parts = ceil_div(patches.frame_height, rows);
  const double work = double(grad_input.numel()) + 4. * double(grad.numel());
  run_tasks(frame_count * planes * parts, work, [&](int64_t task, Scratch& scratch) {
    const int64_t plane = task / parts, n = plane / planes;
    const int64_t begin = task % parts * rows, end = std::min(begin + rows, patches.frame_height);
    std::vector<PatchGradient> covers;
    for (int64_t i = starts[size_t(n)]; i < starts[size_t(n + 1)]; ++i) {
      const int64_t m = by_frame[size_t(i)];
      Place y = patches.y(m), x = patches.x(m);
      y.settle();
      x.settle();
      if (y.first < end && y.first + patches.height >= begin)
        covers.push_back({at(gradient, offset_of(patches, {m, plane % planes, 0, 0}), scalar), y.first,
                          x.first * patches.right(), y.fraction, x.fraction});
    }
    const int64_t first = (plane * patches.frame_height + begin) * patches.frame_row();
    kernels.spread_patches({scalar, const_cast<void*>(at(target, first, scalar)), begin, end, patches.frame_row(),
                            patches.right(), patches.height, patches.row(), patches.normalisation(plane % planes)},
                           covers.data(), int64_t(covers.size()), scratch);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("patch_gather", TORCH_BOX(&patch_gather));
  m.impl("patch_gather_grad_origin", TORCH_BOX(&patch_gather_grad_origin));
  m.impl("patch_gather_grad_input", TORCH_BOX(&patch_gather_grad_input));
}

}  // namespace adakernels
