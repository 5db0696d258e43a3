// The inverses of kLanes small matrices at once, one matrix per vector lane: the sweep of blocked_inverse.h with every
// scalar a vector, so that even pivots run at full width. Smaller matrices of the group are bordered with identity.
#pragma once

#include "pivot.h"
#include "support.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Pivots per step: two rows of W in registers beside the accumulators and the other operand, in a file of 32 or of 16.
constexpr int kInterleavedDepth = KFAC_FAST_VECTOR_BYTES == 64 ? 8 : 4;

template <typename T>
struct InterleavedGroup {
  int64_t n = 0;         // the largest size
  int64_t smallest = 0;  // 0 unless every lane has a matrix
  int count = 0;         // matrices, the other lanes are identities
  const T* blocks[kLanes<T>];
  T* inverses[kLanes<T>];  // null: not wanted
  int64_t sizes[kLanes<T>];
  T damping[kLanes<T>];
  typename LaneIndex<T>::Vector info;

  // All lanes of one size: each matrix is read and written as one run of vectors. The last one may read past the
  // matrix, but not past the kBlockAlignment that it ends in.
  bool uniform() const { return smallest == n; }
};
static_assert(kBlockAlignment % kLanes<float> == 0 && kBlockAlignment % kLanes<double> == 0,
              "blocks end with a vector");

template <typename T>
struct InterleavedScratch {
  Vec<T>* matrix;  // [n (n + 1) / 2] rows of the lower triangle, and room behind them
  Vec<T>* w;       // [n, kInterleavedDepth]

  // A vector that overhangs the end of a matrix has up to kLanes - 1 entries of rows that there are not: a row each if
  // n = 1, which takes the most room.
  static InterleavedScratch take(Arena& arena, int64_t n) {
    constexpr int64_t kRoom = kLanes<T> * (kLanes<T> + 1) / 2;
    InterleavedScratch scratch;
    scratch.matrix = arena.take<Vec<T>>(n * (n + 1) / 2 + kRoom);
    scratch.w = arena.take<Vec<T>>(n * kInterleavedDepth);
    return scratch;
  }
};

inline int64_t triangle(int64_t i) { return i * (i + 1) / 2; }

// The vectors (i, j .. j + kLanes) of all matrices, j + kLanes <= i + 1 or so: entries above the diagonal are not used.
template <typename T>
inline void load_tile(const InterleavedGroup<T>& group, int64_t i, int64_t j, Vec<T> (&tile)[kLanes<T>]) {
  constexpr int64_t kWidth = kLanes<T>;
  if (i < group.smallest && j + kWidth <= group.smallest) {
    for (int lane = 0; lane < kLanes<T>; ++lane) tile[lane] = load(group.blocks[lane] + i * group.sizes[lane] + j);
    return transpose<T>(tile);
  }
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    tile[lane] = Vec<T>{};
    if (lane >= group.count || i >= group.sizes[lane]) {
      for (int64_t c = 0; c < kWidth; ++c) tile[lane][c] = T(i == j + c);
      continue;
    }
    const int64_t n = group.sizes[lane];
    const T* row = group.blocks[lane] + i * n + j;
    if (j + kWidth <= n) {
      tile[lane] = load(row);
    } else {
      for (int64_t c = 0; j + c <= i; ++c) tile[lane][c] = row[c];
    }
  }
  transpose<T>(tile);
}

// A place in a matrix, and the one behind it in memory.
struct Entry {
  int64_t i = 0, j = 0;

  void advance(int64_t n) {
    if (++j == n) j = 0, ++i;
  }
};

template <typename T>
inline void load_uniform(const InterleavedGroup<T>& group, Vec<T>* a) {
  const int64_t n = group.n;
  Entry entry;
  for (int64_t begin = 0; begin < n * n; begin += kLanes<T>) {
    Vec<T> tile[kLanes<T>];
    KFAC_FAST_UNROLL
    for (int lane = 0; lane < kLanes<T>; ++lane) tile[lane] = load(group.blocks[lane] + begin);
    transpose<T>(tile);
    // Entries above the diagonal, and those past the end, land in the room behind the triangle.
    KFAC_FAST_UNROLL
    for (int c = 0; c < kLanes<T>; ++c) {
      a[entry.j <= entry.i ? triangle(entry.i) + entry.j : triangle(n)] = tile[c];
      entry.advance(n);
    }
  }
}

