#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

namespace adakernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// malloc may map memory of this size anew at every call, and faulting 4 KiB pages in costs more than computing what
// goes there: ask for larger pages.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (end >= begin + 2 * page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

bool is_channels_last(const Tensor& tensor) { return !tensor.is_contiguous() && has_format(tensor, true); }

FloatArray floats(const std::optional<Tensor>& tensor) {
  FloatArray array;
  if (!tensor.has_value()) return array;
  Tensor values = tensor->scalar_type() == ScalarType::Float ? *tensor : torch::stable::to(*tensor, ScalarType::Float);
  array.channels_last_ = values.dim() >= 4 && is_channels_last(values);
  if (!values.is_contiguous() && !array.channels_last_) values = torch::stable::contiguous(values);
  array.data_ = static_cast<const float*>(values.const_data_ptr());
  array.owner_ = values;
  return array;
}

void check_features(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK((tensor.dim() == 4 || tensor.dim() == 5) &&
                      (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  name, ": expected a float32 or bfloat16 tensor of 4 or 5 dimensions");
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

Planes planes_of(const Tensor& tensor) {
  void* data = const_cast<void*>(tensor.const_data_ptr());
  const Scalar scalar = tensor.scalar_type() == ScalarType::Float ? Scalar::f32 : Scalar::bf16;
  if (tensor.dim() == 5) {
    const bool channels_last = is_channels_last(tensor);
    STD_TORCH_CHECK(has_format(tensor, channels_last), "expected clips that are contiguous or channels-last");
    const int64_t C = tensor.size(1), T = tensor.size(2), H = tensor.size(3), W = tensor.size(4);
    if (channels_last) return {data, scalar, tensor.numel(), H, W, H * W * C, 1, W * C, C};
    return {data, scalar, tensor.numel(), H, W, H * W, T * H * W, W, 1};
  }
  int64_t extent = tensor.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < 4 && extent > 0; ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return {data,
          scalar,
          extent,
          tensor.size(2),
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

int64_t clip_stride(const Tensor& tensor) {
  return tensor.size(2) * (is_channels_last(tensor) ? 1 : tensor.size(1));
}

std::vector<int64_t> strides_like_format(const Tensor& like, const std::vector<int64_t>& sizes) {
  const size_t rank = sizes.size();
  std::vector<int64_t> strides(rank);
  int64_t stride = 1;
  const auto follow = [&](size_t d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  };
  const bool channels_last = is_channels_last(like);
  if (channels_last) follow(1);
  for (size_t d = rank - 1; d > 1; --d) follow(d);
  if (!channels_last) follow(1);
  follow(0);
  return strides;
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
  return tensor;
}

Tensor empty_like_format(const Tensor& like, const std::vector<int64_t>& sizes, bool as_float) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_strided(sizes, strides_like_format(like, sizes), as_float ? aoti_torch_dtype_float32() : dtype);
}

PolicyValues policy_values(const std::optional<Tensor>& policy, int64_t frame_count, int64_t channels, const char* op,
                           const char* name) {
  if (!policy.has_value()) return nullptr;
  STD_TORCH_CHECK(policy->scalar_type() == ScalarType::Long && policy->dim() == 2 && policy->size(0) == frame_count &&
                      policy->size(1) == channels && policy->is_contiguous(),
                  op, ": expected a contiguous int64 ", name, " of shape [N, C]");
  const auto* values = static_cast<const int64_t*>(policy->const_data_ptr());
  // Bits of values other than 0, 1 and 2.
  uint64_t wrong = 0;
  for (int64_t i = 0; i < frame_count * channels; ++i) {
    const uint64_t value = uint64_t(values[i]);
    wrong |= (value & ~uint64_t(3)) | (value & value >> 1);
  }
  if (wrong == 0) return values;
  for (int64_t i = 0; i < frame_count * channels; ++i)
    // The dispatcher hands this type on to Python as a ValueError.
    if (values[i] < 0 || values[i] > 2)
      throw std::invalid_argument(std::string(op) + ": expected " + name +
                                  " values 0 (KEEP), 1 (REUSE) or 2 (SKIP), got " + std::to_string(values[i]));
  return values;
}

}  // namespace adakernels
