// The functions that exist once per instruction set, and the table through which they are called.
#pragma once

#include "../domain.h"

namespace adakernels {

// Memory of one thread, kept between tasks so that no task allocates.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // At least `bytes` bytes at a 64-byte boundary; what they held before is lost.
  void* reserve(int64_t bytes);

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

struct Kernels {
  // Rows that one register tile takes, and the pixels it spans.
  int row_block, pixel_block;
  // Computes and stores one tile of each of some units of one frame.
  void (*convolve_direct)(const Convolution&, const Unit*, int64_t unit_count, const Tile&, Scratch&);
  // The same for a tile that counts blocks of 2x2 grid points and takes whole rows of them.
  void (*convolve_winograd)(const Convolution&, const Unit&, const Tile&, Scratch&);
  // The transformed kernels of one row of weights for all `channel_count` channels.
  void (*winograd_weights)(const Convolution&, int64_t row, int64_t channel_count, float* transformed,
                           int64_t point_stride);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace adakernels
