#include "guards.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

// The allocator is no part of the stable interface.
#undef TORCH_TARGET_VERSION
#include <c10/core/CPUAllocator.h>

namespace emulation {

namespace {

// What memory of a GPU is aligned to, as far as the kernels can count on it. Ends are exact up to that.
constexpr size_t kAlignment = 16;
// Read as a number it is NaN.
constexpr unsigned char kPoison = 0xff;

struct Buffer {
  unsigned char* pages;  // the first one may not be touched, nor the last
  size_t page_bytes;     // of all pages
  size_t bytes;
};

size_t page_size() { return size_t(sysconf(_SC_PAGESIZE)); }

// By where they begin. It is never destroyed, for the last tensors go after everything else.
std::mutex mutex;
std::map<const unsigned char*, Buffer>& buffers = *new std::map<const unsigned char*, Buffer>();
std::atomic<bool> enabled = false;

void release(void* start) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = buffers.find(static_cast<unsigned char*>(start));
  if (found == buffers.end()) return c10::GetDefaultCPUAllocator()->raw_deallocate(start);
  munmap(found->second.pages, found->second.page_bytes);
  buffers.erase(found);
}

// Each buffer ends where a page begins that may not be touched.
void* allocate(size_t bytes) {
  const size_t page = page_size(), inner = (bytes + kAlignment + page - 1) / page * page;
  void* pages = mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  auto* first = static_cast<unsigned char*>(pages);
  mprotect(first, page, PROT_NONE);
  mprotect(first + page + inner, page, PROT_NONE);
  std::memset(first + page, kPoison, inner);
  unsigned char* start = first + page + inner - (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::lock_guard<std::mutex> lock(mutex);
  buffers[start] = {first, inner + 2 * page, bytes};
  return start;
}

class GuardingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!enabled || bytes == 0) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* start = emulation::allocate(bytes);
    return {start, start, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

bool is_poisoned(const unsigned char* begin, const unsigned char* end) {
  for (; begin < end; ++begin)
    if (*begin != kPoison) return false;
  return true;
}

}  // namespace

void check_guards() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto& [start, buffer] : buffers) {
    unsigned char* inner = buffer.pages + page_size();
    unsigned char* end = buffer.pages + buffer.page_bytes - page_size();
    const bool before = !is_poisoned(inner, start), behind = !is_poisoned(start + buffer.bytes, end);
    if (!before && !behind) continue;
    std::memset(inner, kPoison, size_t(start - inner));
    std::memset(end - (end - start - buffer.bytes), kPoison, size_t(end - start) - buffer.bytes);
    std::ostringstream text;
    text << "emulation: a kernel wrote " << (before ? "before" : "behind") << " a buffer of " << buffer.bytes
         << " bytes";
    throw std::runtime_error(text.str());
  }
}

std::string describe(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  const std::lock_guard<std::mutex> lock(mutex);
  std::ostringstream text;
  for (const auto& [start, buffer] : buffers) {
    if (at < buffer.pages || at >= buffer.pages + buffer.page_bytes) continue;
    if (at < start)
      text << start - at << " bytes before a buffer of " << buffer.bytes << " bytes";
    else
      text << at - start - buffer.bytes << " bytes behind a buffer of " << buffer.bytes << " bytes";
    return text.str();
  }
  return "at an address that belongs to no buffer";
}

}  // namespace emulation

// From now on memory of tensors is guarded, or not any more.
extern "C" __attribute__((visibility("default"))) void guard_memory(bool guard) {
  // torch may ask it until the process has ended, so it is never destroyed.
  static auto* const allocator = new emulation::GuardingAllocator();
  static const bool set = (c10::SetCPUAllocator(allocator, 100), true);
  emulation::enabled = set && guard;
}
