// The worker with full attention against Hugging Face transformers: logits and greedy tokens of
// every golden file.
#include "tests/gpu/golden.h"

namespace quarry {
namespace {

using testing::Golden;
using testing::GoldenData;

class GoldenTest : public ::testing::TestWithParam<Golden> {};

TEST_P(GoldenTest, LogitsAndGreedyTokensAgreeWithTransformers) {
  GoldenData golden;
  ASSERT_NO_FATAL_FAILURE(testing::ReadGolden(GetParam(), &golden));
  std::unique_ptr<Device> device = MakeHostDevice({});
  auto model = Model::Load(GetParam().model, device.get());
  ASSERT_TRUE(model.ok()) << model.status();
  SequenceOptions options;
  options.kv_dtype = DType::kFp32;
  // Room for exactly these tokens pins the rope regime that the golden's lengths imply.
  auto sequence =
      Sequence::Open(**model, *device, nullptr, options, golden.prompt, golden.tokens());
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  testing::ExpectGolden(golden, sequence->get());
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenTest, ::testing::ValuesIn(testing::AllGoldens()),
                         [](const auto& info) { return info.param.Name(); });

}  // namespace
}  // namespace quarry
