// What csrc/cuda/ptx.cuh does by instructions, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

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

// Done as late as it may be, when the thread waits for it, so that a wait too few shows.
inline void copy_async(void* shared, const void* global, bool inside) {
  check_alignment<Vector<char, 16>>(shared);
  check_alignment<Vector<char, 16>>(global);
  emulation::defer([=] { inside ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16); });
}

inline void commit_copies() { emulation::commit_deferred(); }

template <int kLeft>
void wait_for_copies() {
  emulation::run_deferred(kLeft);
}

template <int kCount>
void load_matrices(uint32_t (&to)[kCount], const void* row) {
  check_alignment<Vector<char, 16>>(row);
  const emulation::Meeting<const void*> rows(~0u, row);
  const unsigned lane = emulation::lane();
  for (unsigned matrix = 0; matrix < kCount; ++matrix)
    std::memcpy(&to[matrix], static_cast<const char*>(rows[8 * matrix + lane / 4]) + 4 * (lane % 4), 4);
}

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const emulation::Meeting<Fragment> all(~0u, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned group = emulation::lane() / 4, pair = emulation::lane() % 4;
  const auto number = [](uint32_t two, unsigned which) {
    const uint16_t bits = uint16_t(two >> 16 * which);
    T value;
    std::memcpy(&value, &bits, sizeof(bits));
    return static_cast<float>(value);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = 2 * pair + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned from = k % 8 / 2, half = k / 8;
      sums[i] += number(all[4 * group + from].a[2 * half + lower], k % 2) *
                 number(all[4 * column + from].b[half], k % 2);
    }
  }
}

inline unsigned char* shared_memory() { return emulation::shared; }

}  // namespace adakernels
