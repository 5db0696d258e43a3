// Prefetching across tasks.
#pragma once

#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Memory that the next task will read. Kernels ask for a few lines of it every few dozen cycles, so that it arrives in
// the second-level cache while they compute: the processor's own prefetchers know nothing of a next task.
class Ahead {
 public:
  void add(const void* begin, int64_t bytes) {
    parts_[count_++] = {static_cast<const char*>(begin), ceil_div(bytes, kLine)};
  }

  struct Lines {
    const char* begin;
    int64_t step;
  };

  // The next `count` lines, or fewer.
  void ask(int64_t count) {
    const Lines lines = take(count);
    if (lines.step == 0) return;
    for (int64_t line = 0; line < count; ++line) __builtin_prefetch(lines.begin + line * kLine, 0, 2);
  }

  // For a loop that asks for one line at a time. What lies behind them may be asked for in vain.
  Lines take(int64_t count) {
    if (at_ == count_) return {reinterpret_cast<const char*>(this), 0};
    Part& part = parts_[at_];
    const Lines lines = {part.begin, kLine};
    part.begin += count * kLine;
    part.lines -= count;
    if (part.lines <= 0) ++at_;
    return lines;
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part {
    const char* begin;
    int64_t lines;
  };
  Part parts_[4];
  int count_ = 0, at_ = 0;
};

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
