// Sums of planes, some of them filtered by 3x3 kernels, with pixels of a row in the lanes of vectors. Where rows, or
// pairs of them, fill vectors, a pixel's neighbours come of whole vectors of that row and zeros stand for what lies
// outside: a vector across two that were just written would have to wait until the cache has them. In planes of other
// widths a tap is the plane itself from some offset on, and what it meets across the ends of rows is masked.
#pragma once

#include <algorithm>

#include "activation.h"
#include "direct.h"
#include "lanes.h"

namespace adakernels {
namespace {

constexpr int kSumVectors = 4;
// Vectors of a row, and rows of one vector each, that share what a filter takes: as many as leave registers for it.
constexpr int kSumAcross = kLanes == 16 ? 2 : 1, kSumRows = kLanes == 16 ? 8 : 4;
constexpr int kMostFiltered = 8;

using PlaneMask = VectorOf<kLanes>::integer;

inline Vector<kLanes> masked(Vector<kLanes> v, PlaneMask mask) { return Vector<kLanes>(PlaneMask(v) & mask); }

inline PlaneMask load_mask(const int32_t* mask) {
  PlaneMask v;
  std::memcpy(&v, mask, sizeof(v));
  return v;
}

// The pixels one to the left of those of v, which `before` precedes.
inline Vector<kLanes> shift_right(Vector<kLanes> before, Vector<kLanes> v) {
#if defined(__AVX512F__)
  return Vector<kLanes>(_mm512_maskz_alignr_epi32(0xffff, __m512i(v), __m512i(before), kLanes - 1));
#else
  constexpr auto positions = indices<kLanes>([](int i) { return kLanes - 1 + i; });
  return shuffle<kLanes>(before, v, positions);
#endif
}

// The pixels one to the right of those of v, which `after` follows.
inline Vector<kLanes> shift_left(Vector<kLanes> v, Vector<kLanes> after) {
#if defined(__AVX512F__)
  return Vector<kLanes>(_mm512_maskz_alignr_epi32(0xffff, __m512i(after), __m512i(v), 1));
#else
  constexpr auto positions = indices<kLanes>([](int i) { return i + 1; });
  return shuffle<kLanes>(v, after, positions);
#endif
}

// The same of two rows that share a vector, with zeros outside of them.
inline Vector<kLanes> shift_half_right(Vector<kLanes> v) {
#if defined(__AVX512F__)
  return Vector<kLanes>(_mm512_maskz_alignr_epi32(0xfefe, __m512i(v), __m512i(v), kLanes - 1));
#else
  constexpr auto positions = indices<kLanes>([](int i) { return i % (kLanes / 2) == 0 ? kLanes : i - 1; });
  return shuffle<kLanes>(v, Vector<kLanes>{}, positions);
#endif
}

inline Vector<kLanes> shift_half_left(Vector<kLanes> v) {
#if defined(__AVX512F__)
  return Vector<kLanes>(_mm512_maskz_alignr_epi32(0x7f7f, __m512i(v), __m512i(v), 1));
#else
  constexpr auto positions = indices<kLanes>([](int i) { return i % (kLanes / 2) == kLanes / 2 - 1 ? kLanes : i + 1; });
  return shuffle<kLanes>(v, Vector<kLanes>{}, positions);
#endif
}

// The second half of one vector and the first half of another.
inline Vector<kLanes> join_halves(Vector<kLanes> low, Vector<kLanes> high) {
  constexpr auto positions = indices<kLanes>([](int i) { return i + kLanes / 2; });
  return shuffle<kLanes>(low, high, positions);
}

// Planes of one size. Where filters cannot read planes as they lie, these are guarded: `pitch` values apart, in whole
// vectors of which the last ends in zeros, and between zeros.
class PlaneShape {
 public:
  enum class Rows { of_any_width, half_a_vector, one_vector, several_vectors };

  int64_t height, width, size, kernel;
  Rows rows;
  int64_t guard, pitch;

