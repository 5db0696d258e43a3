// Which tasks all threads do together, where a task may also be one thread's alone.
#pragma once

#include <algorithm>
#include <limits>

#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// How many of the leading tasks: as many as make the whole take least. Done together, a task takes a thread's share of
// its work and cost(work), what one thread does while others wait, and barriers. The other tasks take as long as the
// largest of them, as two that must share a thread, or as a thread's share of them all.
//
// work(x): of task x, in decreasing order; 0 from some x on. total(): of all tasks, those whose work is given as 0 too.
template <typename Total, typename Work, typename Cost>
int team_tasks(int threads, Total&& total, Work&& work, Cost&& cost) {
  const double largest = work(0);
  if (largest / threads + cost(largest) >= largest) return 0;  // without a look at what may be many small ones
  int best = 0;
  double together = 0, rest = total(), least = std::numeric_limits<double>::infinity();
  for (int x = 0;; ++x) {
    const double time = together + std::max({work(x), work(x + threads - 1) + work(x + threads), rest / threads});
    if (time < least) {
      least = time;
      best = x;
    }
    const double alone = work(x), shared = alone / threads + cost(alone);
    if (shared >= alone) return best;
    together += shared;
    rest -= alone;
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
