#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
  array.channels_last_ = values.dim() == 4 && is_channels_last(values);
  if (!values.is_contiguous() && !array.channels_last_) values = torch::stable::contiguous(values);
  array.data_ = static_cast<const float*>(values.const_data_ptr());
  array.owner_ = values;
  return array;
}

void check_features(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(tensor.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16), name,
                  ": expected a float32 or bfloat16 tensor of 4 dimensions");
}

Planes planes_of(const Tensor& tensor) {
  int64_t extent = tensor.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < 4 && extent > 0; ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return {const_cast<void*>(tensor.const_data_ptr()),
          tensor.scalar_type() == ScalarType::Float ? Scalar::f32 : Scalar::bf16,
          extent,
          tensor.size(2),
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

Tensor empty_like_format(const Tensor& like, const std::vector<int64_t>& sizes, bool as_float) {
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  const auto at_least_1 = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t c = at_least_1(C), h = at_least_1(H), w = at_least_1(W);
  const int64_t planar[4] = {c * h * w, h * w, w, 1}, channels_last[4] = {c * h * w, 1, w * c, c};
  int32_t dtype, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  if (as_float) dtype = aoti_torch_dtype_float32();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), is_channels_last(like) ? channels_last : planar,
                                                  dtype, device, 0, &handle));
  Tensor tensor(handle);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
  return tensor;
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
