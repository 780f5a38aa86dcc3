// How fast weights as codes and streamed weights are. Not a check; asked for by
//   cuda_device_check --gtest_also_run_disabled_tests --gtest_filter='*WeightTiming*'
// | what     | workload                                                                      |
// | products | matrices of an 8B model's layer, bf16, int8 and int4; 1, 8, 64 and 4,096 rows   |
// | chain    | 8 layers of 4,096 and 2 x 14,336 without attention; resident, half, streamed    |
#include "gpu/weights/matrix_layout.h"
#include "tests/gpu/cuda/layer_chain.h"
#include "tests/gpu/cuda/timing_fixture.h"

namespace quarry {
namespace {

constexpr WeightForm kForms[] = {WeightForm::kPlain, WeightForm::kInt8, WeightForm::kInt4};

class DISABLED_CudaWeightTiming : public CudaTimingFixture {};

TEST_F(DISABLED_CudaWeightTiming, Products) {
  const std::pair<size_t, size_t> shapes[] = {
      {4096, 4096}, {1024, 4096}, {28672, 4096}, {4096, 14336}};
  for (const auto& [out, in] : shapes) {
    for (const WeightForm form : kForms) {
      // What codes say does not matter to the time; bf16 must be numbers.
      DeviceMatrix w{DeviceBuffer(), DType::kBf16, out, in, form};
      const size_t bytes = LayoutOf(w).bytes();
      w.data = Noise(bytes / 2, 0.02f, false);
      for (const size_t rows : {1, 8, 64, 4096}) {
        const DeviceBuffer x = Noise(rows * in, 1, true), y = Allocate(rows * out * 4);
        const double seconds = Time(
            [&] { device_->MatMul(x.floats(), w, y.floats(), rows, Device::Output::kOverwrite); });
        std::printf("%-5s %4zu x %5zu x %5zu: %8.1f us, %6.1f TFLOP/s, %6.0f GB/s of weights\n",
                    std::string(WeightFormName(form)).c_str(), rows, in, out, seconds * 1e6,
                    2.0 * rows * in * out / seconds * 1e-12, double{1} * bytes / seconds * 1e-9);
      }
    }
  }
}

TEST_F(DISABLED_CudaWeightTiming, Chain) {
  constexpr size_t kLayers = 8, kHidden = 4096;
  for (const WeightForm form : kForms) {
    const ChainWeights weights(kLayers, kHidden, 14336, form, &random_);
    for (const size_t streamed : {size_t{0}, kLayers / 2, kLayers}) {
      LayerChain chain(device_, weights, streamed);
      ASSERT_TRUE(chain.status().ok()) << chain.status();
      for (const size_t rows : {1, 4096}) {
        const DeviceBuffer x = Noise(rows * kHidden, 1e-3f, true);
        const double seconds = Time([&] { chain.Run(x.floats(), rows); });
        std::printf(
            "%-5s %zu of %zu layers streamed, %4zu rows: %8.3f ms, %5.1f GB/s uploaded, "
            "%6.1f TFLOP/s\n",
            std::string(WeightFormName(form)).c_str(), streamed, kLayers, rows, seconds * 1e3,
            double{1} * chain.residence().streamed_bytes / seconds * 1e-9,
            6.0 * kLayers * rows * kHidden * 14336 / seconds * 1e-12);
      }
    }
  }
}

}  // namespace
}  // namespace quarry
