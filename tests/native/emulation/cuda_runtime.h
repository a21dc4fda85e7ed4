// CUDA's execution model on the host: the part of the header of this name that the kernels use.
//
// A launch runs one block after the other. The threads of a block are fibers: one runs until it ends or has to wait
// for others. Even blocks start their threads in ascending, odd ones in descending order, so that a missing barrier
// shows in one of them. What cannot happen any more (a barrier that not all reach) is an error.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

// Of the thread that runs.
extern dim3 thread_index, block_index, block_size, grid_size;
extern unsigned char* shared;

// Runs the kernel for the whole grid. Throws what a thread throws, or std::runtime_error where threads wait for ever.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// The running thread waits until ready() is true; others run meanwhile.
void wait_until(const std::function<bool()>& ready);

// What the running thread has begun: put off, made a group with what came before, done but for the last groups.
// Copies and products wait apart from each other.
enum class Deferred { copies, products };
void defer(Deferred what, std::function<void()> action);
void commit_deferred(Deferred what);
void run_deferred(Deferred what, size_t groups_left);

// Whether the device has the products of warpgroups: ADAKERNELS_EMULATED_ARCH is 90a, else it is as 80.
bool has_warpgroups();

// Threads whose writes to shared memory the products may not see yet.
bool is_shared(const void* address);
void mark_writes();
void fence_writes();
bool all_writes_fenced();

// Throws std::runtime_error, with where the thread is.
[[noreturn]] void fail(const char* what);

// The bytes that every lane of `mask` brings to the same call, lane i's at i * kMeetingBytes.
constexpr size_t kMeetingBytes = 64;
const std::byte* meet(unsigned mask, const void* mine, size_t bytes);

// All lanes' values of a collective of the warp; of lanes outside the mask there is nothing to read.
template <typename T>
class Meeting {
 public:
  Meeting(unsigned mask, const T& mine) : values_(meet(mask, &mine, sizeof(T))), mask_(mask) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMeetingBytes);
  }
  T operator[](unsigned lane) const {
    if (!(mask_ >> lane & 1)) fail("a lane outside the mask is read");
    T value;
    std::memcpy(&value, values_ + lane * kMeetingBytes, sizeof(T));
    return value;
  }

 private:
  const std::byte* values_;
  unsigned mask_;
};

unsigned lane();

}  // namespace emulation

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

using std::max;
using std::min;

// Barriers.

void __syncthreads();
void __syncwarp(unsigned mask = ~0u);

// Collectives of a warp. `width` splits it into segments as in CUDA.

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const emulation::Meeting<T> all(mask, value);
  const unsigned segment = emulation::lane() / width * width;
  return all[segment + unsigned(source) % width];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const emulation::Meeting<T> all(mask, value);
  const unsigned from = emulation::lane() ^ unsigned(lane_mask), end = (emulation::lane() / width + 1) * width;
  return from < end ? all[from] : value;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const emulation::Meeting<T> all(mask, value);
  const unsigned from = emulation::lane() + delta, end = (emulation::lane() / width + 1) * width;
  return from < end ? all[from] : value;
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const emulation::Meeting<T> all(mask, value);
  const unsigned begin = emulation::lane() / width * width;
  return emulation::lane() >= begin + delta ? all[emulation::lane() - delta] : value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulation::Meeting<int> all(mask, predicate);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && all[lane] != 0) votes |= 1u << lane;
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T, typename Combine>
T reduce_over_warp(unsigned mask, T value, const Combine& combine) {
  const emulation::Meeting<T> all(mask, value);
  unsigned lane = 0;
  while (!(mask >> lane & 1)) ++lane;
  T result = all[lane];
  while (++lane < 32)
    if (mask >> lane & 1) result = combine(result, all[lane]);
  return result;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return reduce_over_warp(mask, value, [](T a, T b) { return T(a + b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return reduce_over_warp(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return reduce_over_warp(mask, value, [](T a, T b) { return std::max(a, b); });
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
