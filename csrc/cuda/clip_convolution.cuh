// Convolutions of frames or clips in one group or depthwise, of which every clip has all temporal taps or the centre
// one, and of which gates say what is computed.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/tensors.cuh"

namespace adakernels {

struct ClipConvolution {
  const char* op;                                  // whose errors they are
  Tensor weight;                                   // [C_out, C_in/groups, kh, kw] | [C_out, C_in/groups, kt, kh, kw]
  std::vector<int64_t> stride, padding, dilation;  // of time, if the weight has it, y and x
  bool depthwise;                                  // C_in groups, else one
  std::optional<Tensor> temporal = {};             // [B]
  std::optional<Tensor> frame_offsets = {};        // [B + 1]
  // Levels of which only the largest live one is computed; what belongs to none is left as it is.
  std::optional<Tensor> temporal_gate = {};  // [B, S_t]
  std::optional<Tensor> channel_gate = {};   // [B, S_c]

  // Of the input's dtype and format. input: [N, C_in, H, W] | [B, C_in, T, H, W]
  Tensor empty_output(const Tensor& input) const;

  // All of them fill their first argument. Gradients of what gates leave out in a computed frame have to be zero.
  void convolve(Tensor& output,                     // [N, C_out, H', W'] | [B, C_out, T', H', W']
                const Tensor& input,                // [N, C_in, H, W] | [B, C_in, T, H, W]
                const std::optional<Tensor>& bias,  // [C_out]
                int64_t activation) const;
  void input_gradient(Tensor& grad_input, const Tensor& grad) const;
  void weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input) const;
  void bias_gradient(Tensor& grad_bias, const Tensor& grad) const;
};

// Gradients of a convolution's input, weight and bias, empty where they are not wanted. The weight has the sizes given.
std::tuple<Tensor, Tensor, Tensor> empty_gradients(const Tensor& input, const Tensor& weight, bool want_input,
                                                   bool want_weight, bool want_bias);

}  // namespace adakernels
