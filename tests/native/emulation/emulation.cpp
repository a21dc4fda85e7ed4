#include "cuda_runtime.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "guards.h"

namespace emulation {

dim3 thread_index, block_index, block_size, grid_size;
unsigned char* shared;

namespace {

constexpr size_t kStackBytes = 256 << 10;

// A collective of some lanes of a warp. Values of the call before stay until all have come to the next one.
struct WarpMeeting {
  unsigned arrived = 0, round = 0;
  std::array<std::byte, 32 * kMeetingBytes> values[2];
};

// Actions that a thread has put off, those of its groups in their order and those of none yet.
struct Queue {
  std::deque<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
};

struct Block {
  unsigned threads, alive, started = 0;
  bool descending;
  unsigned at_barrier = 0, barrier_round = 0;
  std::map<std::pair<unsigned, unsigned>, WarpMeeting> meetings;  // by warp and mask
  std::map<unsigned, Queue> deferred[2];  // by thread
  std::set<unsigned> unfenced;            // threads
  std::exception_ptr error;
};

Block* block;
const std::function<void()>* kernel;
unsigned linear_thread;
bool warpgroups;
size_t shared_size;

void set_thread(unsigned thread) {
  linear_thread = thread;
  thread_index = {thread % block_size.x, thread / block_size.x % block_size.y, thread / block_size.x / block_size.y};
}

void release_barrier_if_complete() {
  if (block->at_barrier == 0 || block->at_barrier < block->alive) return;
  block->at_barrier = 0;
  ++block->barrier_round;
}

// A stack on which threads run, one after the other unless one waits.
class Fiber {
 public:
  Fiber() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    stack_ = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, page, PROT_NONE);
    getcontext(&context_);
    context_.uc_stack = {.ss_sp = static_cast<char*>(stack_) + page, .ss_flags = 0, .ss_size = kStackBytes};
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::main, 0);
  }
  ~Fiber() { munmap(stack_, kStackBytes + size_t(sysconf(_SC_PAGESIZE))); }
  Fiber(const Fiber&) = delete;

  // Runs until the thread on it waits, or until no thread is left to start.
  void resume() {
    running = this;
    set_thread(thread_);
    if (_setjmp(scheduler) == 0) {
      // Only the first switch goes through the system, which is slow.
      if (entered_) _longjmp(here_, 1);
      entered_ = true;
      setcontext(&context_);
    }
    running = nullptr;
  }

  bool overflows(const void* address) const {
    return address >= stack_ && address < static_cast<char*>(stack_) + sysconf(_SC_PAGESIZE);
  }

  void wait(const std::function<bool()>& ready) {
    ready_ = &ready;
    thread_ = linear_thread;
    leave();
  }

  bool waits() const { return ready_ != nullptr; }
  bool can_go_on() const { return (*ready_)(); }
  void go_on() {
    ready_ = nullptr;
    resume();
  }

  // Gives up the running thread, from a signal handler.
  [[noreturn]] static void abandon() { _longjmp(scheduler, 1); }

  static Fiber* running;  // null between threads

 private:
  static jmp_buf scheduler;

  void leave() {
    if (_setjmp(here_) == 0) _longjmp(scheduler, 1);
  }

  static void main() {
    for (;;) {
      while (block->started < block->threads && !block->error) {
        const unsigned index = block->started++;
        set_thread(block->descending ? block->threads - 1 - index : index);
        try {
          (*kernel)();
        } catch (...) {
          block->error = std::current_exception();
        }
        --block->alive;
        release_barrier_if_complete();
      }
      running->leave();
    }
  }

  void* stack_;
  ucontext_t context_;
  jmp_buf here_;
  bool entered_ = false;
  unsigned thread_ = 0;
  const std::function<bool()>* ready_ = nullptr;
};

Fiber* Fiber::running;
jmp_buf Fiber::scheduler;

void run_block(std::vector<std::unique_ptr<Fiber>>& fibers) {
  std::deque<Fiber*> idle, waiting;
  for (const auto& fiber : fibers) idle.push_back(fiber.get());
  while (!block->error && (block->started < block->threads || !waiting.empty())) {
    bool progress = false;
    while (block->started < block->threads && !block->error) {
      if (idle.empty()) {
        fibers.push_back(std::make_unique<Fiber>());
        idle.push_back(fibers.back().get());
      }
      Fiber* fiber = idle.front();
      fiber->resume();
      progress = true;
      if (fiber->waits()) {
        idle.pop_front();
        waiting.push_back(fiber);
      }
    }
    for (size_t left = waiting.size(); left > 0 && !block->error; --left) {
      Fiber* fiber = waiting.front();
      waiting.pop_front();
      if (fiber->can_go_on()) {
        progress = true;
        fiber->go_on();
      }
      (fiber->waits() ? waiting : idle).push_back(fiber);
    }
    if (!progress) {
      std::ostringstream text;
      text << "emulation: " << waiting.size() << " of " << block->threads << " threads of block " << block_index.x
           << " wait for ever";
      block->error = std::make_exception_ptr(std::runtime_error(text.str()));
    }
  }
  if (block->error) {
    // What is left on the stacks of waiting threads is given up.
    fibers.clear();
    std::rethrow_exception(block->error);
  }
}

