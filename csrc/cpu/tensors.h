// Tensors of the stable ABI as the core sees them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../common/layout.h"
#include "domain.h"
#include "routes.h"

namespace adakernels {

// Values of a tensor as float32: the tensor's own memory where it is that already.
class FloatArray {
 public:
  const float* data() const { return data_; }
  // Of a tensor of 4 or 5 dimensions: whether its second dimension is the innermost in memory, and not the last one.
  bool channels_last() const { return channels_last_; }

 private:
  friend FloatArray floats(const std::optional<torch::stable::Tensor>& tensor);
  bool channels_last_ = false;
  std::optional<torch::stable::Tensor> owner_;
  const float* data_ = nullptr;
};

// Null for no tensor. In logical order, or, where the tensor is that, channels-last.
FloatArray floats(const std::optional<torch::stable::Tensor>& tensor);

// Throws unless it is a float32 or bfloat16 tensor of 4 dimensions, or of 5 that lie in one of the two formats.
void check_features(const torch::stable::Tensor& tensor, const char* name);

std::vector<int64_t> sizes_of(const torch::stable::Tensor& tensor);

// The frames of a float32 or bfloat16 tensor: of any strides [N, C, H, W], or in one of the two formats [B, C, T, H, W]
Planes planes_of(const torch::stable::Tensor& tensor);

// From a clip's first frame to that of the next one, in frames as `planes_of` numbers them. [B, C, T, H, W]
int64_t clip_stride(const torch::stable::Tensor& tensor);

// Whether a tensor is channels-last and not contiguous too. [N, C, H, W] | [B, C, T, H, W]
bool is_channels_last(const torch::stable::Tensor& tensor);

// The strides of a dense tensor, channels-last where `like` is that and not contiguous.
// sizes: [N, C, H, W] | [B, C, T, H, W]
std::vector<int64_t> strides_like_format(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes);

// An uninitialised tensor on the CPU.
torch::stable::Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                                    int32_t dtype);

// An uninitialised tensor, channels-last where `like` is that and not contiguous, of `like`'s dtype or of float32.
// sizes: [N, C, H, W] | [B, C, T, H, W]
torch::stable::Tensor empty_like_format(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                        bool as_float = false);

// A contiguous int64 policy; throws unless its values are 0, 1 or 2. op, name: whose argument it is. [N, C]
PolicyValues policy_values(const std::optional<torch::stable::Tensor>& policy, int64_t frame_count, int64_t channels,
                           const char* op, const char* name);

}  // namespace adakernels
