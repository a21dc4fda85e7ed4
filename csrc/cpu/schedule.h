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

// The side of the blocks of outputs that Winograd's method makes: 4 where they fill a register tile and the transformed
// kernels are not too large, else 2. 0 unless the taps make an undilated 3x3 kernel, at stride 1 one that the units use
// so often that transforming it pays, at stride 2 on maps that are large enough to fill vectors.
int64_t winograd_block(const Convolution& convolution, std::span<const Unit> units, int64_t row_count,
                       int64_t channel_count, const Kernels& kernels);

// Whether the depthwise kernel reads and writes these planes: both planar, or both channels-last with so many channels.
bool can_use_depthwise_planes(const Convolution& convolution);
bool can_use_depthwise_channels(const Convolution& convolution, int64_t source_channels, int64_t target_channels);

// In how many parts of its rows a convolution of chosen blocks is to be computed, so that those transformed at once do
// not take much memory: the source is transformed anew for each.
int64_t kernel_parts(const Convolution& convolution, int64_t row_count, int64_t channel_count, const Kernels& kernels);

// Transforms the 3x3 kernels of the rows [row_begin, row_end) that units name into `scratch`, for the blocks chosen,
// and has `convolution` use them.
void transform_weights(Convolution& convolution, std::span<const Unit> units, int64_t row_begin, int64_t row_end,
                       int64_t channel_count, const Kernels& kernels, Scratch& scratch);

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
