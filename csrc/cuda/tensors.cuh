// Tensors of the stable ABI as the launchers see them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "../common/layout.h"

namespace adakernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kVectorBytes = 16;

// Calls run(T()) with the element type of a float32, float16 or bfloat16 tensor.
template <typename Run>
void for_float_type(const Tensor& tensor, const char* name, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Half:
      return run(c10::Half());
    case ScalarType::BFloat16:
      return run(c10::BFloat16());
    default:
      STD_TORCH_CHECK(false, name, ": expected a float32, float16 or bfloat16 tensor");
  }
}

// Calls run(std::integral_constant<int, kVector>()): values of T in a vector where those fit, else 1.
template <typename T, typename Run>
void for_vector_size(bool fit, const Run& run) {
  if (fit)
    run(std::integral_constant<int, kVectorBytes / sizeof(T)>());
  else
    run(std::integral_constant<int, 1>());
}

// Whether a tensor of frames or clips is channels-last and not contiguous too; throws where it is neither.
inline bool is_channels_last(const Tensor& tensor, const char* name, int64_t rank = 4) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, ": expected a tensor of ", rank, " dimensions");
  if (tensor.is_contiguous()) return false;
  STD_TORCH_CHECK(has_format(tensor, true), name, ": expected a contiguous or channels-last tensor");
  return true;
}

// Whether accesses of so many bytes can begin at the tensor's data.
inline bool is_aligned(const Tensor& tensor, size_t bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Uninitialised, on the device of `like`. sizes: [N, C, H, W] | [B, C, T, H, W]
inline Tensor empty_in_format(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
                              bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              !channels_last      ? MemoryFormat::Contiguous
                              : sizes.size() == 5 ? MemoryFormat::ChannelsLast3d
                                                  : MemoryFormat::ChannelsLast);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace adakernels
