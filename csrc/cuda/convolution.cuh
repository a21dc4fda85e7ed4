// The convolution core: an implicit matrix product over the domain of each output frame.
//
// Its rows are pixels of an output frame, its columns output channels, and its sums run over taps and input channels.
// Which channels, taps and frames there are is data on the device; what is not given is visited whole.
#pragma once

#include <cstdint>

#include "cuda/domain.cuh"
#include "cuda/frame_shape.cuh"
#include "cuda/packing.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// A convolution along one side of a frame. As `transposed` it is the gradient of a convolution's input: what it reads
// is where that one wrote, and the other way round. Of every `stride` neighbours each then has taps of its own, so the
// outputs come in that many phases.
struct Side {
  int32_t in, out, kernel, stride, padding, dilation;
  bool transposed;

  __host__ __device__ int32_t phases() const { return transposed ? stride : 1; }
  // Outputs of a phase, of which the last one may be outside.
  __host__ __device__ int32_t places() const { return (out + phases() - 1) / phases(); }
  // Where a place reads, but for what the tap adds.
  __device__ int32_t anchor(int32_t place) const { return transposed ? place : place * stride - padding; }
  __device__ int32_t output(int32_t place, int32_t phase) const { return place * phases() + phase; }
  __device__ bool has_tap(int32_t tap, int32_t phase) const {
    return !transposed || stride == 1 || (phase + padding - tap * dilation) % stride == 0;
  }
  __device__ int32_t offset(int32_t tap, int32_t phase) const {
    return transposed ? (phase + padding - tap * dilation) / stride : tap * dilation;
  }
  // How many of the taps before `end` a phase has.
  __device__ int32_t taps_before(int32_t end, int32_t phase) const {
    if (!transposed || stride == 1) return end;
    int32_t count = 0;
    for (int32_t tap = 0; tap < end; ++tap) count += has_tap(tap, phase);
    return count;
  }
};

struct Geometry {
  Side y, x;
  int32_t depth;  // temporal taps of the weight
};

Geometry geometry_of(const Tensor& read, const Tensor& written, const Window& window, int32_t depth, bool transposed);

// What becomes of a sum: the bias is added, the activation applied and the result stored where the policy says, in this
// frame where it is kept, and in the next one of the clip where that reuses it.
struct Epilogue {
  const void* bias;       // [C_out] | null
  int32_t activation;     // none, relu, relu6, silu
  const int64_t* policy;  // [N', C_out] | null
  int64_t frames;         // of a clip
};

// Among how many blocks the sums of each tile are split where there are few tiles, so many steps long at most. What
// they leave is no more than twice as many tiles as there are multiprocessors, and is added up in a fixed order.
int64_t splits_of_sums(int64_t tiles, int64_t steps, int64_t multiprocessors);

// Fills the output with the convolution of the domain; output channels outside it are zero. Lists without a count are
// not possible. A count without a list is that of the first channels: of the output the others are left as they are, or
// become zero, and of the input they have to be zero as far as they fill the count's last vector of 16 bytes.
// float32 is multiplied exactly or as TF32.
void convolve(Tensor& output,        // [N', C_out, H', W'] | [B, C_out, T', H', W']
              const Tensor& input,   // [N, C_in, H, W] | [B, C_in, T, H, W]
              const Tensor& weight,  // [C_out, C_in, ...], if transposed [C_in, C_out, ...]
              const Domain& domain, const Geometry& geometry, Sources sources, const Epilogue& epilogue, bool exact);

}  // namespace adakernels
