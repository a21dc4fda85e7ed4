#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

#include <torch/csrc/stable/ops.h>

#include "../common/cpu_features.h"
#include "../common/layout.h"
#include "streams.h"

namespace adakernels {

namespace {

// Transformed blocks of a tile. They need not all stay close: the points of one sum are used up for all rows before
// those of the next are read, and splitting a map leaves vectors half empty.
constexpr int64_t kPointBytes = 1344 * 1024;
// Half of that for blocks of 4x4 where a second-level cache holds the transformed kernels, so that reading them again
// costs little. Blocks of stride 2 lose more in vectors left half empty.
constexpr int64_t kStayingKernels = 768 * 1024;
// Kernels transformed for blocks of 4x4 are four times the weights. In one call, larger ones would weigh more than the
// products that they save.
constexpr int64_t kLargestInCall = 6 << 20;
// Those that a layer keeps stay in memory.
constexpr int64_t kLargestKept = 12 << 20;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kRowsPerTask = 32;
// Of kernels transformed in a call that are held at once. Where there are more, rows of them take turns.
constexpr int64_t kHeldAtOnce = 12 << 20;
// Making a point of a transformed kernel takes as long as so many products, most of it for memory.
constexpr double kPointWork = 64;
// Smaller maps of stride 2 leave vectors of blocks half empty.
constexpr int64_t kWinogradPoints = 100;
constexpr size_t kUnitsPerTask = 64;
// A depthwise task lays its geometry out once for all of its planes.
constexpr int64_t kGroupsPerTask = 4, kGridRowsPerTask = 4;
constexpr int64_t kVectorsPerTask = 8, kDepthwisePoints = 512;
constexpr int64_t kSmallUnitRows = 4;
// Waking a thread costs a few microseconds.
constexpr double kParallelWork = 1e5;

// A 1x1 convolution without gaps between rows is one long row.
bool is_flat(const Convolution& conv) {
  const auto gapless = [](const Planes& p) { return p.row_stride == p.width * p.column_stride; };
  return conv.taps.size() == 1 && conv.taps[0].dy == 0 && conv.taps[0].dx == 0 && conv.step_y == 1 &&
         conv.step_x == 1 && conv.target_step_y == 1 && conv.target_step_x == 1 && conv.grid_height > 1 &&
         conv.grid_height == conv.source.height && conv.grid_width == conv.source.width &&
         conv.grid_height == conv.target.height && conv.grid_width == conv.target.width && gapless(conv.source) &&
         gapless(conv.target);
}

// In how many parts of whole rows of blocks, `least` or more, the fewest vectors stay half empty. A part costs a little
// itself: neighbours read the same rows, and the transformed kernels anew.
int64_t winograd_parts(int64_t least, int64_t block_rows, int64_t block_columns, int64_t lanes) {
  int64_t best = least;
  double least_cost = 0;
  for (int64_t parts = least; parts <= std::min(2 * least, block_rows); ++parts) {
    double cost = 0.25 * double(parts);  // in vectors
    for (int64_t p = 0; p < parts; ++p)
      cost += double(ceil_div((block_rows * (p + 1) / parts - block_rows * p / parts) * block_columns, lanes));
    if (parts == least || cost < least_cost) {
      best = parts;
      least_cost = cost;
    }
  }
  return best;
}

// A thread takes tasks one after the other, more or less. rows: of the source that a step of a tile's y stands for.
void hint_next(std::span<Task> tasks, const Convolution& conv, int64_t rows) {
  const auto start = [&](const Task& task) {
    return task.units->source_frame * conv.source.frame_stride + task.tile.y_begin * rows * conv.source.row_stride +
           task.tile.x_begin;
  };
  for (size_t i = 0; i + 1 < tasks.size(); ++i) tasks[i].tile.next = start(tasks[i + 1]) - start(tasks[i]);
}

void add_winograd_tasks(std::vector<Task>& tasks, const Convolution& conv, std::span<const Unit> units,
                        const Kernels& kernels, int64_t enough) {
  const int64_t block = conv.winograd.block;
  const int64_t block_rows = ceil_div(conv.grid_height, block), block_columns = ceil_div(conv.grid_width, block);
  const size_t begin = tasks.size();
  for (const Unit& unit : units) {
    const int64_t row_bytes = 4 * kernels.winograd_points_size(conv, unit, Tile{0, 1, 0, block_columns, 0, 0});
    const bool kernels_stay = block == 4 && unit.row_count * conv.winograd.row_stride * 4 <= kStayingKernels;
    const int64_t fitting = (kernels_stay ? kPointBytes / 2 : kPointBytes) / row_bytes;
    const int64_t least = ceil_div(block_rows, std::max<int64_t>(1, fitting));
    const int64_t parts = winograd_parts(least, block_rows, block_columns, kernels.lanes);
    const int64_t wanted = ceil_div(enough, int64_t(units.size()) * parts);
    const int64_t row_parts = std::clamp<int64_t>(ceil_div(unit.row_count, 2 * kRowsPerTask), 1, wanted);
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t r = 0; r < row_parts; ++r)
        tasks.push_back({&conv, &unit, 1,
                         Tile{block_rows * p / parts, block_rows * (p + 1) / parts, 0, block_columns,
                              unit.row_count * r / row_parts, unit.row_count * (r + 1) / row_parts}});
  }
  hint_next(std::span(tasks).subspan(begin), conv, block * conv.step_y);
}

// Rows of all frames one after the other, in whole vectors of planes; parts of planes only where those are too few.
void add_depthwise_tasks(std::vector<Task>& tasks, const Convolution& conv, std::span<const Unit> units,
                         int64_t lanes, int64_t enough) {
  int64_t row_count = 0;
  for (const Unit& unit : units) row_count += unit.row_count;
  const int64_t groups = ceil_div(row_count, lanes);
  const int64_t parts = std::min(ceil_div(groups, kGroupsPerTask), enough);
  if (parts == 0) return;
  const int64_t y_parts = std::clamp<int64_t>(enough / 2 / parts, 1, ceil_div(conv.grid_height, kGridRowsPerTask));
  const Unit* unit = units.data();
  const Unit* const units_end = unit + units.size();
  int64_t passed = 0;  // rows of the units before `unit`
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = groups * p / parts * lanes, end = std::min(groups * (p + 1) / parts * lanes, row_count);
    while (passed + unit->row_count <= begin) passed += unit++->row_count;
    for (int64_t y = 0; y < y_parts; ++y)
      tasks.push_back({&conv, unit, units_end - unit,
                       Tile{conv.grid_height * y / y_parts, conv.grid_height * (y + 1) / y_parts, 0, conv.grid_width,
                            begin - passed, end - passed}});
  }
}