  // kernel: 1 or 3
  PlaneShape(int64_t height, int64_t width, int64_t kernel)
      : height(height), width(width), size(height * width), kernel(kernel), rows(Rows::of_any_width) {
    if (width % kLanes == 0)
      rows = width == kLanes ? Rows::one_vector : Rows::several_vectors;
    else if (2 * width == kLanes && height % 2 == 0)
      rows = Rows::half_a_vector;
    guard = reads_as_they_lie() ? 0 : whole_vectors(width + 1);
    pitch = whole_vectors(size) + guard;
    lanes_in_row_ = kLanes % width;
  }

  bool reads_as_they_lie() const { return kernel == 1 || rows != Rows::of_any_width; }
  // Floats that the tables take.
  int64_t table_size() const { return 2 * mask_count() + zero_count(); }

  void fill_tables(float* memory) {
    int32_t* masks = reinterpret_cast<int32_t*>(memory);
    for (int64_t i = 0; i < mask_count(); ++i) {
      masks[i] = i % width == 0 ? 0 : -1;
      masks[mask_count() + i] = i % width == width - 1 ? 0 : -1;
    }
    masks_ = masks;
    zeros_ = std::fill_n(memory + 2 * mask_count(), zero_count(), 0.f) - zero_count();
  }

 private:
  friend class PlaneSum;
  static int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  int64_t zero_count() const { return std::max<int64_t>(width, kLanes); }
  // Rows that are read as they lie get along without masks.
  int64_t mask_count() const { return reads_as_they_lie() ? 0 : width + kLanes; }
  // -1 for those pixels of a vector from pixel x of a row on that have a left, a right neighbour.
  PlaneMask inner_left(int64_t x) const { return load_mask(masks_ + x); }
  PlaneMask inner_right(int64_t x) const { return load_mask(masks_ + mask_count() + x); }

  int64_t lanes_in_row_;  // modulo whole rows
  const int32_t* masks_;
  const float* zeros_;  // a row
};

// What becomes of a sum. streamed: it goes past the caches, to multiples of a vector's size
struct Finish {
  Activation activation;
  bool streamed = false;

  void store(float* to, Vector<kLanes> sum) const {
    const Vector<kLanes> value = activate<kLanes>(activation, sum);
    if (streamed)
      stream<kLanes>(to, value);
    else
      adakernels::store<kLanes>(to, value);
  }
};

// The activation of a sum of planes, some of them filtered, for several frames: each plane is the first of some that
// lie `step` values apart.
class PlaneSum {
 public:
  explicit PlaneSum(const PlaneShape& shape) : shape_(shape) {}

  void clear(float start = 0) {
    filtered_count_ = weighted_count_ = 0;
    start_ = start;
  }

  // planes: guarded unless they are read as they lie; kernel: of the shape's size. At most kMostFiltered.
  void add_filtered(const float* planes, int64_t step, const float* kernel, float weight = 1) {
    if (shape_.kernel == 1) {
      add(planes, step, weight * kernel[0]);
      return;
    }
    Filtered& filtered = filtered_[filtered_count_++];
    filtered.planes = planes;
    filtered.step = step;
    for (int i = 0; i < 9; ++i) filtered.kernel[i] = weight * kernel[i];
  }
  void add(const float* planes, int64_t step, float weight) { weighted_[weighted_count_++] = {planes, step, weight}; }

  // Overwrites `count` planes from `to` on, which may be those of one that is added unfiltered. Guarded ones stay that.
  void write(float* to, int64_t step, int64_t count, bool guarded, Finish finish) const {
    for (int64_t n = 0; n < count; ++n, to += step)
      if (filtered_count_ == 0)
        write_flat<false>(n, to, guarded, finish);
      else if (shape_.rows == PlaneShape::Rows::of_any_width)
        write_flat<true>(n, to, guarded, finish);
      else
        write_rows(n, 0, shape_.height, to, finish);
  }

  // The same for rows [begin, end), pairs where these fill a vector, of the first planes. to: its row 0
  void write_rows(int64_t begin, int64_t end, float* to, Finish finish) const {
    write_rows(0, begin, end, to, finish);
  }

 private:
  using Rows = PlaneShape::Rows;
  struct Filtered {
    const float* planes;
    int64_t step;
    float kernel[9];
  };
  struct Weighted {
    const float* planes;
    int64_t step;
    float weight;
  };

