// factor_update of convolutions that go by shifted images (csrc/cuda/shifted_gram.cuh), in the shim.
#include "../../csrc/cuda/shifted_finish.cuh"
#include "factor_blocks.h"

namespace {

using namespace factor_blocks;

// Whether the library takes this block by shifted images: that path has a last step of its own.
template <typename T>
bool goes_by_shifted_images(Block<T>& b) {
  static bool shifted;
  shifted = false;
  simt::device.launch = [](const void* kernel, unsigned, unsigned, uint64_t, void* const*, const uint64_t*, int) {
    shifted |= kernel == reinterpret_cast<const void*>(&shifted_gram_finish_kernel<T>);
    return 0;  // nothing runs
  };
  b.rows.data = b.data.data();
  b.rows.weights = b.weights.empty() ? nullptr : b.weights.data();
  b.rows.conv = &b.conv;
  const Plan plan({b.n()});
  std::vector<T> factor(plan.numel());
  T decay(0), scale(1), trace;
  int32_t nonfinite;
  const FactorUpdate op = {plan, kDType<T>, factor.data(), &b.rows, &decay, &scale, &trace, &nonfinite};
  check::call(cuda_table().factor_update_workspace, cuda_table().factor_update, op);
  simt::device = {};
  return shifted;
}

// Convolutions that go by shifted images: images large enough for that to pay.
template <typename T>
void test_shifted_images_of(const std::string& device, std::vector<DType> dtypes) {
  constexpr PaddingMode kZeros = PaddingMode::zeros;
  for (const DType dtype : dtypes) {
    std::vector<Block<T>> blocks = {
        conv_rows<T>(dtype, kZeros, {49, 64}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false, 17),  // whole sectors
        conv_rows<T>(dtype, kZeros, {55, 57}, {3, 3}, {1, 1}, {2, 2}, {2, 2}, true, false, 17),
        conv_rows<T>(dtype, kZeros, {64, 65}, {2, 3}, {1, 1}, {0, 0}, {1, 1}, false, false, 17),
        conv_rows<T>(dtype, kZeros, {2801}, {5}, {1}, {1}, {1}, true, false, 17),
        conv_rows<T>(dtype, kZeros, {50, 63}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false, false, 16, true),
        conv_rows<T>(dtype, kZeros, {1900}, {3}, {1}, {0}, {2}, true, false, 32),
        conv_rows<T>(dtype, PaddingMode::circular, {1900}, {3}, {1}, {2}, {2}, true, false, 32, true),
        conv_rows<T>(dtype, PaddingMode::reflect, {72, 52}, {2, 3}, {1, 1}, {1, 2}, {1, 1}, false, false, 17, true),
        conv_rows<T>(dtype, PaddingMode::replicate, {8, 25, 30}, {1, 2, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, true,
                     false, 17),
        conv_rows<T>(dtype, kZeros, {8, 20, 22}, {2, 2, 2}, {1, 1, 1}, {1, 0, 1}, {1, 1, 1}, true, false, 17),
        conv_rows<T>(dtype, kZeros, {54, 59}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, true, 18),  // weighted: by patches
        // Several tiles of channels, with strips beside the cores where rows are wide enough for these to pay.
        conv_rows<T>(dtype, kZeros, {2000}, {2}, {1}, {width(dtype) > 2 ? 0 : 1}, {1}, true, false, 128,
                     dtype == DType::f16)};
    if (dtype != DType::f64) {
      constexpr int kWidth = 59;
      Block<T> bad = conv_rows<T>(dtype, kZeros, {54, kWidth}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, true, false, 18);
      bad.x[5 * bad.n() + 4] = stored(bad.data, dtype, 5, kNaN<double>);  // the middle of the patch at position 5
      for (const auto& [row, column] :
           {std::pair<int, int>{4, 5}, {6, 3}, {kWidth + 4, 2}, {kWidth + 5, 1}, {kWidth + 6, 0}}) {
        bad.x[row * bad.n() + column] = kNaN<double>;
      }
      blocks.push_back(std::move(bad));
    }
    const std::string what =
        "factor_update by shifted images, " + device + ", type " + std::to_string(static_cast<int>(dtype));
    for (size_t b = 0; b < blocks.size(); ++b) {
      check::that(goes_by_shifted_images(blocks[b]) == blocks[b].weights.empty(),
                  what + ", block " + std::to_string(b) + ": its path");
    }
    test_blocks<T>(what, std::move(blocks));
  }
}

}  // namespace

void test_shifted_images() {
  test_shifted_images_of<float>("sm_90", {DType::f32, DType::f16, DType::bf16});
  test_shifted_images_of<double>("sm_90", {DType::f64});
  simt_set_device(65536, 40, 75);  // no tensor cores that the kernels use
  test_shifted_images_of<float>("sm_75", {DType::f32, DType::bf16});
  simt_set_device(232448, 132, 90);
}
