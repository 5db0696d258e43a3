// The scheduler of the SIMT shim and the part of the CUDA runtime that the kernels' launchers call.
#include "simt.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
#ifdef SIMT_ASAN
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Thread {
  Fiber fiber;
  uint3 index;
  enum State : uint8_t { runnable, in_warp_op, in_barrier, exited } state;
  WarpOp warp_op;
  BlockOp block_op;
  bool predicate;
  int source;
  unsigned mask;
  uint64_t value, result;
  void (*call)(void* const*);
  void* argument;
  Site site;
};

struct Warp {
  unsigned runnable = 0, exited = 0;
};

// Stacks are kept for the life of the host thread. A guard page below each turns an overflow into a fault.
class Stacks {
 public:
  ~Stacks() {
    if (base_ != nullptr) munmap(base_, bytes_);
  }
  char* get(unsigned thread) {
    const size_t page = sysconf(_SC_PAGESIZE), step = kStackBytes + page;
    if (base_ == nullptr) {
      bytes_ = kMaxThreads * step;
      void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) return nullptr;
      base_ = static_cast<char*>(memory);
      for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(base_ + i * step, page, PROT_NONE);
    }
    return base_ + thread * step + page;
  }

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

struct Machine {
  int schedule = kSimtInOrder;
  std::minstd_rand random;
  uint64_t launches = 0;
  std::string error;

  Stacks stacks;
  Fiber host;
  std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
  std::vector<Warp> warps = std::vector<Warp>(kMaxThreads / kWarpSize);
  unsigned count = 0, waiting = 0, exited = 0;  // threads of the running block
  unsigned runnable_warps = 0, current = 0, last_warp = 0;
  const std::function<void()>* body = nullptr;
  struct AlignedDelete {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(256)); }
  };
  std::unique_ptr<unsigned char[], AlignedDelete> shared;

  unsigned pick(unsigned set) {
    if (schedule == kSimtInOrder) return __builtin_ctz(set);
    if (schedule == kSimtReverse) return 31 - __builtin_clz(set);
    for (unsigned skip = random() % __builtin_popcount(set); skip > 0; --skip) set &= set - 1;
    return __builtin_ctz(set);
  }

  void make_runnable(unsigned thread) {
    threads[thread].state = Thread::runnable;
    warps[thread / kWarpSize].runnable |= 1u << thread % kWarpSize;
    runnable_warps |= 1u << thread / kWarpSize;
  }

  // The next thread to run, or null when the block has ended or can't go on. A warp runs on for a while before another
  // one gets its turn, so that warps drift far apart between barriers.
  Thread* next() {
    if (runnable_warps == 0) return nullptr;
    const bool stay = (runnable_warps >> last_warp & 1u) && (schedule != kSimtRandom || random() % 16 != 0);
    const unsigned warp = stay ? last_warp : pick(runnable_warps);
    const unsigned lane = pick(warps[warp].runnable);
    last_warp = warp;
    current = warp * kWarpSize + lane;
    return &threads[current];
  }

  void resume(Fiber& from, bool from_is_done) {
    Thread* thread = error.empty() ? next() : nullptr;
    if (thread == nullptr) return fiber_switch(from, host, from_is_done);
    threadIdx = thread->index;
    if (&thread->fiber != &from) fiber_switch(from, thread->fiber, from_is_done);
  }

  void stop_current(Thread::State state) {
    Warp& warp = warps[current / kWarpSize];
    threads[current].state = state;
    warp.runnable &= ~(1u << current % kWarpSize);
    if (warp.runnable == 0) runnable_warps &= ~(1u << current / kWarpSize);
  }

  void fail(const std::string& what, const Site& site) {
    if (!error.empty()) return;
    error = "SIMT shim: " + what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current);
    if (site.file != nullptr) error += std::string(", ") + site.file + ":" + std::to_string(site.line);
    error += ")";
  }

  void run_block(unsigned threads_in_block);
  void explain_deadlock();
};

thread_local Machine machine;

std::atomic<int> device_shared_bytes{232448}, device_multiprocessors{132}, device_capability{90};

void thread_main() {
  fiber_started();
  (*machine.body)();
  Machine& m = machine;
  m.stop_current(Thread::exited);
  m.warps[m.current / kWarpSize].exited |= 1u << m.current % kWarpSize;
  m.exited += 1;
  m.resume(m.threads[m.current].fiber, true);
}

void Machine::run_block(unsigned threads_in_block) {
  count = threads_in_block;
  waiting = exited = runnable_warps = last_warp = 0;
  host = Fiber();
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.fiber.stack = stacks.get(i);
    thread.fiber.stack_bytes = kStackBytes;
    fiber_prepare(thread.fiber, thread_main);
    if (i % kWarpSize == 0) warps[i / kWarpSize] = Warp();
    make_runnable(i);
  }
  resume(host, false);
  if (error.empty() && exited < count) explain_deadlock();
}

