#include "cuda/clip_taps.cuh"

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;

// Clips of so many frames each, or of those between two offsets.
struct Clips {
  const int32_t* offsets;  // [B + 1] | null
  int64_t count, rows;
  int64_t written, read;  // frames of each
};

// Where a clip's frames begin and how many there are. Offsets that make no sense lead to no other memory.
struct Extent {
  int64_t begin, frames;
};

__device__ Extent packed_clip(const Clips& clips, int64_t clip) {
  const int64_t begin = max(int64_t(0), min(int64_t(clips.offsets[clip]), clips.rows));
  return {begin, max(begin, min(int64_t(clips.offsets[clip + 1]), clips.rows)) - begin};
}

// The clip that a frame belongs to, which may be -1.
__device__ int64_t clip_of(const Clips& clips, int64_t row) {
  if (clips.offsets == nullptr) return row / clips.written;
  int64_t low = 0, high = clips.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (clips.offsets[middle + 1] <= row)
      low = middle + 1;
    else
      high = middle;
  }
  return low < clips.count ? low : -1;
}

// A thread has a tap of a frame.
__global__ void __launch_bounds__(kThreads) tap_sources_kernel(int32_t* sources,      // [N', kt]
                                                               const bool* temporal,  // [B] | null
                                                               Clips clips, TemporalSide side, int64_t size) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= size) return;
  const int64_t row = thread / side.kernel, tap = thread % side.kernel, clip = clip_of(clips, row);
  sources[thread] = -1;
  if (clip < 0 || (temporal != nullptr && !temporal[clip] && tap != side.kernel / 2)) return;
  const bool packed = clips.offsets != nullptr;
  const Extent written = packed ? packed_clip(clips, clip) : Extent{clip * clips.written, clips.written};
  const Extent read = packed ? written : Extent{clip * clips.read, clips.read};
  const int64_t frame = row - written.begin;
  int64_t source = frame * side.stride - side.padding + tap * side.dilation;
  if (side.transposed) {
    source = frame + side.padding - tap * side.dilation;
    if (source % side.stride != 0) return;
    source /= side.stride;
  }
  if (source >= 0 && source < read.frames) sources[thread] = int32_t(read.begin + source);
}

}  // namespace

Tensor tap_sources(const Tensor& written, const Tensor& read, const std::optional<Tensor>& temporal,
                   const std::optional<Tensor>& frame_offsets, const TemporalSide& side) {
  const bool packed = frame_offsets.has_value();
  STD_TORCH_CHECK(written.dim() == (packed ? 4 : 5) && read.dim() == written.dim(),
                  "sliced_conv3d: expected [B, C, T, H, W], or [sum T, C, H, W] with frame_offsets");
  const int64_t clips = packed ? frame_offsets->size(0) - 1 : written.size(0);
  STD_TORCH_CHECK((!packed || (frame_offsets->is_contiguous() && frame_offsets->scalar_type() == ScalarType::Int)) &&
                      (!temporal || (temporal->is_contiguous() && temporal->scalar_type() == ScalarType::Bool &&
                                     temporal->size(0) == clips)),
                  "sliced_conv3d: expected contiguous frame_offsets, int32 [B + 1], and temporal, bool [B]");
  const int64_t rows = packed ? written.size(0) : clips * written.size(2);
  STD_TORCH_CHECK(layout_of(read).rows <= INT32_MAX, "sliced_conv3d: expected at most 2^31 - 1 frames");
  Tensor sources = torch::stable::new_empty(written, {rows, side.kernel}, ScalarType::Int);
  const Clips of{data_or_null<int32_t>(frame_offsets), clips, rows, packed ? 0 : written.size(2),
                 packed ? 0 : read.size(2)};
  Stream(written).launch(&tap_sources_kernel, ceil_div(rows * side.kernel, kThreads), kThreads, 0,
                         mutable_data<int32_t>(sources), data_or_null<bool>(temporal), of, side, rows * side.kernel);
  return sources;
}

}  // namespace adakernels
