#include "cuda/clip_taps.cuh"

#include "cuda/frame_shape.cuh"
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
__global__ void __launch_bounds__(kThreads) clip_taps_kernel(int32_t* sources,      // [N', kt]
                                                             int32_t* count,        // [N'] | null
                                                             const bool* temporal,  // [B] | null
                                                             Clips clips, Gates gates, TemporalSide side,
                                                             uint32_t channels, int64_t size) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= size) return;
  const int64_t row = thread / side.kernel, tap = thread % side.kernel, clip = clip_of(clips, row);
  sources[thread] = -1;
  const bool live = clip >= 0 && (count == nullptr || gates.is_live(clip));
  const bool packed = clips.offsets != nullptr;
  const int64_t first = live && packed ? packed_clip(clips, clip).begin : clip * clips.written, frame = row - first;
  // Between frames that are computed.
  const int64_t step = live && count != nullptr ? int64_t(1) << gates.temporal.lowest(clip) : 1;
  if (count != nullptr && tap == 0) {
    const bool computes = live && (side.transposed || frame % step == 0);
    count[row] = computes ? int32_t(computed_channels(channels, gates.channel.lowest(clip))) : 0;
  }
  if (!live || (temporal != nullptr && !temporal[clip] && tap != side.kernel / 2)) return;
  const Extent read = packed ? packed_clip(clips, clip) : Extent{clip * clips.read, clips.read};
  int64_t source = frame * side.stride - side.padding + tap * side.dilation;
  if (side.transposed) {
    source = frame + side.padding - tap * side.dilation;
    if (source % side.stride != 0) return;
    source /= side.stride;
    if (source % step != 0) return;
  }
  if (source >= 0 && source < read.frames) sources[thread] = int32_t(read.begin + source);
}

}  // namespace

ClipTaps clip_taps(const char* op, const Tensor& written, const Tensor& read, const std::optional<Tensor>& temporal,
                   const std::optional<Tensor>& frame_offsets, const Gates& gates, const TemporalSide& side) {
  const bool packed = frame_offsets.has_value();
  STD_TORCH_CHECK(written.dim() == (packed ? 4 : 5) && read.dim() == written.dim(), op,
                  ": expected [B, C, T, H, W], or [sum T, C, H, W] with frame_offsets");
  const int64_t clips = packed ? frame_offsets->size(0) - 1 : written.size(0);
  STD_TORCH_CHECK((!packed || (frame_offsets->is_contiguous() && frame_offsets->scalar_type() == ScalarType::Int)) &&
                      (!temporal || (temporal->is_contiguous() && temporal->scalar_type() == ScalarType::Bool &&
                                     temporal->size(0) == clips)),
                  op, ": expected contiguous frame_offsets, int32 [B + 1], and temporal, bool [B]");
  const int64_t rows = frame_shape(written, op).rows;
  frame_shape(read, op);
  ClipTaps taps{torch::stable::new_empty(written, {rows, side.kernel}, ScalarType::Int), std::nullopt};
  if (gates.given()) taps.count = torch::stable::new_empty(written, {rows}, ScalarType::Int);
  const Clips of{data_or_null<int32_t>(frame_offsets), clips, rows, packed ? 0 : written.size(2),
                 packed ? 0 : read.size(2)};
  const uint32_t channels = uint32_t((side.transposed ? read : written).size(1));
  Stream(written).launch(&clip_taps_kernel, ceil_div(rows * side.kernel, kThreads), kThreads, 0,
                         mutable_data<int32_t>(taps.sources), taps.count ? mutable_data<int32_t>(*taps.count) : nullptr,
                         data_or_null<bool>(temporal), of, gates, side, channels, rows * side.kernel);
  return taps;
}

}  // namespace adakernels
