// Vector types of the instruction set that this translation unit is compiled for.
// Everything here has internal linkage: the same source is compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../streams.h"

namespace adakernels {
namespace {

template <int lanes>
struct VectorOf {
  typedef float type __attribute__((vector_size(lanes * 4)));
  typedef float unaligned __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(lanes * 4)));
};

template <int lanes>
using Vector = typename VectorOf<lanes>::type;

// kRows x kVectors accumulators, kVectors loads and one broadcast fill the register file.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
#endif

// Half a vector costs half the time where 512-bit operations are issued in two halves (Zen 4), and never more.
constexpr bool kHalfIsCheaper = kLanes == 16;

template <int lanes>
inline Vector<lanes> load(const float* p) {
  return *reinterpret_cast<const typename VectorOf<lanes>::unaligned*>(p);
}

template <int lanes>
inline void store(float* p, Vector<lanes> v) {
  *reinterpret_cast<typename VectorOf<lanes>::unaligned*>(p) = v;
}

// Past the caches; p at a multiple of the vector's size.
template <int lanes>
inline void stream(float* p, Vector<lanes> v) {
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return _mm512_stream_ps(p, __m512(v));
#endif
#if defined(__AVX__)
  if constexpr (lanes == 8) return _mm256_stream_ps(p, __m256(v));
#endif
#if defined(__SSE2__)
  if constexpr (lanes == 4) return _mm_stream_ps(p, __m128(v));
#endif
  store<lanes>(p, v);
}

// Positions in a pair of vectors, as a constant that is loaded and not built at run time.
template <int lanes>
struct Indices {
  int32_t at[lanes];
};

template <int lanes, typename Index>
constexpr Indices<lanes> indices(Index index) {
  Indices<lanes> all = {};
  for (int i = 0; i < lanes; ++i) all.at[i] = index(i);
  return all;
}

// The elements of a pair of vectors at these positions.
template <int lanes>
inline Vector<lanes> shuffle(Vector<lanes> low, Vector<lanes> high, const Indices<lanes>& positions) {
  typename VectorOf<lanes>::integer index;
  std::memcpy(&index, positions.at, sizeof(index));
  return __builtin_shuffle(low, high, index);
}

// Subtracting 0 changes no value, unlike adding it to -0, so it costs nothing.
template <int lanes>
inline Vector<lanes> broadcast(float value) {
  return value - Vector<lanes>{};
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) { return from_bf16(value); }
inline float to_float(uint8_t value) { return float(value); }

}  // namespace
}  // namespace adakernels
