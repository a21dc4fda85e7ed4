// Stores past the caches. A line that is written whole need not be read first, and large outputs would not stay in the
// caches until they are read anyway.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace adakernels {
namespace {

constexpr int64_t kLineBytes = 64;

// Outputs of this size leave the second-level caches before they are read.
constexpr int64_t kStreamedBytes = 3 << 20;

// Bytes from `to` to the next line of a cache.
inline int64_t bytes_to_line(const void* to) { return int64_t(-reinterpret_cast<uintptr_t>(to) % kLineBytes); }

// Streamed stores are ordered among others only by this.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Zeroes `count` bytes from `to` on, whole lines past the caches.
inline void stream_zeros(char* to, int64_t count) {
#if defined(__SSE2__)
  const int64_t head = bytes_to_line(to), lines = (count - head) / kLineBytes;
  if (lines > 0) {
    std::memset(to, 0, size_t(head));
    to += head, count -= head;
    for (char* const end = to + lines * kLineBytes; to != end; to += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_setzero_si128());
    count -= lines * kLineBytes;
  }
#endif
  std::memset(to, 0, size_t(count));
}

}  // namespace
}  // namespace adakernels
