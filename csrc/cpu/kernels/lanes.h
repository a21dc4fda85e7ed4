// Moves values between planes and vectors with a plane in each lane.
#pragma once

#include <algorithm>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace adakernels {
namespace {

// Four neighbouring values of every lane's plane: lane 4 * b + q of the vectors is at planes[4 * b + q].
#if defined(__AVX512F__)
inline Vector<16> load_quads(const float* const* planes, int64_t at) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(planes[0] + at));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(planes[4] + at), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(planes[8] + at), 2);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(planes[12] + at), 3);
  return Vector<16>(v);
}
// Masked, because GCC warns of the undefined operand of the plain form.
inline void store_quads(float* const* planes, int64_t at, Vector<16> v) {
  _mm_storeu_ps(planes[0] + at, _mm512_maskz_extractf32x4_ps(0xf, __m512(v), 0));
  _mm_storeu_ps(planes[4] + at, _mm512_maskz_extractf32x4_ps(0xf, __m512(v), 1));
  _mm_storeu_ps(planes[8] + at, _mm512_maskz_extractf32x4_ps(0xf, __m512(v), 2));
  _mm_storeu_ps(planes[12] + at, _mm512_maskz_extractf32x4_ps(0xf, __m512(v), 3));
}
#elif defined(__AVX2__)
inline Vector<8> load_quads(const float* const* planes, int64_t at) {
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(planes[0] + at));
  return Vector<8>(_mm256_insertf128_ps(v, _mm_loadu_ps(planes[4] + at), 1));
}
inline void store_quads(float* const* planes, int64_t at, Vector<8> v) {
  _mm_storeu_ps(planes[0] + at, _mm256_castps256_ps128(__m256(v)));
  _mm_storeu_ps(planes[4] + at, _mm256_extractf128_ps(__m256(v), 1));
}
#else
inline Vector<4> load_quads(const float* const* planes, int64_t at) { return load<4>(planes[0] + at); }
inline void store_quads(float* const* planes, int64_t at, Vector<4> v) { store<4>(planes[0] + at, v); }
#endif

// Writes those lanes alone whose mask is -1, not 0.
inline void store_lanes(float* to, Vector<kLanes> v, VectorOf<kLanes>::integer mask) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, _mm512_movepi32_mask(__m512i(mask)), __m512(v));
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, __m256i(mask), __m256(v));
#else
  for (int l = 0; l < kLanes; ++l)
    if (mask[l]) to[l] = v[l];
#endif
}

// Transposes every 4x4 block of four vectors.
inline void transpose_quads(Vector<kLanes>* v) {
  constexpr auto low = indices<kLanes>([](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes; });
  constexpr auto high = indices<kLanes>([](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes + 2; });
  constexpr auto first = indices<kLanes>([](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes; });
  constexpr auto second = indices<kLanes>([](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes + 2; });
  const auto a = shuffle<kLanes>(v[0], v[1], low), b = shuffle<kLanes>(v[2], v[3], low);
  const auto c = shuffle<kLanes>(v[0], v[1], high), d = shuffle<kLanes>(v[2], v[3], high);
  v[0] = shuffle<kLanes>(a, b, first);
  v[1] = shuffle<kLanes>(a, b, second);
  v[2] = shuffle<kLanes>(c, d, first);
  v[3] = shuffle<kLanes>(c, d, second);
}

// Calls use(i, vector) with value i of every plane for i in [begin, end), and perhaps again for up to three values
// before. Reads nothing but values [0, end) of the planes. planes: [kLanes]
template <typename Use>
inline void gather_lanes(const float* const* planes, int64_t begin, int64_t end, const Use& use) {
  if (end < 4) {
    for (int64_t i = begin; i < end; ++i) {
      Vector<kLanes> v;
      for (int l = 0; l < kLanes; ++l) v[l] = planes[l][i];
      use(i, v);
    }
    return;
  }
  for (int64_t i = begin; i < end; i += 4) {
    const int64_t at = std::min(i, end - 4);
    Vector<kLanes> v[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) v[q] = load_quads(planes + q, at);
    transpose_quads(v);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) use(at + q, v[q]);
  }
}

// planes[l][i] = lane l of vector i for i < count. planes: [kLanes]
inline void scatter_lanes(float* const* planes, const float* vectors, int64_t count) {
  if (count < 4) {
    for (int64_t i = 0; i < count; ++i)
      for (int l = 0; l < kLanes; ++l) planes[l][i] = vectors[i * kLanes + l];
    return;
  }
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t at = std::min(i, count - 4);
    Vector<kLanes> v[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) v[q] = load<kLanes>(vectors + (at + q) * kLanes);
    transpose_quads(v);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store_quads(planes + q, at, v[q]);
  }
}

}  // namespace
}  // namespace adakernels
