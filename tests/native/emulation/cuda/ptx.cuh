// What csrc/cuda/ptx.cuh does by instructions, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace adakernels {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

// An access that is not aligned ends a kernel on the device, but not on every host.
template <typename Access>
void check_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Access) != 0) emulation::fail("a vector access is not aligned");
}

template <int kCount, typename T>
Vector<T, kCount> load_vector(const T* from) {
  check_alignment<Vector<T, kCount>>(from);
  Vector<T, kCount> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename T, int kCount>
void store_vector(T* to, const Vector<T, kCount>& vector) {
  check_alignment<Vector<T, kCount>>(to);
  std::memcpy(to, &vector, sizeof(vector));
}

inline unsigned char* shared_memory() { return emulation::shared; }

}  // namespace adakernels
