#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

#include <torch/csrc/stable/ops.h>

#include "../common/cpu_features.h"

namespace adakernels {

namespace {

// Half of a second-level cache of 512 KiB; the weights stream through the other half.
constexpr int64_t kSourceBytes = 256 * 1024;
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kRowsPerTask = 32;
// Waking a thread costs a few microseconds.
constexpr double kParallelWork = 1e5;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A 1x1 convolution without gaps between rows is one long row.
bool is_flat(const Convolution& conv) {
  const auto gapless = [](const Planes& p) { return p.row_stride == p.width * p.column_stride; };
  return conv.taps.size() == 1 && conv.taps[0].dy == 0 && conv.taps[0].dx == 0 && conv.step_y == 1 &&
         conv.step_x == 1 && conv.target_step_y == 1 && conv.target_step_x == 1 && conv.grid_height > 1 &&
         conv.grid_height == conv.source.height && conv.grid_width == conv.source.width &&
         conv.grid_height == conv.target.height && conv.grid_width == conv.target.width && gapless(conv.source) &&
         gapless(conv.target);
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(int64_t bytes) {
  if (bytes > capacity_) {
    std::free(data_);
    capacity_ = ceil_div(bytes + bytes / 4, 64) * 64;
    data_ = std::aligned_alloc(64, size_t(capacity_));
    if (data_ == nullptr) {
      capacity_ = 0;
      throw std::bad_alloc();
    }
  }
  return data_;
}

const Kernels& best_kernels() {
#if defined(__x86_64__)
  switch (best_isa()) {
    case Isa::avx512:
      return avx512::kernels;
    case Isa::avx2:
      return avx2::kernels;
    case Isa::portable:
      break;
  }
#endif
  return portable::kernels;
}

void flatten_grid(Convolution& conv) {
  if (!is_flat(conv)) return;
  for (Planes* planes : {&conv.source, &conv.target}) {
    planes->width *= planes->height;
    planes->row_stride *= planes->height;
    planes->height = 1;
  }
  conv.grid_width *= conv.grid_height;
  conv.grid_height = 1;
}

void add_tasks(std::vector<Task>& tasks, const Convolution& conv, std::span<const Unit> units,
               const Kernels& kernels) {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const int64_t height = conv.grid_height, width = conv.grid_width;
  for (const Unit& unit : units) {
    if (unit.row_count == 0 || height == 0 || width == 0) continue;
    const int64_t pixel_bytes = 4 * std::max<int64_t>(1, unit.live_count * int64_t(conv.phases.size()));
    // Whole rows where they fit, else parts of one row.
    const int64_t row_bytes = pixel_bytes * (width + conv.shift_x);
    int64_t y_parts = 1, x_parts = 1;
    if (row_bytes * (1 + conv.shift_y) <= kSourceBytes) {
      y_parts = ceil_div(height, std::max<int64_t>(1, kSourceBytes / row_bytes - conv.shift_y));
    } else {
      y_parts = height;
      const int64_t fitting = kSourceBytes / (pixel_bytes * (1 + conv.shift_y)) - conv.shift_x;
      const int64_t block = kernels.pixel_block;
      x_parts = ceil_div(width, std::max(2 * block, fitting / block * block));
    }
    const int64_t wanted = ceil_div(kTasksPerThread * threads, int64_t(units.size()) * y_parts * x_parts);
    const int64_t row_parts = std::clamp<int64_t>(ceil_div(unit.row_count, kRowsPerTask), 1, wanted);
    for (int64_t y = 0; y < y_parts; ++y)
      for (int64_t x = 0; x < x_parts; ++x)
        for (int64_t r = 0; r < row_parts; ++r)
          tasks.push_back({&conv, &unit,
                           Tile{height * y / y_parts, height * (y + 1) / y_parts, width * x / x_parts,
                                width * (x + 1) / x_parts, unit.row_count * r / row_parts,
                                unit.row_count * (r + 1) / row_parts}});
  }
}

double work(const std::vector<Task>& tasks) {
  double sum = 0;
  for (const Task& task : tasks) {
    const Tile& tile = task.tile;
    sum += double(tile.y_end - tile.y_begin) * double(tile.x_end - tile.x_begin) *
           double(tile.row_end - tile.row_begin) *
           double(1 + task.unit->live_count * int64_t(task.convolution->taps.size()));
  }
  return sum;
}

void run_tasks(int64_t count, double work, const std::function<void(int64_t, Scratch&)>& run) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  const auto worker = [&](int64_t, int64_t) {
    static thread_local Scratch scratch;
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(i, scratch);
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
  };
  const int64_t threads = work < kParallelWork ? 1 : std::min(count, int64_t(torch::stable::get_num_threads()));
  if (threads == 1)
    worker(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, worker);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace adakernels