template <typename T>
inline void store_uniform(const InterleavedGroup<T>& group, const Vec<T>* a) {
  const int64_t n = group.n;
  Entry entry;
  for (int64_t begin = 0; begin < n * n; begin += kLanes<T>) {
    Vec<T> tile[kLanes<T>];
    KFAC_FAST_UNROLL
    for (int c = 0; c < kLanes<T>; ++c) {
      const int64_t i = max(entry.i, entry.j), j = min(entry.i, entry.j);
      tile[c] = -a[i < n ? triangle(i) + j : 0];  // anything, past the end
      entry.advance(n);
    }
    transpose<T>(tile);
    if (begin + kLanes<T> <= n * n) {
      KFAC_FAST_UNROLL
      for (int lane = 0; lane < kLanes<T>; ++lane) store(group.inverses[lane] + begin, tile[lane]);
    } else {  // what stands behind the matrix stays as it was
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        for (int64_t c = 0; begin + c < n * n; ++c) group.inverses[lane][begin + c] = tile[lane][c];
      }
    }
  }
}

template <typename T>
inline void load_group(const InterleavedGroup<T>& group, Vec<T>* a) {
  Vec<T> damping = {};
  for (int lane = 0; lane < group.count; ++lane) damping[lane] = group.damping[lane];
  if (group.uniform()) {
    load_uniform(group, a);
    for (int64_t i = 0; i < group.n; ++i) a[triangle(i) + i] += damping;
    return;
  }
  for (int64_t i = 0; i < group.n; ++i) {
    Vec<T>* row = a + triangle(i);
    for (int64_t j = 0; j <= i; j += kLanes<T>) {
      Vec<T> tile[kLanes<T>];
      load_tile(group, i, j, tile);
      for (int c = 0; c < kLanes<T>; ++c)
        row[j + c] = tile[c];  // what overhangs belongs to the next row, still to come
    }
    row[i] += damping;
  }
}

// The vectors -(i, j .. j + kLanes), from either side of the diagonal; past column n, anything.
template <typename T>
inline __attribute__((always_inline)) void load_entries(const Vec<T>* a, int64_t n, int64_t i, int64_t j,
                                                        Vec<T> (&tile)[kLanes<T>]) {
  constexpr int64_t kWidth = kLanes<T>;
  if (j + kWidth <= i + 1) {
    for (int64_t c = 0; c < kWidth; ++c) tile[c] = -a[triangle(i) + j + c];
  } else if (j >= i && j + kWidth <= n) {
    for (int64_t c = 0; c < kWidth; ++c) tile[c] = -a[triangle(j) + c * j + triangle(c) + i];
  } else {
    for (int64_t c = 0; c < kWidth; ++c) {
      const int64_t column = min(j + c, n - 1);
      tile[c] = -a[column <= i ? triangle(i) + column : triangle(column) + i];
    }
  }
}

// Writes both triangles of the negative of `a`, for the lanes that are wanted and did not fail.
template <typename T>
inline void store_group(const InterleavedGroup<T>& group, const Vec<T>* a) {
  constexpr int64_t kWidth = kLanes<T>;
  bool all_wanted = true;
  for (int lane = 0; lane < group.count; ++lane) {
    all_wanted = all_wanted && group.inverses[lane] != nullptr && group.info[lane] == 0;
  }
  if (all_wanted && group.uniform()) return store_uniform(group, a);
  const int64_t whole = all_wanted ? group.smallest : 0;
  for (int64_t i = 0; i < group.n; ++i) {
    for (int64_t j = 0; j < group.n; j += kWidth) {
      Vec<T> tile[kLanes<T>];
      load_entries<T>(a, group.n, i, j, tile);
      transpose<T>(tile);
      if (i < whole && j + kWidth <= whole) {
        for (int lane = 0; lane < kLanes<T>; ++lane)
          store(group.inverses[lane] + i * group.sizes[lane] + j, tile[lane]);
        continue;
      }
      for (int lane = 0; lane < group.count; ++lane) {
        const int64_t n = group.sizes[lane];
        if (group.inverses[lane] == nullptr || group.info[lane] != 0 || i >= n || j >= n) continue;
        T* out = group.inverses[lane] + i * n + j;
        if (j + kWidth <= n) {
          store(out, tile[lane]);
        } else {
          for (int64_t c = 0; c < n - j; ++c) out[c] = tile[lane][c];
        }
      }
    }
  }
}

template <typename T>
inline Vec<T> reciprocal_root(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = T(1) / square_root(lanes[lane]);
  return load(lanes);
}

