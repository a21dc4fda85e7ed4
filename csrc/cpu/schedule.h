// Splits a convolution into tiles and runs tasks on all threads.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "domain.h"
#include "kernels/kernels.h"

namespace adakernels {

// The kernels of the best instruction set of this machine.
const Kernels& best_kernels();

// Whether the taps make an undilated 3x3 kernel of stride 1 or 2, which Winograd's method is for.
bool suits_winograd(const Convolution& convolution);

// The side of the blocks of outputs, 2 or 4, in which Winograd's method makes a map of these kernels fastest if they are
// transformed beforehand. 0 where the direct sum is faster.
int64_t winograd_block(const Convolution& convolution, int64_t row_count, int64_t channel_count,
                       const Kernels& kernels);

// The same where they are yet to be transformed, for use by the units.
int64_t winograd_block(const Convolution& convolution, std::span<const Unit> units, int64_t row_count,
                       int64_t channel_count, const Kernels& kernels);

// Whether the depthwise kernel reads and writes these planes: both planar, or both channels-last with so many channels.
bool can_use_depthwise_planes(const Convolution& convolution);
bool can_use_depthwise_channels(const Convolution& convolution, int64_t source_channels, int64_t target_channels);

// In how many parts of its rows a convolution of chosen blocks is to be computed, so that those transformed at once do
// not take much memory: the source is transformed anew for each.
int64_t kernel_parts(const Convolution& convolution, int64_t row_count, int64_t channel_count, const Kernels& kernels);

// Transforms the 3x3 kernels of `rows` for the blocks chosen, and has `convolution` use them. transformed: room for
// those of the rows [row_begin, row_end), as many numbers each as `transformed_row` says
void transform_weights(Convolution& convolution, std::span<const int64_t> rows, int64_t row_begin,
                       int64_t channel_count, const Kernels& kernels, float* transformed);

// Numbers of a row's transformed kernels.
int64_t transformed_row(const Convolution& convolution, int64_t channel_count, const Kernels& kernels);

// The rows that units write, each once.
std::vector<int64_t> used_rows(std::span<const Unit> units, int64_t row_count);

struct Task {
  const Convolution* convolution;
  const Unit* units;
  int64_t unit_count;  // of one frame, unless the convolution is depthwise
  Tile tile;
};

// How many tasks keep the threads equally busy.
int64_t enough_tasks();

// Tiles of all units: small enough for the second-level cache, and as far as that goes no more than are enough.
void add_tasks(std::vector<Task>& tasks, const Convolution& convolution, std::span<const Unit> units,
               const Kernels& kernels, int64_t enough);

// Makes one long row of the grid where neighbouring rows touch in memory and the kernel is 1x1.
void flatten_grid(Convolution& convolution);

// Multiply-adds that a set of tasks stands for.
double work(const std::vector<Task>& tasks);

void run_task(const Task& task, const Kernels& kernels, Scratch& scratch);

// Calls run(i, scratch) for i < count, each once, on all threads if `work` multiply-adds are worth waking them. The
// last `small_count` are begun when no other is left.
void run_tasks(int64_t count, double work, const std::function<void(int64_t, Scratch&)>& run,
               int64_t small_count = 0);

}  // namespace adakernels
