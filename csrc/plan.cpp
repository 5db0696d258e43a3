#include "plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace kfac_fast {

Plan::Plan(std::vector<int32_t> sizes) : sizes_(std::move(sizes)), order_(sizes_.size()), offsets_(sizes_.size()) {
  for (size_t i = 0; i < sizes_.size(); ++i) {
    const int64_t n = sizes_[i];
    offsets_[i] = numel_;
    numel_ += (n * n + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
    max_size_ = std::max(max_size_, sizes_[i]);
  }
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [this](int32_t x, int32_t y) { return sizes_[x] > sizes_[y]; });
}

}  // namespace kfac_fast
