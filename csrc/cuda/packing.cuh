// Tensors brought into the order that the convolution reads: channels innermost, in whole vectors of 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/tensors.cuh"

namespace adakernels {

// Values of T in a vector.
template <typename T>
constexpr int kChunk = kVectorBytes / int(sizeof(T));

// A tensor [N, H * W, P] of the input's channels, P as small as whole vectors allow; of each frame those of a list,
// in its order, where there is one. Behind the last one there are zeros up to a whole vector, then anything.
Tensor pack_features(const Tensor& input,    // [N, C, H, W] | [B, C, T, H, W]
                     const int32_t* list,    // [N, C] | null
                     const int32_t* count);  // [N] | null

// Whether pack_features would change nothing.
bool is_packed(const Tensor& input);  // [N, C, H, W] | [B, C, T, H, W]

// In which order a weight's channels are wanted: for a row per output, or for one per tap and input.
enum class WeightOrder { by_output, by_input };

// A tensor [O, taps, I'] or [taps, I, O'] of a weight whose I' or O' channels fill whole vectors. With `transposed`,
// its outputs are those that it reads.
Tensor pack_weight(const Tensor& weight,  // [O, I, ...] | [I, O, ...]
                   WeightOrder order, bool transposed);

}  // namespace adakernels
