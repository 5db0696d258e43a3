// factor_update and commit of csrc/cuda in the shim, against plain loops in double precision.
#include "factor_blocks.h"

namespace {

using namespace factor_blocks;

template <typename T>
void test_factor_update_of() {
  const std::string type = sizeof(T) == 8 ? "factor_update f64" : "factor_update f32";
  const DType own = kDType<T>;
  test_blocks<T>(type + " of nothing", {});
  test_blocks<T>(type + " m = 0",
                 {plain_rows<T>(own, 0, 5, false, false, false, 0), plain_rows<T>(own, 0, 70, true, false, false, 0)});
  test_blocks<T>(
      type + " plain",
      {plain_rows<T>(own, 3, 1, false, false, false, 0), plain_rows<T>(own, 100, 31, true, false, false, 0),
       plain_rows<T>(own, 7, 32, true, true, false, 3), plain_rows<T>(own, 65, 40, false, true, true, 2),
       plain_rows<T>(own, 0, 9, true, false, false, 0), plain_rows<T>(own, 33, 130, true, false, true, 0),
       plain_rows<T>(own, 17, 191, true, true, false, 1), plain_rows<T>(own, 16, 64, false, false, false, 0)});
  test_blocks<T>(type + " several chunks", {plain_rows<T>(own, 1700, 33, true, true, false, 0),
                                            plain_rows<T>(own, 1025, 12, false, false, true, 1),
                                            plain_rows<T>(own, 513, 65, false, false, false, 0)});
  test_blocks<T>(type + " large tiles",
                 {plain_rows<T>(own, 40, 300, true, true, false, 0), plain_rows<T>(own, 9, 192, false, false, true, 5),
                  plain_rows<T>(own, 20, 648, true, false, false, 0)});
  std::vector<Block<T>> bad = {plain_rows<T>(own, 20, 8, true, false, false, 0),
                               plain_rows<T>(own, 20, 70, true, false, false, 0),
                               plain_rows<T>(own, 20, 8, true, false, false, 0)};
  bad[0].x[3 * 9 + 2] = stored(bad[0].data, own, 3 * 8 + 2, kNaN<double>);
  bad[1].x[19 * 71 + 69] = stored(bad[1].data, own, 19 * 70 + 69, std::numeric_limits<double>::infinity());
  test_blocks<T>(type + " not finite", bad);

  std::vector<Block<T>> convs;
  for (const PaddingMode mode :
       {PaddingMode::zeros, PaddingMode::reflect, PaddingMode::replicate, PaddingMode::circular}) {
    convs.push_back(conv_rows<T>(own, mode, {7}, {3}, {1}, {2}, {2}, true, false));
    convs.push_back(conv_rows<T>(own, mode, {6, 5}, {3, 2}, {2, 1}, {1, 2}, {1, 2}, true, true));
    convs.push_back(conv_rows<T>(own, mode, {4, 5, 6}, {2, 3, 3}, {1, 2, 1}, {1, 0, 2}, {1, 1, 1}, false, true));
  }
  convs.push_back(plain_rows<T>(own, 5, 6, true, true, false, 0));
  convs.push_back(conv_rows<T>(own, PaddingMode::zeros, {40, 40}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false));
  test_blocks<T>(type + " convolutions", convs);
}

// With the permission, float32 rows count with the 19 bits that tensor cores read, and on no other device.
void test_factor_update_with_tf32() {
  for (const int capability : {90, 75, 86}) {
    simt_set_device(232448, 132, capability);
    std::vector<Block<float>> blocks = {
        plain_rows<float>(DType::f32, 600, 33, true, false, false, 0),
        plain_rows<float>(DType::f32, 33, 20, false, false, true, 1),
        plain_rows<float>(DType::f32, 50, 200, true, false, false, 8),
        plain_rows<float>(DType::f32, 31, 144, false, false, false, 0),
        plain_rows<float>(DType::f32, 20, 648, true, false, false, 0),
        conv_rows<float>(DType::f32, PaddingMode::zeros, {6, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false)};
    for (Block<float>& block : blocks) {
      if (capability != 90) continue;
      for (double& x : block.x) {
        x = __uint_as_float(__float_as_uint(static_cast<float>(x)) & 0xffffe000u);
      }
    }
    test_blocks<float>("factor_update with TF32 allowed, sm_" + std::to_string(capability), blocks, DType::tf32);
  }
  simt_set_device(232448, 132, 90);
}

template <typename T>
void test_commit_of(bool open) {
  const std::string what = std::string("commit ") + (sizeof(T) == 8 ? "f64" : "f32") + (open ? "" : " closed");
  const Plan plan({3, 0, 100, 1, 17, 64});
  std::vector<T> factors(plan.numel(), T(7)), pending(plan.numel(), T(5)), decay, scale, trace(plan.count());
  for (int b = 0; b < plan.count(); ++b) {
    decay.push_back(b % 2 == 0 ? T(0) : T(0.5));
    scale.push_back(T(b + 1) / 4);
    for (int i = 0; i < plan.size(b) * plan.size(b); ++i) {
      factors[plan.offset(b) + i] = b % 2 == 0 && open ? kNaN<T> : static_cast<T>(check::normal());
      pending[plan.offset(b) + i] = static_cast<T>(check::normal());
    }
  }
  std::vector<T> out_factors, out_pending;
  const int32_t gate = open ? 1 : 0;
  check::same_bits_under_every_schedule(what, [&] {
    out_factors = factors;
    out_pending = pending;
    const Commit op = {plan,         kDType<T>, out_factors.data(), out_pending.data(), decay.data(),
                       scale.data(), &gate,     trace.data()};
    check::that(check::call(cuda_table().commit_workspace, cuda_table().commit, op).empty(), what);
    std::vector<char> bytes;
    check::append_bytes(bytes, out_factors);
    check::append_bytes(bytes, out_pending);
    check::append_bytes(bytes, trace);
    return bytes;
  });
  bool ok = true, padding = true;
  for (int b = 0; b < plan.count(); ++b) {
    const int64_t n = plan.size(b), end = b + 1 < plan.count() ? plan.offset(b + 1) : plan.numel();
    double expected_trace = 0;
    for (int64_t i = plan.offset(b); i < plan.offset(b) + n * n; ++i) {
      const double added = static_cast<double>(scale[b]) * pending[i];
      const double expected = !open ? factors[i] : decay[b] == T(0) ? added : decay[b] * factors[i] + added;
      ok = ok && std::abs(out_factors[i] - expected) <= 1e-6 * (1 + std::abs(expected)) && out_pending[i] == T(0);
      if ((i - plan.offset(b)) % (n + 1) == 0) expected_trace += out_factors[i];
    }
    ok = ok && std::abs(trace[b] - expected_trace) <= 1e-5 * (1 + std::abs(expected_trace));
    for (int64_t i = plan.offset(b) + n * n; i < end; ++i) {
      padding = padding && out_factors[i] == T(7) && out_pending[i] == T(5);
    }
  }
  check::that(ok, what + ": values");
  check::that(padding, what + ": nothing written between blocks");
}

}  // namespace

void test_factor_update() {
  test_factor_update_of<float>();
  test_factor_update_of<double>();
  test_factor_update_with_tf32();
  simt_set_device(65536, 40, 75);  // no tensor cores that the kernels use
  test_factor_update_of<float>();
  simt_set_device(232448, 132, 90);
  for (const DType half : {DType::f16, DType::bf16}) {
    test_blocks<float>(
        "factor_update of 16-bit rows",
        {plain_rows<float>(half, 70, 33, true, true, false, 0), plain_rows<float>(half, 33, 20, true, false, true, 1),
         plain_rows<float>(half, 50, 200, true, false, false, 8),
         plain_rows<float>(half, 50, 64, true, false, false, 8),
         plain_rows<float>(half, 31, 24, false, false, false, 0),
         plain_rows<float>(half, 31, 31, true, false, false, 0), plain_rows<float>(half, 31, 144, true, true, false, 0),
         plain_rows<float>(half, 20, 648, true, false, false, 0),
         conv_rows<float>(half, PaddingMode::zeros, {6, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true)});
  }
}

void test_commit() {
  for (const bool open : {true, false}) {
    test_commit_of<float>(open);
    test_commit_of<double>(open);
  }
}
