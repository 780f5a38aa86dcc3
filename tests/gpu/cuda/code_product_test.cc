// The kernel of products with codes, its own source on an imitation of a card, against a double
// reference: which lane has which columns, where rows and widths end.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/cuda/imitated_warp.h"
// After the operations that it uses.
#include "gpu/cuda/code_product.cuh"
#include "gpu/weights/codes.h"
#include "gpu/weights/matrix_layout.h"
#include "proto/half.h"
#include "tests/support/normal_floats.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

struct Case {
  WeightForm form;
  DType dtype;
  uint32_t rows, out, in;
  bool adds = false;
};

class CodeProductTest : public ::testing::Test {
 protected:
  std::vector<float> Random(size_t n) { return NormalFloats(random_, n); }

  template <typename Element, typename Codes>
  void RunBlocks(const CodeProductArgs& args) {
    for (uint32_t block = 0; block * kOutRows < args.w.out; ++block) {
      blockIdx = {block, 0, 0};
      const auto shared = std::make_unique<float[][32][4]>(kCodeWarps);
      ImitatedBlock(kCodeThreads, random_()).Run([&] {
        MultiplyCodes<Element, Codes>(args, shared.get());
      });
    }
  }

  void Run(const Case& c, const CodeProductArgs& args) {
    if (c.form == WeightForm::kInt8) {
      c.dtype == DType::kBf16 ? RunBlocks<Bf16, Int8Codes>(args) : RunBlocks<Fp16, Int8Codes>(args);
    } else {
      c.dtype == DType::kBf16 ? RunBlocks<Bf16, Int4Codes>(args) : RunBlocks<Fp16, Int4Codes>(args);
    }
  }

  void Check(const Case& c) {
    SCOPED_TRACE(std::string(WeightFormName(c.form)) + " " + std::string(DTypeName(c.dtype)) + " " +
                 std::to_string(c.rows) + " x " + std::to_string(c.out) + " x " +
                 std::to_string(c.in));
    const MatrixLayout layout{c.dtype, c.out, c.in, c.form};
    std::vector<uint4> memory(layout.bytes() / 16 + 1);
    auto* const codes = reinterpret_cast<std::byte*>(memory.data());
    auto* const scales = reinterpret_cast<uint16_t*>(codes + layout.scales_at());
    std::vector<float> weights(size_t{c.out} * c.in);
    for (uint32_t r = 0; r < c.out; ++r) {
      ASSERT_TRUE(EncodeRow(c.form, Random(c.in), codes + r * layout.row_bytes(),
                            scales + r * layout.scales_per_row()));
      DecodeRow(c.form, codes + r * layout.row_bytes(), scales + r * layout.scales_per_row(),
                std::span(weights).subspan(size_t{r} * c.in, c.in));
    }
    const std::vector<float> x = Random(size_t{c.rows} * c.in), before = Random(c.rows * c.out);
    // NaNs behind the activations: nobody reads there.
    std::vector<float4> aligned(x.size() / 4 + 2, float4{NAN, NAN, NAN, NAN});
    auto* const at = reinterpret_cast<float*>(aligned.data());
    std::copy(x.begin(), x.end(), at);
    std::vector<float> y = before;
    y.push_back(-7);
    CodeProductArgs args = {};
    args.w = {codes, scales, c.out, c.in, static_cast<uint32_t>(layout.groups())};
    args.x = at;
    args.y = y.data();
    args.rows = c.rows;
    args.adds = c.adds;
    args.vectors = c.in % 4 == 0;
    Run(c, args);
    ASSERT_EQ(y.back(), -7) << "written behind the output";
    for (uint32_t r = 0; r < c.rows; ++r) {
      for (uint32_t o = 0; o < c.out; ++o) {
        double want = c.adds ? before[r * c.out + o] : 0, size = 0;
        for (uint32_t i = 0; i < c.in; ++i) {
          std::byte rounded[4];
          StoreFromFloat(rounded, 0, c.dtype, x[size_t{r} * c.in + i]);
          const double term =
              double{LoadAsFloat(rounded, 0, c.dtype)} * weights[size_t{o} * c.in + i];
          want += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(y[r * c.out + o], want, 1e-5 * (size + 1)) << r << " " << o;
      }
    }
  }

  std::mt19937_64 random_{Seed()};
};

TEST_F(CodeProductTest, AgreesOnAnyShape) {
  for (const WeightForm form : {WeightForm::kInt8, WeightForm::kInt4}) {
    for (const DType dtype : {DType::kBf16, DType::kFp16}) {
      Check({form, dtype, 1, 16, 128});
      Check({form, dtype, 8, 17, 1280, true});
      Check({form, dtype, 3, 1, 1});
      Check({form, dtype, 5, 50, 333, true});
      Check({form, dtype, 2, 33, 2052});
    }
  }
}

}  // namespace
}  // namespace quarry::cuda