  // A plane from its first vector to its last, whatever rows they are of.
  template <bool filters>
  void write_flat(int64_t n, float* to, bool guarded, Finish finish) const {
    const int64_t size = shape_.size, whole = size / kLanes * kLanes;
    int64_t at = 0, x = 0;
    const auto run = [&]<int count>(std::integral_constant<int, count>) {
      Vector<kLanes> sum[count];
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sum[i] = broadcast<kLanes>(start_);
      if constexpr (filters) x = add_vectors<count>(n, at, x, sum);
      for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->planes + n * w->step + at + i * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) finish.store(to + at + i * kLanes, sum[i]);
      at += count * kLanes;
    };
    while (at + kSumVectors * kLanes <= whole) run(std::integral_constant<int, kSumVectors>());
    while (at < whole) run(std::integral_constant<int, 1>());
    if (whole == size) return;
    Vector<kLanes> rest = broadcast<kLanes>(start_);
    if constexpr (filters) add_vectors<1>(n, at, x, &rest);
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
      for (int64_t i = 0; i < size - whole; ++i) rest[i] += w->weight * w->planes[n * w->step + whole + i];
    rest = activate<kLanes>(finish.activation, rest);
    for (int64_t i = 0; i < (guarded ? kLanes : size - whole); ++i) to[whole + i] = i < size - whole ? rest[i] : 0.f;
  }

  // Adds what filters make of neighbouring vectors, the first one at pixel x of a row. Returns the pixel after them.
  template <int count>
  int64_t add_vectors(int64_t n, int64_t at, int64_t x, Vector<kLanes>* sum) const {
    using V = Vector<kLanes>;
    const int64_t width = shape_.width;
    V left[count] = {}, right[count] = {};
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f)
#pragma GCC unroll 3
      for (int64_t y = 0; y < 3; ++y) {
        const float* row = f->planes + n * f->step + at + (y - 1) * width;
        const float* kernel = f->kernel + y * 3;
        const V a = broadcast<kLanes>(kernel[0]), b = broadcast<kLanes>(kernel[1]), c = broadcast<kLanes>(kernel[2]);
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
          left[i] += a * load<kLanes>(row + i * kLanes - 1);
          sum[i] += b * load<kLanes>(row + i * kLanes);
          right[i] += c * load<kLanes>(row + i * kLanes + 1);
        }
      }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      sum[i] += masked(left[i], shape_.inner_left(x)) + masked(right[i], shape_.inner_right(x));
      x += shape_.lanes_in_row_;
      x = x < width ? x : x - width;
    }
    return x;
  }

  void write_rows(int64_t n, int64_t begin, int64_t end, float* to, Finish finish) const {
    if (shape_.rows == Rows::half_a_vector)
      write_blocks<Rows::half_a_vector>(n, begin / 2, end / 2, to, finish);
    else if (shape_.rows == Rows::one_vector)
      write_blocks<Rows::one_vector>(n, begin, end, to, finish);
    else
      write_blocks<Rows::several_vectors>(n, begin, end, to, finish);
  }

  template <Rows rows>
  void write_blocks(int64_t n, int64_t begin, int64_t end, float* to, Finish finish) const {
    int64_t y = begin;
    const auto run = [&]<int count>(std::integral_constant<int, count>) {
      for (; y + count <= end; y += count) {
        if constexpr (rows != Rows::several_vectors) {
          write_vectors<count, 1, rows, false, false>(n, y, 0, to, finish);
          continue;
        }
        int64_t x = 0;
        for (; x + kSumAcross * kLanes <= shape_.width; x += kSumAcross * kLanes)
          write_across<count, kSumAcross>(n, y, x, to, finish);
        for (; x < shape_.width; x += kLanes) write_across<count, 1>(n, y, x, to, finish);
      }
    };
    if constexpr (rows == Rows::one_vector) run(std::integral_constant<int, kSumRows>());
    run(std::integral_constant<int, kSumVectors>());
    run(std::integral_constant<int, 1>());
  }

  // Some vectors of longer rows, as neighbours that they have in these ask for.
  template <int count, int across>
  void write_across(int64_t n, int64_t y, int64_t x, float* to, Finish finish) const {
    constexpr Rows rows = Rows::several_vectors;
    const bool has_right = x + across * kLanes < shape_.width;
    if (x > 0 && has_right)
      write_vectors<count, across, rows, true, true>(n, y, x, to, finish);
    else if (x > 0)
      write_vectors<count, across, rows, true, false>(n, y, x, to, finish);
    else if (has_right)
      write_vectors<count, across, rows, false, true>(n, y, x, to, finish);
    else
      write_vectors<count, across, rows, false, false>(n, y, x, to, finish);
  }

  // So many vectors of each of `count` rows, or one of pairs of rows, from row or pair y on, at pixel x. Their taps
  // share what is loaded.
  template <int count, int across, Rows rows, bool has_left, bool has_right>
  [[gnu::always_inline]] inline void write_vectors(int64_t n, int64_t y, int64_t x, float* to,
                                                   Finish finish) const {
    using V = Vector<kLanes>;
    constexpr bool halves = rows == Rows::half_a_vector;
    constexpr int apart = halves ? 2 : 1;  // rows from those of one vector to those of the next
    const int64_t pitch = rows == Rows::several_vectors ? shape_.width : kLanes;
    const int64_t last = (halves ? shape_.height / 2 : shape_.height) - count;
    V sum[count][across];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < across; ++v) sum[i][v] = broadcast<kLanes>(start_);
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f) {
      V kernel[9];
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) kernel[i] = broadcast<kLanes>(f->kernel[i]);
      const float* plane = f->planes + n * f->step + y * pitch + x;
      const float* const above = y == 0 ? shape_.zeros_ + x : plane - pitch;
      const float* const below = y == last ? shape_.zeros_ + x : plane + count * pitch;
      // Vector i of the plane, counted from that of the first row.
      const auto at = [&](int i) { return i < 0 ? above : i == count ? below : plane + i * pitch; };
