// Convolutions of frames or clips with groups = 1, of which every clip has all temporal taps or the centre one.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/tensors.cuh"

namespace adakernels {

struct ClipConvolution {
  const char* op;                                  // whose errors they are
  Tensor weight;                                   // [C_out, C_in, kh, kw] | [C_out, C_in, kt, kh, kw]
  std::vector<int64_t> stride, padding, dilation;  // of time, if the weight has it, y and x
  std::optional<Tensor> temporal;                  // [B]
  std::optional<Tensor> frame_offsets;             // [B + 1]

  // Of the input's dtype and format. input: [N, C_in, H, W] | [B, C_in, T, H, W]
  Tensor empty_output(const Tensor& input) const;

  // All of them fill their first argument.
  void convolve(Tensor& output,                     // [N, C_out, H', W'] | [B, C_out, T', H', W']
                const Tensor& input,                // [N, C_in, H, W] | [B, C_in, T, H, W]
                const std::optional<Tensor>& bias,  // [C_out]
                int64_t activation) const;
  void input_gradient(Tensor& grad_input, const Tensor& grad) const;
  void weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input) const;
};

// Of the gradient of a convolution's output. grad: [N, C_out, H', W'] | [B, C_out, T', H', W']
void clip_bias_gradient(Tensor& grad_bias, const Tensor& grad);

}  // namespace adakernels
