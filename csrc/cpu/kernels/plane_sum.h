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
  int64_t table_size() const { return 2 * (width + kLanes) + zero_count(); }

  void fill_tables(float* memory) {
    int32_t* masks = reinterpret_cast<int32_t*>(memory);
    for (int64_t i = 0; i < width + kLanes; ++i) {
      masks[i] = i % width == 0 ? 0 : -1;
      masks[width + kLanes + i] = i % width == width - 1 ? 0 : -1;
    }
    masks_ = masks;
    std::fill_n(memory + 2 * (width + kLanes), zero_count(), 0.f);
    zeros_ = memory + 2 * (width + kLanes);
  }

 private:
  friend class PlaneSum;
  static int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  int64_t zero_count() const { return std::max<int64_t>(width, kLanes); }
  // -1 for those pixels of a vector from pixel x of a row on that have a left, a right neighbour.
  PlaneMask inner_left(int64_t x) const { return load_mask(masks_ + x); }
  PlaneMask inner_right(int64_t x) const { return load_mask(masks_ + width + kLanes + x); }

  int64_t lanes_in_row_;  // modulo whole rows
  const int32_t* masks_;
  const float* zeros_;  // a row
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
  void write(float* to, int64_t step, int64_t count, bool guarded, Activation activation) const {
    for (int64_t n = 0; n < count; ++n, to += step)
      if (shape_.rows == PlaneShape::Rows::of_any_width)
        write_flat(n, to, guarded, activation);
      else
        write_rows(n, 0, shape_.height, to, activation);
  }

  // The same for rows [begin, end), pairs where these fill a vector, of the first planes. to: its row 0
  void write_rows(int64_t begin, int64_t end, float* to, Activation activation) const {
    write_rows(0, begin, end, to, activation);
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
  void write_flat(int64_t n, float* to, bool guarded, Activation activation) const {
    const int64_t size = shape_.size, whole = size / kLanes * kLanes;
    int64_t at = 0, x = 0;
    const auto run = [&]<int count>(std::integral_constant<int, count>) {
      Vector<kLanes> sum[count];
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sum[i] = broadcast<kLanes>(start_);
      x = add_vectors<count>(n, at, x, sum);
      for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->planes + n * w->step + at + i * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) store<kLanes>(to + at + i * kLanes, activate<kLanes>(activation, sum[i]));
      at += count * kLanes;
    };
    while (at + kSumVectors * kLanes <= whole) run(std::integral_constant<int, kSumVectors>());
    while (at < whole) run(std::integral_constant<int, 1>());
    if (whole == size) return;
    Vector<kLanes> rest = broadcast<kLanes>(start_);
    add_vectors<1>(n, at, x, &rest);
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
      for (int64_t i = 0; i < size - whole; ++i) rest[i] += w->weight * w->planes[n * w->step + whole + i];
    rest = activate<kLanes>(activation, rest);
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

  void write_rows(int64_t n, int64_t begin, int64_t end, float* to, Activation activation) const {
    if (shape_.rows == Rows::half_a_vector)
      write_blocks<Rows::half_a_vector>(n, begin / 2, end / 2, to, activation);
    else if (shape_.rows == Rows::one_vector)
      write_blocks<Rows::one_vector>(n, begin, end, to, activation);
    else
      write_blocks<Rows::several_vectors>(n, begin, end, to, activation);
  }

  template <Rows rows>
  void write_blocks(int64_t n, int64_t begin, int64_t end, float* to, Activation activation) const {
    const int64_t width = rows == Rows::several_vectors ? shape_.width : kLanes;
    int64_t y = begin;
    for (; y + kSumVectors <= end; y += kSumVectors)
      for (int64_t x = 0; x < width; x += kLanes) write_vectors<kSumVectors, rows>(n, y, x, to, activation);
    for (; y < end; ++y)
      for (int64_t x = 0; x < width; x += kLanes) write_vectors<1, rows>(n, y, x, to, activation);
  }

  // A vector of each of `count` rows, or pairs of rows, from row or pair y on, at pixel x. Their taps share what is
  // loaded.
  template <int count, Rows rows>
  [[gnu::always_inline]] inline void write_vectors(int64_t n, int64_t y, int64_t x, float* to,
                                                   Activation activation) const {
    using V = Vector<kLanes>;
    constexpr bool halves = rows == Rows::half_a_vector, several = rows == Rows::several_vectors;
    constexpr int apart = halves ? 2 : 1;  // rows from those of one vector to those of the next
    const int64_t pitch = several ? shape_.width : kLanes, last = (halves ? shape_.height / 2 : shape_.height) - count;
    const bool has_left = several && x > 0, has_right = several && x + kLanes < pitch;
    V sum[count];
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) sum[i] = broadcast<kLanes>(start_);
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f) {
      V kernel[9];
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) kernel[i] = broadcast<kLanes>(f->kernel[i]);
      const float* plane = f->planes + n * f->step + y * pitch + x;
      // Vector i of the plane, counted from that of the first row.
      const auto at = [&](int i) {
        return (i < 0 && y == 0) || (i == count && y == last) ? shape_.zeros_ + x : plane + i * pitch;
      };
#pragma GCC unroll 12
      for (int r = 0; r < apart * (count - 1) + 3; ++r) {
        V here, left = {}, right = {};
        if constexpr (halves) {
          here = r % 2 == 0 ? join_halves(load<kLanes>(at(r / 2 - 1)), load<kLanes>(at(r / 2)))
                            : load<kLanes>(at(r / 2));
          left = masked(shift_right(here, here), shape_.inner_left(0));
          right = masked(shift_left(here, here), shape_.inner_right(0));
        } else {
          const float* row = at(r - 1);
          here = load<kLanes>(row);
          if (has_left) left = load<kLanes>(row - kLanes);
          if (has_right) right = load<kLanes>(row + kLanes);
          left = shift_right(left, here);
          right = shift_left(here, right);
        }
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          if (r < k || (r - k) % apart != 0 || (r - k) / apart >= count) continue;
          V& one = sum[(r - k) / apart];
          one += kernel[k * 3] * left;
          one += kernel[k * 3 + 1] * here;
          one += kernel[k * 3 + 2] * right;
        }
      }
    }
    const int64_t first = y * pitch + x;
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->planes + n * w->step + first + i * pitch);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) store<kLanes>(to + first + i * pitch, activate<kLanes>(activation, sum[i]));
  }

  const PlaneShape& shape_;
  Filtered filtered_[kMostFiltered];
  Weighted weighted_[kMostFiltered];
  int filtered_count_ = 0, weighted_count_ = 0;
  float start_ = 0;
};

}  // namespace
}  // namespace adakernels