#pragma GCC unroll 12
      for (int r = 0; r < apart * (count - 1) + 3; ++r) {
        V here[across], left[across], right[across];
        if constexpr (halves) {
          here[0] = r % 2 == 0 ? join_halves(load<kLanes>(at(r / 2 - 1)), load<kLanes>(at(r / 2)))
                               : load<kLanes>(at(r / 2));
          left[0] = shift_half_right(here[0]);
          right[0] = shift_half_left(here[0]);
        } else {
          const float* row = at(r - 1);
          V before = {}, after = {};
          if constexpr (has_left) before = load<kLanes>(row - kLanes);
          if constexpr (has_right) after = load<kLanes>(row + across * kLanes);
#pragma GCC unroll 2
          for (int v = 0; v < across; ++v) here[v] = load<kLanes>(row + v * kLanes);
#pragma GCC unroll 2
          for (int v = 0; v < across; ++v) {
            left[v] = shift_right(v > 0 ? here[v - 1] : before, here[v]);
            right[v] = shift_left(here[v], v + 1 < across ? here[v + 1] : after);
          }
        }
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          if (r < k || (r - k) % apart != 0 || (r - k) / apart >= count) continue;
#pragma GCC unroll 2
          for (int v = 0; v < across; ++v) {
            V& one = sum[(r - k) / apart][v];
            one += kernel[k * 3] * left[v];
            one += kernel[k * 3 + 1] * here[v];
            one += kernel[k * 3 + 2] * right[v];
          }
        }
      }
    }
    const int64_t first = y * pitch + x;
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < across; ++v)
          sum[i][v] += w->weight * load<kLanes>(w->planes + n * w->step + first + i * pitch + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < across; ++v)
        finish.store(to + first + i * pitch + v * kLanes, sum[i][v]);
  }

  const PlaneShape& shape_;
  Filtered filtered_[kMostFiltered];
  Weighted weighted_[kMostFiltered];
  int filtered_count_ = 0, weighted_count_ = 0;
  float start_ = 0;
};

}  // namespace
}  // namespace adakernels