// The same of channels-last planes, whose rows are vectors of channels, in parts of the map that fit into the cache.
void add_channels_last_tasks(std::vector<Task>& tasks, const Convolution& conv, std::span<const Unit> units,
                             int64_t lanes, int64_t enough) {
  const int64_t y_parts =
      std::clamp<int64_t>(ceil_div(conv.source.height * conv.source.width, kDepthwisePoints), 1, conv.grid_height);
  const int64_t vectors = int64_t(units.size()) * ceil_div(conv.channels * conv.rows_per_live, lanes);
  const int64_t parts =
      std::min(ceil_div(vectors, kVectorsPerTask), ceil_div(enough, y_parts));
  for (int64_t p = 0; p < parts; ++p)
    for (int64_t y = 0; y < y_parts; ++y)
      tasks.push_back({&conv, units.data(), int64_t(units.size()),
                       Tile{conv.grid_height * y / y_parts, conv.grid_height * (y + 1) / y_parts, 0, conv.grid_width,
                            vectors * p / parts * lanes, vectors * (p + 1) / parts * lanes}});
}

}  // namespace

Scratch::~Scratch() {
  for (void* data : data_) std::free(data);
}

void* Scratch::reserve(int64_t bytes, int arena) {
  if (bytes > capacity_[arena]) {
    std::free(data_[arena]);
    capacity_[arena] = ceil_div(bytes, 64) * 64;
    data_[arena] = std::aligned_alloc(64, size_t(capacity_[arena]));
    if (data_[arena] == nullptr) {
      capacity_[arena] = 0;
      throw std::bad_alloc();
    }
  }
  return data_[arena];
}

