// Geometry of a batch of square blocks of different sizes that lie in one flat buffer.
// Made once per set of shapes and reused every step.
#pragma once

#include <cstdint>
#include <vector>

namespace kfac_fast {

// Every block starts at a multiple of this many elements: 64 bytes in f32, a cache line and the widest vector.
constexpr int64_t kBlockAlignment = 16;

class Plan {
 public:
  explicit Plan(std::vector<int32_t> sizes);

  int count() const { return static_cast<int>(sizes_.size()); }
  int32_t size(int block) const { return sizes_[block]; }
  int64_t offset(int block) const { return offsets_[block]; }  // in elements
  const std::vector<int64_t>& offsets() const { return offsets_; }
  int64_t numel() const { return numel_; }  // of the whole buffer, padding included
  int32_t max_size() const { return max_size_; }

  // Blocks by decreasing size, ties by index: longest processing time first keeps the threads evenly loaded.
  const std::vector<int32_t>& by_decreasing_size() const { return order_; }

 private:
  std::vector<int32_t> sizes_, order_;
  std::vector<int64_t> offsets_;
  int64_t numel_ = 0;
  int32_t max_size_ = 0;
};

}  // namespace kfac_fast
