// What csrc/cuda/ptx.cuh does by instructions, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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
  if (emulation::is_shared(to)) emulation::mark_writes();
}

// Done as late as it may be, when the thread waits for it, so that a wait too few shows.
template <int kBytes = 16>
void copy_async(void* shared, const void* global, bool inside) {
  check_alignment<Vector<char, kBytes>>(shared);
  check_alignment<Vector<char, kBytes>>(global);
  emulation::defer(emulation::Deferred::copies, [=] {
    inside ? std::memcpy(shared, global, kBytes) : std::memset(shared, 0, kBytes);
    emulation::mark_writes();
  });
}

inline void commit_copies() { emulation::commit_deferred(emulation::Deferred::copies); }

template <int kLeft>
void wait_for_copies() {
  emulation::run_deferred(emulation::Deferred::copies, kLeft);
}

template <bool kTransposed = false, int kCount>
void load_matrices(uint32_t (&to)[kCount], const void* row) {
  check_alignment<Vector<char, 16>>(row);
  const emulation::Meeting<const void*> rows(~0u, row);
  const unsigned lane = emulation::lane();
  for (unsigned matrix = 0; matrix < kCount; ++matrix)
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned from = kTransposed ? 2 * (lane % 4) + i : lane / 4;
      const unsigned column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
      std::memcpy(reinterpret_cast<char*>(&to[matrix]) + 2 * i,
                  static_cast<const char*>(rows[8 * matrix + from]) + 2 * column, 2);
    }
}

// The number with the precision of TF32: cut, or rounded to nearest.
inline float cut_to_tf32(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  bits &= ~0x1fffu;
  std::memcpy(&number, &bits, 4);
  return number;
}
inline float round_to_tf32(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  if ((~bits & 0x7f800000u) != 0) bits += 0x1000u;
  std::memcpy(&number, &bits, 4);
  return cut_to_tf32(number);
}

// How many numbers of a row or column a product sums over: 32 bytes of them.
template <typename T>
constexpr unsigned kProductLength = 32 / sizeof(T);

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr unsigned length = kProductLength<T>, half = length / 2, each = half / 4;
  struct Fragment {
    T a[4][each], b[2][each];
  };
  Fragment mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const emulation::Meeting<Fragment> all(~0u, mine);
  const unsigned group = emulation::lane() / 4, pair = emulation::lane() % 4;
  const auto number = [](T value) {
    if constexpr (std::is_same_v<T, float>)
      return round_to_tf32(value);
    else
      return static_cast<float>(value);
  };
  for (unsigned from = 0; from < 4; ++from) {
    const Fragment left = all[4 * group + from];
    for (unsigned which = 0; which < 2; ++which) {
      const Fragment right = all[4 * (2 * pair + which) + from];
      for (unsigned lower = 0; lower < 2; ++lower)
        for (unsigned k = 0; k < 2 * each; ++k)
          sums[2 * lower + which] += number(left.a[2 * (k / each) + lower][k % each]) *
                                     number(right.b[k / each][k % each]);
    }
  }
}

inline bool has_warpgroup_products() { return emulation::has_warpgroups(); }

class Matrix {
 public:
  explicit Matrix(const void* shared, uint32_t block_bytes = 16)
      : start_(static_cast<const unsigned char*>(shared)), block_bytes_(block_bytes) {}

  // Of row `row`, or, by columns, of row k.
  template <typename T>
  float at(unsigned row, unsigned k, bool by_columns) const {
    constexpr unsigned width = 128 / sizeof(T);
    const size_t offset = by_columns ? row / width * block_bytes_ + 128 * k + row % width * sizeof(T)
                                     : 128 * row + k * sizeof(T);
    // The places are exchanged by the address, wherever the matrix begins.
    const size_t address = size_t(start_ - emulation::shared) + offset;
    T value;
    std::memcpy(&value, emulation::shared + (address ^ (address >> 7 & 7) << 4), sizeof(T));
    if constexpr (std::is_same_v<T, float>)
      return cut_to_tf32(value);
    else
      return static_cast<float>(value);
  }

 private:
  const unsigned char* start_;
  uint32_t block_bytes_;
};

inline void fence_for_products() { emulation::fence_writes(); }
inline void begin_products() { __syncwarp(); }
inline void commit_products() { emulation::commit_deferred(emulation::Deferred::products); }

// The results are there, and shared memory is read, no sooner.
template <int kLeft>
void wait_for_products() {
  emulation::run_deferred(emulation::Deferred::products, kLeft);
}

template <typename T, bool kByColumns, int kColumns, int kSums>
void multiply_add_warpgroup(float (&sums)[kSums][4], const Matrix& a, const Matrix& b) {
  static_assert((kColumns == 32 || kColumns == 64 || kColumns == 128) && kColumns <= 8 * kSums);
  static_assert(!(kByColumns && std::is_same_v<T, float>));
  if (!emulation::all_writes_fenced()) emulation::fail("a product may not see what was written to shared memory");
  __syncwarp();
  const unsigned row = threadIdx.x / 32 % 4 * 16 + emulation::lane() / 4, column = 2 * (emulation::lane() % 4);
  emulation::defer(emulation::Deferred::products, [=, &sums] {
    constexpr unsigned length = kProductLength<T>;
    float left[2][length];
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned k = 0; k < length; ++k) left[i][k] = a.at<T>(row + 8 * i, k, false);
    for (unsigned j = 0; j < kColumns / 8; ++j)
      for (unsigned which = 0; which < 2; ++which)
        for (unsigned k = 0; k < length; ++k) {
          const float right = b.at<T>(8 * j + column + which, k, kByColumns);
          for (unsigned i = 0; i < 2; ++i) sums[j][2 * i + which] += left[i][k] * right;
        }
  });
}

inline unsigned char* shared_memory() { return emulation::shared; }

}  // namespace adakernels