void Scratch::trim() {
  constexpr int64_t kKeptBytes = 64 << 20;
  for (int arena = 0; arena < kArenas; ++arena)
    if (capacity_[arena] > kKeptBytes) {
      std::free(data_[arena]);
      data_[arena] = nullptr;
      capacity_[arena] = 0;
    }
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

std::vector<int64_t> used_rows(std::span<const Unit> units, int64_t row_count) {
  std::vector<bool> used(size_t(row_count), false);
  for (const Unit& unit : units)
    for (int64_t r = 0; r < unit.row_count; ++r) used[size_t(unit.rows[r].channel)] = true;
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < row_count; ++r)
    if (used[size_t(r)]) rows.push_back(r);
  return rows;
}

namespace {

// How often each kernel of the rows that units write is used, on average.
double uses_of_kernels(std::span<const Unit> units, int64_t row_count, int64_t channel_count) {
  int64_t uses = 0;
  for (const Unit& unit : units) uses += unit.row_count * unit.live_count;
  return uses == 0 ? 0 : double(uses) / (double(used_rows(units, row_count).size()) * double(channel_count));
}

}  // namespace

bool suits_winograd(const Convolution& conv) {
  const int64_t step = conv.step_y;
  if (number_stride(conv) == 0) return false;
  if (conv.taps.size() != 9 || conv.step_x != step || (step != 1 && step != 2) || conv.shift_y != 2 / step ||
      conv.shift_x != 2 / step || conv.target_step_y != 1 || conv.target_step_x != 1)
    return false;
  // Nine taps may also be what is left of a larger kernel; then they do not lie the same distance apart.
  for (size_t i = 0; i < 9; ++i)
    if (conv.taps[i].weight != int32_t(i) * conv.taps[1].weight) return false;
  return true;
}

namespace {

int64_t block_count(const Convolution& conv, int64_t side) {
  return ceil_div(conv.grid_height, side) * ceil_div(conv.grid_width, side);
}

// The block that takes least, of a kernel that is used so often after it was transformed, at so many products a point.
int64_t cheapest_block(const Convolution& conv, double uses, double point_work, int64_t row_count,
                       int64_t channel_count, int64_t largest_bytes, const Kernels& kernels) {
  if (conv.step_y == 2) return conv.grid_height * conv.grid_width < kWinogradPoints ? 0 : 2;
  int64_t cheapest = 0;
  double least = uses * double(9 * conv.grid_height * conv.grid_width);
  for (const int64_t block : {2, 4}) {
    const int64_t points = (block + 2) * (block + 2), lanes = kernels.lanes;
    const int64_t products = points * ceil_div(block_count(conv, block), lanes) * lanes;
    const double work = uses * double(products) + point_work * double(points);
    const int64_t bytes = 4 * row_count * points * kernels.winograd_point_stride(channel_count);
    if (work >= least || (block == 4 && bytes > largest_bytes)) continue;
    cheapest = block;
    least = work;
  }
  return cheapest;
}

}  // namespace

int64_t winograd_block(const Convolution& conv, int64_t row_count, int64_t channel_count, const Kernels& kernels) {
  if (!suits_winograd(conv)) return 0;
  return cheapest_block(conv, 1, 0, row_count, channel_count, kLargestKept, kernels);
}

int64_t winograd_block(const Convolution& conv, std::span<const Unit> units, int64_t row_count, int64_t channel_count,
                       const Kernels& kernels) {
  if (!suits_winograd(conv)) return 0;
  const double uses = uses_of_kernels(units, row_count, channel_count);
  return cheapest_block(conv, uses, kPointWork, row_count, channel_count, kLargestInCall, kernels);
}

int64_t transformed_row(const Convolution& conv, int64_t channel_count, const Kernels& kernels) {
  const int64_t side = conv.winograd.block + 2;
  return side * side * kernels.winograd_point_stride(channel_count);
}