void Machine::explain_deadlock() {
  for (current = 0; current < count; ++current) {
    const Thread& thread = threads[current];
    if (thread.state == Thread::in_warp_op) {
      return fail("a warp operation waits for lanes of its mask that never call it", thread.site);
    }
  }
  for (current = 0; current < count; ++current) {
    if (threads[current].state == Thread::in_barrier) {
      return fail("a barrier waits for threads that have exited", threads[current].site);
    }
  }
}

}  // namespace

Device device = {};

int lane() { return static_cast<int>(machine.current % kWarpSize); }

void* dynamic_shared_memory() { return machine.shared.get(); }

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  Machine& m = machine;
  const unsigned self = m.current, first = self / kWarpSize * kWarpSize;
  Thread& thread = m.threads[self];
  thread.warp_op = op;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.site = site;
  if (!(mask >> lane() & 1u)) m.fail("a lane is missing from its own mask", site);
  if (op == WarpOp::shuffle && !(mask >> source & 1u)) m.fail("a shuffle reads a lane outside of its mask", site);
  m.stop_current(Thread::in_warp_op);

  bool complete = true;
  for (unsigned rest = mask; rest != 0 && complete; rest &= rest - 1) {
    const unsigned other = first + __builtin_ctz(rest);
    if (other >= m.count) {
      m.fail("a mask names lanes that do not exist", site);
      complete = false;
      break;
    }
    const Thread& peer = m.threads[other];
    complete = peer.state == Thread::in_warp_op && peer.warp_op == op && peer.mask == mask;
  }
  if (complete && op == WarpOp::call) {
    void* arguments[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) arguments[i] = m.threads[first + i].argument;
    thread.call(arguments);
  }
  if (complete) {
    uint64_t ballot = 0;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      const unsigned other = __builtin_ctz(rest);
      ballot |= static_cast<uint64_t>(m.threads[first + other].value != 0) << other;
    }
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      Thread& peer = m.threads[first + __builtin_ctz(rest)];
      peer.result = op == WarpOp::shuffle ? m.threads[first + peer.source].value : ballot;
      m.make_runnable(first + __builtin_ctz(rest));
    }
  }
  m.resume(thread.fiber, false);
  return thread.result;
}

void warp_call(void (*f)(void* const*), void* argument, Site site) {
  machine.threads[machine.current].call = f;
  machine.threads[machine.current].argument = argument;
  warp_collective(WarpOp::call, ~0u, 0, 0, site);
}

unsigned block_collective(BlockOp op, bool predicate, Site site) {
  Machine& m = machine;
  Thread& thread = m.threads[m.current];
  thread.block_op = op;
  thread.predicate = predicate;
  thread.site = site;
  m.stop_current(Thread::in_barrier);
  if (++m.waiting == m.count) {
    unsigned total = 0;
    for (unsigned i = 0; i < m.count; ++i) {
      const Thread& leader = m.threads[i / kWarpSize * kWarpSize];
      if (m.threads[i].site.line != leader.site.line || m.threads[i].site.file != leader.site.file) {
        m.fail("lanes of one warp wait at different barriers", m.threads[i].site);
      }
      if (m.threads[i].block_op != op) m.fail("threads of one block wait at different kinds of barrier", site);
      total += m.threads[i].predicate;
    }
    for (unsigned i = 0; i < m.count; ++i) {
      m.threads[i].result = op == BlockOp::any ? total > 0 : total;
      m.make_runnable(i);
    }
    m.waiting = 0;
  }
  m.resume(thread.fiber, false);
  return static_cast<unsigned>(thread.result);
}

int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine;
  const unsigned threads = block.x * block.y * block.z;
  m.launches += 1;
  if (threads == 0 || threads > kMaxThreads || m.stacks.get(0) == nullptr ||
      shared_bytes > static_cast<size_t>(device_shared_bytes)) {
    return cudaErrorInvalidConfiguration;
  }
  m.error.clear();
  m.body = &body;
  m.shared.reset(new (std::align_val_t(256)) unsigned char[shared_bytes + 1]);
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(m.schedule == kSimtRandom ? blocks : 0);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (uint64_t i = 0; i < blocks && m.error.empty(); ++i) {
    const uint64_t index = m.schedule == kSimtRandom ? order[i] : m.schedule == kSimtReverse ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    std::memset(m.shared.get(), 0xff, shared_bytes);  // NaN in every floating-point type, -1 in every integer type
    m.run_block(threads);
  }
  return m.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = simt::device_multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = simt::device_capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = simt::device_capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = simt::device_shared_bytes;
      break;
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorInvalidConfiguration) return "SIMT shim: invalid launch configuration";
  return simt::machine.error.c_str();
}

void simt_set_schedule(int kind, uint64_t seed) {
  simt::machine.schedule = kind;
  simt::machine.random.seed(static_cast<unsigned>(seed ^ seed >> 32) + 1);
}

void simt_set_device(int shared_bytes_per_block, int multiprocessors, int compute_capability) {
  simt::device_shared_bytes = shared_bytes_per_block;
  simt::device_multiprocessors = multiprocessors;
  simt::device_capability = compute_capability;
}

uint64_t simt_launch_count() { return simt::machine.launches; }