// Pivots [k0, k0 + kDepth): see blocked_inverse.h for the step.
template <typename T, int kDepth>
inline void interleaved_step(int64_t n, int64_t k0, Vec<T>* a, Vec<T>* w, InterleavedGroup<T>& group) {
  // inverse <- L^-1 of the pivot block.
  Vec<T> l[kDepth][kDepth], inverse[kDepth][kDepth];
  KFAC_FAST_UNROLL
  for (int i = 0; i < kDepth; ++i) {
    KFAC_FAST_UNROLL
    for (int j = 0; j <= i; ++j) {
      l[i][j] = a[triangle(k0 + i) + k0 + j];
      a[triangle(k0 + i) + k0 + j] = Vec<T>{};
    }
  }
  KFAC_FAST_UNROLL
  for (int j = 0; j < kDepth; ++j) {
    Vec<T> pivot = l[j][j];
    KFAC_FAST_UNROLL
    for (int k = 0; k < j; ++k) pivot -= l[j][k] * l[j][k];
    const auto valid = (pivot > T(0)) & (pivot - pivot == T(0));
    pivot = valid ? pivot : Vec<T>{} + T(1);  // a failed lane goes on with numbers that are never looked at
    group.info |= ~valid & (group.info == 0) & static_cast<typename LaneIndex<T>::Scalar>(k0 + j + 1);
    inverse[j][j] = reciprocal_root<T>(pivot);
    KFAC_FAST_UNROLL
    for (int i = j + 1; i < kDepth; ++i) {
      KFAC_FAST_UNROLL
      for (int k = 0; k < j; ++k) l[i][j] -= l[i][k] * l[j][k];
      l[i][j] *= inverse[j][j];
    }
    KFAC_FAST_UNROLL
    for (int k = 0; k < j; ++k) {
      Vec<T> sum = l[j][k] * inverse[k][k];
      KFAC_FAST_UNROLL
      for (int x = k + 1; x < j; ++x) sum += l[j][x] * inverse[x][k];
      inverse[j][k] = -sum * inverse[j][j];
    }
  }

  // W = A_:K L^-T, with W_K = -L^-T, and A_:K <- 0.
  for (int64_t i = 0; i < n; ++i) {
    if (i >= k0 && i < k0 + kDepth) continue;
    Vec<T> column[kDepth];
    KFAC_FAST_UNROLL
    for (int x = 0; x < kDepth; ++x) {
      Vec<T>& entry = a[i < k0 ? triangle(k0 + x) + i : triangle(i) + k0 + x];
      column[x] = entry;
      entry = Vec<T>{};
    }
    KFAC_FAST_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      Vec<T> sum = inverse[k][0] * column[0];
      KFAC_FAST_UNROLL
      for (int x = 1; x <= k; ++x) sum += inverse[k][x] * column[x];
      w[i * kInterleavedDepth + k] = sum;
    }
  }
  KFAC_FAST_UNROLL
  for (int i = 0; i < kDepth; ++i) {
    KFAC_FAST_UNROLL
    for (int k = 0; k < kDepth; ++k) w[(k0 + i) * kInterleavedDepth + k] = i <= k ? -inverse[k][i] : Vec<T>{};
  }

  // A -= W W^T, two rows at a time.
  for (int64_t i = 0; i < n; i += 2) {
    const bool pair = i + 1 < n;
    Vec<T> first[kDepth], second[kDepth];
    KFAC_FAST_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      first[k] = w[i * kInterleavedDepth + k];
      second[k] = w[(pair ? i + 1 : i) * kInterleavedDepth + k];
    }
    Vec<T>* row = a + triangle(i);
    Vec<T>* next = pair ? a + triangle(i + 1) : row;
    if (!pair) {
      for (int64_t j = 0; j <= i; ++j) {
        Vec<T> sum = row[j];
        KFAC_FAST_UNROLL
        for (int k = 0; k < kDepth; ++k) sum -= first[k] * w[j * kInterleavedDepth + k];
        row[j] = sum;
      }
      continue;
    }
    for (int64_t j = 0; j <= i; ++j) {
      Vec<T> sum = row[j], next_sum = next[j];
      KFAC_FAST_UNROLL
      for (int k = 0; k < kDepth; ++k) {
        const Vec<T> other = w[j * kInterleavedDepth + k];
        sum -= first[k] * other;
        next_sum -= second[k] * other;
      }
      row[j] = sum;
      next[j] = next_sum;
    }
    KFAC_FAST_UNROLL
    for (int k = 0; k < kDepth; ++k) next[i + 1] -= second[k] * second[k];
  }
}

template <typename T>
inline void invert_interleaved(InterleavedGroup<T>& group, const InterleavedScratch<T>& s) {
  group.info = typename LaneIndex<T>::Vector{};
  load_group(group, s.matrix);
  int64_t k0 = 0;
  for (; k0 + kInterleavedDepth <= group.n; k0 += kInterleavedDepth) {
    interleaved_step<T, kInterleavedDepth>(group.n, k0, s.matrix, s.w, group);
  }
  for (; k0 < group.n; ++k0) interleaved_step<T, 1>(group.n, k0, s.matrix, s.w, group);
  store_group(group, s.matrix);
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
