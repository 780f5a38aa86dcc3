// Which run gets which index, and which of them share what they have learned.
#include "cpu_index/index_choice.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/cpu_index/cluster_case.h"

namespace quarry {
namespace {

using testing::ClusterHead;
using testing::ClusterRuns;

class IndexChoiceTest : public ::testing::Test {
 protected:
  std::vector<MadeIndex> Make(const IndexChoice& choice) const {
    auto made = MakeIndexes(choice, runs_.views, head_.sampled);
    EXPECT_TRUE(made.ok()) << made.status();
    return made.ok() ? *std::move(made) : std::vector<MadeIndex>(runs_.views.size());
  }
  static std::string KindOf(const MadeIndex& made) {
    return made.index == nullptr ? "none" : std::string(made.index->kind());
  }
  static std::shared_ptr<const ClusterModel> ModelOf(const MadeIndex& made) {
    const auto* const clusters = dynamic_cast<const ClusterIndex*>(made.index.get());
    return clusters == nullptr ? nullptr : clusters->model();
  }

  const ClusterHead head_{2000, 32, 2};
  const ClusterRuns runs_{head_, {600, 900, 1500, 2000}};  // of 600, 300, 600 and 500
};

TEST_F(IndexChoiceTest, EachKindIsMadeForEachRunAndFitsItAlone) {
  const struct {
    IndexKind kind;
    const char* name;
  } kinds[] = {{IndexKind::kExact, "none"},
               {IndexKind::kCodes, "codes"},
               {IndexKind::kClusters, "clusters"},
               {IndexKind::kGraph, "graph"}};
  for (const auto& [kind, name] : kinds) {
    // No kind but kAuto looks at the least length.
    const std::vector<MadeIndex> made = Make({.kind = kind, .min_run_tokens = 1 << 20});
    ASSERT_EQ(made.size(), 4u);
    for (size_t r = 0; r < 4; ++r) {
      EXPECT_EQ(KindOf(made[r]), name);
      EXPECT_EQ(made[r].bytes > 0, made[r].index != nullptr);
      if (made[r].index == nullptr) continue;
      EXPECT_TRUE(made[r].index->Fits(runs_.views[r]));
      EXPECT_FALSE(made[r].index->Fits(runs_.views[(r + 1) % 4]));
    }
  }
}

TEST_F(IndexChoiceTest, ClustersOfAHeadHaveOneModelWhoseBytesAreShared) {
  const std::vector<MadeIndex> made = Make({IndexKind::kClusters});
  const auto model = ModelOf(made[0]);
  ASSERT_NE(model, nullptr);
  for (const MadeIndex& one : made) {
    EXPECT_EQ(ModelOf(one), model);
    EXPECT_EQ(one.bytes, dynamic_cast<const ClusterIndex&>(*one.index).memory_bytes());
    EXPECT_EQ(one.shared, model);
    EXPECT_EQ(one.shared_bytes, model->memory_bytes());
  }
  EXPECT_EQ(model->learned_tokens, 2000u);
}

TEST_F(IndexChoiceTest, ShortRunsAreScannedAndTheOthersLearnWithoutThem) {
  const std::vector<MadeIndex> made = Make({.kind = IndexKind::kAuto, .min_run_tokens = 500});
  EXPECT_EQ(KindOf(made[0]), "clusters");
  EXPECT_EQ(KindOf(made[1]), "none");
  EXPECT_EQ(KindOf(made[2]), "clusters");
  EXPECT_EQ(KindOf(made[3]), "clusters");
  EXPECT_EQ(ModelOf(made[3]), ModelOf(made[0]));
  EXPECT_EQ(ModelOf(made[0])->learned_tokens, 1700u);
  for (const MadeIndex& one : Make({.kind = IndexKind::kAuto, .min_run_tokens = 601})) {
    EXPECT_EQ(KindOf(one), "none");
  }
}

TEST_F(IndexChoiceTest, OneMoreRunUsesWhatItsNeighbourHasLearned) {
  const IndexChoice choice{IndexKind::kClusters};
  const std::vector<MadeIndex> made = Make(choice);
  const auto like = MakeIndexLike(*made[0].index, choice, runs_.views[1], {});
  ASSERT_TRUE(like.ok()) << like.status();
  EXPECT_EQ(ModelOf(*like), ModelOf(made[0]));
  EXPECT_TRUE(like->index->Fits(runs_.views[1]));
  EXPECT_EQ(like->bytes, dynamic_cast<const ClusterIndex&>(*like->index).memory_bytes());
  // As the index that was made with the others.
  EXPECT_EQ(dynamic_cast<const ClusterIndex&>(*like->index).Serialize(),
            dynamic_cast<const ClusterIndex&>(*made[1].index).Serialize());
}

TEST_F(IndexChoiceTest, ANeighbourThatHasLearnedNothingIsNoHindrance) {
  for (const IndexKind kind : {IndexKind::kCodes, IndexKind::kGraph, IndexKind::kClusters}) {
    const auto made = MakeIndexLike(ExactScan(), {kind}, runs_.views[0], head_.sampled);
    ASSERT_TRUE(made.ok()) << made.status();
    ASSERT_NE(made->index, nullptr);
    EXPECT_TRUE(made->index->Fits(runs_.views[0]));
  }
  const std::vector<MadeIndex> made = Make({IndexKind::kClusters});
  const auto scanned =
      MakeIndexLike(*made[0].index, {.kind = IndexKind::kAuto, .min_run_tokens = 601},
                    runs_.views[0], head_.sampled);
  ASSERT_TRUE(scanned.ok()) << scanned.status();
  EXPECT_EQ(scanned->index, nullptr);
}

TEST_F(IndexChoiceTest, RunsOfNoTokensAreRefused) {
  const KvView empty{{}, 32, DType::kBf16};
  EXPECT_EQ(MakeIndexes({IndexKind::kClusters}, {&empty, 1}, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto none = MakeIndexes({IndexKind::kClusters}, {}, {});
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_TRUE(none->empty());
}

}  // namespace
}  // namespace quarry