// A bad access of a thread ends the launch with an error instead of the process. Others are left to who was asked
// before: those of another thread of the host, or of what runs between the threads.
class BadAccesses {
 public:
  BadAccesses() : stack_(kStackBytes) {
    thread = pthread_self();
    // Of its own, since a thread that overflows its stack has none for the handler.
    const stack_t stack = {.ss_sp = stack_.data(), .ss_flags = 0, .ss_size = stack_.size()};
    sigaltstack(&stack, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before);
  }
  ~BadAccesses() {
    sigaction(SIGSEGV, &before, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  BadAccesses(const BadAccesses&) = delete;

 private:
  static void handle(int, siginfo_t* info, void*) {
    if (!pthread_equal(thread, pthread_self()) || Fiber::running == nullptr) {
      sigaction(SIGSEGV, &before, nullptr);
      return;
    }
    std::ostringstream text;
    text << "emulation: ";
    if (Fiber::running->overflows(info->si_addr))
      text << "more than " << kStackBytes << " bytes of stack";
    else
      text << "bad access " << describe(info->si_addr);
    text << ", in thread " << thread_index.x << " of block " << block_index.x;
    block->error = std::make_exception_ptr(std::runtime_error(text.str()));
    Fiber::abandon();
  }

  std::vector<char> stack_;
  stack_t stack_before_;
  static pthread_t thread;
  static struct sigaction before;
};

pthread_t BadAccesses::thread;
struct sigaction BadAccesses::before;

// Shared memory of exactly the size asked for, full of NaN, and nothing accessible behind it.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), page_(size_t(sysconf(_SC_PAGESIZE))) {
    // Kernels may count on this alignment, so the end is only exact up to it.
    constexpr size_t alignment = 1024;
    mapped_ = (bytes + alignment - 1) / alignment * alignment;
    mapped_ = (mapped_ + page_ - 1) / page_ * page_;
    base_ = mmap(nullptr, mapped_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(static_cast<char*>(base_) + mapped_, page_, PROT_NONE);
    start_ = static_cast<unsigned char*>(base_) + (mapped_ - (bytes + alignment - 1) / alignment * alignment);
  }
  ~SharedMemory() { munmap(base_, mapped_ + page_); }
  SharedMemory(const SharedMemory&) = delete;
  unsigned char* poisoned() {
    std::memset(start_, 0xff, bytes_);
    return start_;
  }

 private:
  size_t bytes_, page_, mapped_;
  void* base_;
  unsigned char* start_;
};

}  // namespace

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& run) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  static std::vector<std::unique_ptr<Fiber>> fibers;
  if (size.x * size.y * size.z > 1024) throw std::runtime_error("emulation: a block of more than 1024 threads");
  if (shared_bytes > 227 << 10) throw std::runtime_error("emulation: a block with more than 227 KiB of shared memory");
  const char* arch = std::getenv("ADAKERNELS_EMULATED_ARCH");
  warpgroups = arch != nullptr && std::strcmp(arch, "90a") == 0;
  SharedMemory memory(shared_bytes);
  shared_size = shared_bytes;
  grid_size = grid;
  block_size = size;
  kernel = &run;
  const BadAccesses bad_accesses;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        shared = memory.poisoned();
        Block own;
        own.threads = own.alive = size.x * size.y * size.z;
        own.descending = (x + y + z) % 2 == 1;
        block = &own;
        run_block(fibers);
      }
  check_guards();
}

void wait_until(const std::function<bool()>& ready) {
  if (ready()) return;
  Fiber::running->wait(ready);
}

void defer(Deferred what, std::function<void()> action) {
  block->deferred[int(what)][linear_thread].open.push_back(std::move(action));
}

void commit_deferred(Deferred what) {
  Queue& mine = block->deferred[int(what)][linear_thread];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void run_deferred(Deferred what, size_t groups_left) {
  Queue& mine = block->deferred[int(what)][linear_thread];
  for (; mine.groups.size() > groups_left; mine.groups.pop_front())
    for (const auto& action : mine.groups.front()) action();
}

bool has_warpgroups() { return warpgroups; }

bool is_shared(const void* address) {
  return address >= shared && address < shared + shared_size;
}
void mark_writes() { block->unfenced.insert(linear_thread); }
void fence_writes() { block->unfenced.erase(linear_thread); }
bool all_writes_fenced() { return block->unfenced.empty(); }

void fail(const char* what) {
  std::ostringstream text;
  text << "emulation: " << what << ", in thread " << thread_index.x << " of block " << block_index.x;
  throw std::runtime_error(text.str());
}

unsigned lane() { return linear_thread % 32; }

const std::byte* meet(unsigned mask, const void* mine, size_t bytes) {
  if (!(mask >> lane() & 1)) fail("a lane calls a collective with a mask that leaves it out");
  WarpMeeting& meeting = block->meetings[{linear_thread / 32, mask}];
  if (meeting.arrived >> lane() & 1) fail("a lane comes twice to the same collective");
  const unsigned round = meeting.round;
  std::byte* values = meeting.values[round % 2].data();
  std::memcpy(values + lane() * kMeetingBytes, mine, bytes);
  meeting.arrived |= 1u << lane();
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    wait_until([&meeting, round] { return meeting.round != round; });
  }
  return values;
}

}  // namespace emulation

void __syncthreads() {
  using emulation::block;
  const unsigned round = block->barrier_round;
  ++block->at_barrier;
  emulation::release_barrier_if_complete();
  emulation::wait_until([round] { return emulation::block->barrier_round != round; });
}

void __syncwarp(unsigned mask) { emulation::meet(mask, "", 1); }
