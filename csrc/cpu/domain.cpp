#include "domain.h"

#include <algorithm>

namespace adakernels {

namespace {

int64_t floor_mod(int64_t a, int64_t b) { return ((a % b) + b) % b; }

}  // namespace

void lay_out_taps(Convolution& conv) {
  std::erase_if(conv.taps, [&](const Tap& tap) {
    const auto misses = [](int64_t offset, int64_t step, int64_t points, int64_t size) {
      return offset >= size || offset + (points - 1) * step < 0;
    };
    return misses(tap.dy, conv.step_y, conv.grid_height, conv.source.height) ||
           misses(tap.dx, conv.step_x, conv.grid_width, conv.source.width);
  });
  conv.phases.clear();
  conv.shift_y = conv.shift_x = 0;
  if (conv.taps.empty()) return;
  int64_t first_y = conv.taps[0].dy, first_x = conv.taps[0].dx;
  for (const Tap& tap : conv.taps) {
    first_y = std::min(first_y, tap.dy);
    first_x = std::min(first_x, tap.dx);
  }
  for (Tap& tap : conv.taps) {
    const int64_t dy = tap.dy - first_y, dx = tap.dx - first_x;
    const Phase phase = {first_y + floor_mod(dy, conv.step_y), first_x + floor_mod(dx, conv.step_x)};
    const auto same = [&](const Phase& other) { return other.dy == phase.dy && other.dx == phase.dx; };
    const auto found = std::find_if(conv.phases.begin(), conv.phases.end(), same);
    tap.phase = int32_t(found - conv.phases.begin());
    if (found == conv.phases.end()) conv.phases.push_back(phase);
    tap.shift_y = int32_t(dy / conv.step_y);
    tap.shift_x = int32_t(dx / conv.step_x);
    conv.shift_y = std::max<int64_t>(conv.shift_y, tap.shift_y);
    conv.shift_x = std::max<int64_t>(conv.shift_x, tap.shift_x);
  }
}

bool reads_in_place(const Convolution& conv) {
  const Planes& source = conv.source;
  return conv.taps.size() == 1 && conv.taps[0].dy == 0 && conv.taps[0].dx == 0 && conv.grid_height == 1 &&
         conv.grid_width == source.width && conv.step_x == 1 && source.column_stride == 1 &&
         source.scalar == Scalar::f32 && conv.all_live_here && source.extent <= INT32_MAX;
}

bool gathers_points(const Convolution& conv, const Unit& unit) {
  constexpr int64_t kShortRow = 16, kMostPoints = 256, kFewestRows = 16;
  const auto fits = [](int64_t offset, int64_t step, int64_t size, int64_t points) {
    return size - (offset < 0 ? floor_mod(offset, step) : offset) <= points * step;
  };
  return conv.taps.size() > 1 && conv.grid_width < kShortRow && conv.grid_height * conv.grid_width <= kMostPoints &&
         unit.row_count >= kFewestRows && std::ranges::all_of(conv.phases, [&](const Phase& phase) {
           return fits(phase.dy, conv.step_y, conv.source.height, conv.grid_height) &&
                  fits(phase.dx, conv.step_x, conv.source.width, conv.grid_width);
         });
}

int64_t live_span(const Convolution& conv, const Route* live, int64_t count) {
  return count == 0 ? 0 : live_number(conv, live[count - 1]) - live_number(conv, live[0]) + 1;
}

}  // namespace adakernels
