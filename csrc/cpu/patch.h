// Bilinear patches as data: where their rows lie and how they are weighted.
#pragma once

#include <cstdint>

#include "domain.h"

namespace adakernels {

// What a sample is multiplied with and what is added to it: number i of a row takes element i * step of both.
struct Normalisation {
  const float* scale;
  const float* shift;
  int64_t step;  // 0: one for the whole row
};

// Rows of one patch. A row is a run of `count` numbers: pixels of one channel or, channels-last, all channels of the
// pixels. Each is a sample between four numbers of the source: the one it lies at and those `right`, `down` and both
// behind it. Those of weight 0 are read for derivatives only.
struct PatchRows {
  Scalar scalar;
  const void* source;
  int64_t source_stride;
  int64_t row_count, count;
  int64_t right, down;
  float fraction_y, fraction_x;
  Normalisation normalisation;
};

// The gradient of one patch, seen from the frame that it was cut from. data: [rows, count]
struct PatchGradient {
  const void* data;
  int64_t row, column;  // of the frame, where the first number's first tap lies; columns count numbers
  float fraction_y, fraction_x;
};

// Rows [begin, end) of a frame's gradient, `count` numbers each, and the form of its patches.
struct FrameRows {
  Scalar scalar;
  void* target;  // row `begin`
  int64_t begin, end, count;
  int64_t right;  // numbers between neighbouring pixels
  int64_t patch_row_count, patch_count;
  Normalisation normalisation;
};

}  // namespace adakernels