int64_t kernel_parts(const Convolution& conv, int64_t row_count, int64_t channel_count, const Kernels& kernels) {
  if (conv.winograd.block == 0) return 1;
  return std::max<int64_t>(1, ceil_div(4 * row_count * transformed_row(conv, channel_count, kernels), kHeldAtOnce));
}

namespace {

bool can_use_depthwise(const Convolution& conv, int64_t source_pixel, int64_t target_pixel) {
  const auto gapless = [](const Planes& p, int64_t pixel) {
    return p.scalar == Scalar::f32 && p.column_stride == pixel && p.row_stride == p.width * pixel;
  };
  return gapless(conv.source, source_pixel) && gapless(conv.target, target_pixel) && conv.target_step_y == 1 &&
         conv.target_step_x == 1 && conv.all_live_here && !conv.taps.empty();
}

}  // namespace

bool can_use_depthwise_planes(const Convolution& conv) { return can_use_depthwise(conv, 1, 1); }

bool can_use_depthwise_channels(const Convolution& conv, int64_t source_channels, int64_t target_channels) {
  return conv.source.channel_stride == 1 && conv.target.channel_stride == 1 &&
         can_use_depthwise(conv, source_channels, target_channels);
}

void transform_weights(Convolution& conv, std::span<const int64_t> rows, int64_t row_begin, int64_t channel_count,
                       const Kernels& kernels, float* transformed) {
  const int64_t point_stride = kernels.winograd_point_stride(channel_count);
  const int64_t row_stride = transformed_row(conv, channel_count, kernels);
  conv.winograd = {transformed, row_begin, row_stride, point_stride, conv.winograd.block};
  constexpr int64_t chunk = 8;
  const int64_t count = ceil_div(int64_t(rows.size()), chunk);
  run_tasks(count, double(row_stride) * double(rows.size()), [&](int64_t i, Scratch&) {
    for (int64_t r = i * chunk; r < std::min((i + 1) * chunk, int64_t(rows.size())); ++r)
      kernels.winograd_weights(conv, rows[size_t(r)], channel_count,
                               transformed + (rows[size_t(r)] - row_begin) * row_stride, point_stride);
  });
}

int64_t enough_tasks() { return kTasksPerThread * int64_t(torch::stable::get_num_threads()); }

void add_tasks(std::vector<Task>& tasks, const Convolution& conv, std::span<const Unit> units, const Kernels& kernels,
               int64_t enough) {
  const int64_t height = conv.grid_height, width = conv.grid_width, block = kernels.pixel_block;
  if (height == 0 || width == 0) return;
  if (conv.winograd.block > 0) {
    add_winograd_tasks(tasks, conv, units, kernels, enough);
    return;
  }
  if (conv.rows_per_live > 0) {
    (conv.channels > 0 ? add_channels_last_tasks : add_depthwise_tasks)(tasks, conv, units, kernels.lanes, enough);
    return;
  }
  const size_t begin = tasks.size();
  for (size_t u = 0; u < units.size();) {
    const Unit& unit = units[u];
    // Whole maps where their points are gathered, whole rows where they fit, else parts of one row.
    const int64_t pixel_bytes = 4 * std::max<int64_t>(1, unit.live_count * int64_t(conv.phases.size()));
    const int64_t row_bytes = pixel_bytes * (width + conv.shift_x);
    int64_t y_parts = 1, x_block = width;
    if (gathers_points(conv, unit)) {
      // The reduction is split, not the map.
    } else if (reads_in_place(conv)) {
      // One long row is read block by block, by one thread as far as that leaves enough tasks.
      const int64_t parts = ceil_div(enough, int64_t(units.size()));
      x_block = ceil_div(ceil_div(width, parts), block) * block;
    } else if (row_bytes * (1 + conv.shift_y) <= kSourceBytes) {
      y_parts = ceil_div(height, std::max<int64_t>(1, kSourceBytes / row_bytes - conv.shift_y));
    } else {
      y_parts = height;
      const int64_t fitting = kSourceBytes / (pixel_bytes * (1 + conv.shift_y)) - conv.shift_x;
      x_block = std::max<int64_t>(2, fitting / block) * block;
    }
    // A last part of less than a register tile joins the one before.
    const int64_t x_parts = std::max<int64_t>(1, (width + x_block - block) / x_block);
    // Small units of a frame go together: their geometry is the same.
    size_t end = u + 1;
    int64_t row_count = unit.row_count;
    for (; row_count <= kSmallUnitRows && end < units.size() && units[end].frame == unit.frame &&
           end - u < kUnitsPerTask;
         ++end)
      row_count = std::max(row_count, units[end].row_count);
    const int64_t wanted = ceil_div(enough, int64_t(units.size()) * y_parts * x_parts);
    const int64_t row_parts = std::clamp<int64_t>(ceil_div(row_count, kRowsPerTask), 1, wanted);
    for (int64_t y = 0; y < y_parts; ++y)
      for (int64_t x = 0; x < x_parts; ++x)
        for (int64_t r = 0; r < row_parts; ++r)
          tasks.push_back({&conv, &unit, int64_t(end - u),
                           Tile{height * y / y_parts, height * (y + 1) / y_parts, x * x_block,
                                x + 1 == x_parts ? width : (x + 1) * x_block, row_count * r / row_parts,
                                row_count * (r + 1) / row_parts}});
    u = end;
  }
  hint_next(std::span(tasks).subspan(begin), conv, conv.step_y);
}

