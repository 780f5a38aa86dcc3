#include "perf/retrieval/default_set.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "perf/retrieval/head_class.h"
#include "perf/retrieval/index_specs.h"
#include "perf/retrieval/synthetic_trace.h"
#include "perf/retrieval/truth.h"

namespace quarry::perf {
namespace {

TEST(DefaultSetTest, AThirdOfTheHeadsIsMediumAtEveryLength) {
  for (const MadeSet& set : DefaultSet()) {
    // Of the training queries at the median position.
    const double rest = Window().Rest(set.tokens / 2).size();
    double heads = 0, medium = 0;
    for (const std::string& family : SyntheticFamilies()) {
      for (uint32_t h = 0; h < set.kv_heads; ++h) {
        ++heads;
        if (ClassOf(SyntheticTarget(family, h, set.tokens), rest) == HeadClass::kMedium) ++medium;
      }
    }
    EXPECT_GE(medium / heads, 0.3) << set.tokens << " tokens";
  }
}

TEST(DefaultSetTest, EveryIndexIsThereAndIsCalledByItsName) {
  const std::vector<IndexSpec> all = AllSpecs(1);
  const std::vector<MadeSet> sets = DefaultSet();
  EXPECT_TRUE(std::any_of(sets.begin(), sets.end(),
                          [](const MadeSet& set) { return set.indexes.empty(); }));
  const std::string text = DefaultSetText();
  for (const MadeSet& set : sets) {
    EXPECT_NE(text.find(absl::StrCat(set.tokens, " tokens")), std::string::npos) << text;
    for (const std::string& index : set.indexes) {
      EXPECT_TRUE(std::any_of(all.begin(), all.end(), [&](const IndexSpec& spec) {
        return spec.name.starts_with(index);
      })) << index;
    }
  }
}

TEST(IndexSpecsTest, EveryIndexIsMeasuredUnderEveryBudgetThatItCanAnswer) {
  for (const IndexSpec& spec : AllSpecs(1)) {
    const auto has = [&spec](auto is) {
      return std::any_of(spec.searches.begin(), spec.searches.end(),
                         [&is](const SearchSpec& search) { return is(search.budget); });
    };
    SCOPED_TRACE(spec.name);
    const bool clusters = spec.name == "auto" || spec.name.starts_with("clusters");
    EXPECT_EQ(has([](const Budget& b) { return b.kind == Budget::Kind::kError; }), clusters);
    EXPECT_EQ(has([](const Budget& b) { return b.kind == Budget::Kind::kFixedK; }), !clusters);
    EXPECT_EQ(has([](const Budget& b) { return b.kind == Budget::Kind::kTopP && b.k > 0; }),
              !clusters);
    EXPECT_EQ(has([](const Budget& b) { return b.kind == Budget::Kind::kDipr && b.k > 0; }),
              !clusters);
    EXPECT_EQ(has([](const Budget& b) { return b.kind == Budget::Kind::kSoftmaxLift; }), !clusters);
  }
}

TEST(IndexSpecsTest, BudgetsHaveNames) {
  EXPECT_EQ(BudgetName({}), "all");
  std::vector<std::string> names;
  for (const Budget& budget : BudgetsOfCandidates()) names.push_back(BudgetName(budget));
  EXPECT_EQ(names, (std::vector<std::string>{"mass-0.9-cap-4096", "mass-0.99-cap-4096",
                                             "dipr-6-cap-4096", "lift-1000"}));
}

}  // namespace
}  // namespace quarry::perf
