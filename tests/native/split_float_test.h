// Products of split float32 matrices against double loops; nothing where there are no matrix instructions.
#pragma once

#include "../../csrc/cpu/amx.h"
#include "support.h"

#if defined(KFAC_FAST_WITH_AMX)
namespace kfac_fast::cpu::amx_test {
int64_t split_product_words(int64_t m, int64_t n, int64_t depth);
// c (=, +=, -=) a b for sign 0, 1, -1
void split_product(int sign, int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
                   int64_t ldb, float* c, int64_t ldc, int32_t* words);
}  // namespace kfac_fast::cpu::amx_test
#endif

namespace kfac_fast::test {

#if defined(KFAC_FAST_WITH_AMX)

struct SplitProduct {
  int64_t m, n, depth, lda, ldb, ldc;
  std::vector<float> a, b, c;

  SplitProduct(int64_t m_, int64_t n_, int64_t depth_, double scale, Random& random)
      : m(m_), n(n_), depth(depth_), lda(depth + 3), ldb(n + 1), ldc(n + 5) {
    for (int64_t x = 0; x < m * lda - 3; ++x) a.push_back(static_cast<float>(scale * random.normal()));
    for (int64_t x = 0; x < depth * ldb - 1; ++x) b.push_back(static_cast<float>(random.normal()));
    for (int64_t x = 0; x < m * ldc - 5; ++x) c.push_back(static_cast<float>(scale * random.normal()));
  }

  void multiply(int sign) {
    const Workspace words({4 * static_cast<size_t>(cpu::amx_test::split_product_words(m, n, depth)), 0});
    cpu::amx_test::split_product(sign, m, n, depth, a.data(), lda, b.data(), ldb, c.data(), ldc,
                                 static_cast<int32_t*>(words.data()));
  }
};

inline void check_split_product(Tally& tally, int64_t m, int64_t n, int64_t depth, int sign, double scale,
                                Random& random) {
  SplitProduct given(m, n, depth, scale, random);
  const std::vector<float> before = given.c;
  given.multiply(sign);
  bool exact = true, inside = true;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < given.ldc && i * given.ldc + j < static_cast<int64_t>(before.size()); ++j) {
      const float old = before[i * given.ldc + j], found = given.c[i * given.ldc + j];
      if (j >= n) {
        inside = inside && found == old;
        continue;
      }
      double sum = sign == 0 ? 0.0 : old, magnitude = std::fabs(sum), lost = 0.0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = double(given.a[i * given.lda + k]) * given.b[k * given.ldb + j];
        sum += sign < 0 ? -term : term;
        magnitude += std::fabs(term);
        lost += std::ldexp(8.0 + std::fabs(given.b[k * given.ldb + j]), -126);  // parts and products that are subnormal
      }
      // A few roundings to float32 where numbers are added once, and what chance makes of those of a long sum.
      const double roundings = 4.0 + std::sqrt(static_cast<double>(depth));
      exact = exact && std::fabs(found - sum) <= std::ldexp(roundings * magnitude, -24) + lost;
    }
  }
  const std::string what = "split product " + std::to_string(m) + " x " + std::to_string(n) + " x " +
                           std::to_string(depth) + " sign " + std::to_string(sign);
  tally.check(exact, what + " is as exact as float32");
  tally.check(inside, what + " writes nothing else");
}

inline void test_split_float(Tally& tally, bool exhaustive) {
  if (!cpu::request_amx()) return;
  Random random(11);
  for (int trial = 0; trial < (exhaustive ? 2000 : 60); ++trial) {
    const int64_t most = trial % 6 == 0 ? 150 : 40;
    check_split_product(tally, random.between(1, most), random.between(1, most), random.between(1, 2 * most),
                        trial % 3 - 1, trial % 5 == 0 ? 1e-30 : 1.0, random);
  }
  for (int64_t depth = 1; depth <= 33; depth += 8) check_split_product(tally, 33, 17, depth, 0, 1e30, random);
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), 3.4028e38}) {
    for (const bool left : {false, true}) {
      SplitProduct given(20, 40, 50, 1.0, random);
      (left ? given.a[7 * given.lda + 41] : given.b[41 * given.ldb + 7]) = static_cast<float>(bad);
      given.multiply(0);
      bool right = true;
      for (int64_t i = 0; i < given.m; ++i) {
        for (int64_t j = 0; j < given.n; ++j) {
          right = right && std::isfinite(given.c[i * given.ldc + j]) == ((left ? i : j) != 7);
        }
      }
      tally.check(right, "split product: what is not finite stays so");
    }
  }
}

#else

inline void test_split_float(Tally&, bool) {}

#endif

}  // namespace kfac_fast::test