double work(const std::vector<Task>& tasks) {
  double sum = 0;
  for (const Task& task : tasks) {
    const Tile& tile = task.tile;
    const Convolution& conv = *task.convolution;
    const int64_t taps = int64_t(conv.taps.size());
    const int64_t products = conv.rows_per_live > 0 ? 1 + taps * conv.times
                                                    : task.unit_count * (1 + task.units->live_count * taps);
    sum += double(tile.y_end - tile.y_begin) * double(tile.x_end - tile.x_begin) *
           double(tile.row_end - tile.row_begin) * double(products);
  }
  return sum;
}

void run_task(const Task& task, const Kernels& kernels, Scratch& scratch) {
  if (task.convolution->winograd.block > 0)
    kernels.convolve_winograd(*task.convolution, *task.units, task.tile, scratch);
  else if (task.convolution->rows_per_live > 0)
    kernels.convolve_depthwise(*task.convolution, task.units, task.unit_count, task.tile, scratch);
  else
    kernels.convolve_direct(*task.convolution, task.units, task.unit_count, task.tile, scratch);
}

void run_tasks(int64_t count, double work, const std::function<void(int64_t, Scratch&)>& run, int64_t small_count) {
  if (count == 0) return;
  const int64_t threads = work < kParallelWork ? 1 : std::min(count, int64_t(torch::stable::get_num_threads()));
  // Of either kind each thread begins with a part of its own, the same one in every call, since its cache may still
  // hold what the tasks of that part read and write; then it helps the others.
  const int64_t kinds[] = {0, count - small_count, count};
  const auto part_begin = [&](int kind, int64_t part) {
    return kinds[kind] + (kinds[kind + 1] - kinds[kind]) * part / threads;
  };
  const auto next = std::make_unique<std::atomic<int64_t>[]>(size_t(2 * threads));
  for (int kind = 0; kind < 2; ++kind)
    for (int64_t t = 0; t < threads; ++t) next[size_t(kind * threads + t)] = part_begin(kind, t);
  std::exception_ptr failure;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  const auto worker = [&](int64_t first, int64_t) {
    static thread_local Scratch scratch;
    try {
      for (int kind = 0; kind < 2; ++kind)
        for (int64_t t = 0; t < threads; ++t) {
          const int64_t part = (first + t) % threads, end = part_begin(kind, part + 1);
          std::atomic<int64_t>& task = next[size_t(kind * threads + part)];
          for (int64_t i; (i = task.fetch_add(1, std::memory_order_relaxed)) < end;) run(i, scratch);
        }
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
    finish_streams();
    scratch.trim();
  };
  if (threads == 1)
    worker(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, worker);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace adakernels
