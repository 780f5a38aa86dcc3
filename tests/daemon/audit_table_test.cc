#include "daemon/audit_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

namespace quarry {
namespace {

class Subject final : public AuditSubject {
 public:
  Subject(std::string tenant, std::string model)
      : tenant_(std::move(tenant)), model_(std::move(model)) {}
  const std::string& tenant() const override { return tenant_; }
  const std::string& model() const override { return model_; }
  const KvShape& shape() const override { return shape_; }
  std::shared_ptr<const BlockTable> Memory() const override { return nullptr; }
  bool NoteFit(uint32_t, uint32_t, IndexFit) override { return false; }

 private:
  const std::string tenant_, model_;
  const KvShape shape_;
};

void Add(AuditTable& table, const std::string& tenant, const std::string& model, uint32_t layer = 0,
         uint32_t kv_head = 0, const AuditMeasure& measure = {}) {
  table.Add(Subject(tenant, model), layer, kv_head, measure, AuditTable::Drift::kNone);
}

TEST(AuditTableTest, FiguresAreOfTheirHead) {
  AuditTable table;
  Add(table, "a", "m", 1, 0, {.error = 0.1, .mass_error = 0.2, .actual = 0.1, .predicted = 0.1});
  Add(table, "a", "m", 1, 0, {.error = 0.3, .mass_error = 0.4, .actual = 0.3, .predicted = 0.1});
  Add(table, "a", "m", 0, 5, {.error = 0.7, .mass = 0.5, .recall = 0.25});
  const std::vector<HeadAudit> heads = table.Of("a");
  ASSERT_EQ(heads.size(), 2u);
  EXPECT_EQ(heads[0].layer, 0u);
  EXPECT_EQ(heads[0].kv_head, 5u);
  EXPECT_EQ(heads[0].figures.mass(), 0.5);
  EXPECT_EQ(heads[0].figures.recall(), 0.25);
  const AuditFigures& f = heads[1].figures;
  EXPECT_EQ(f.audits, 2u);
  EXPECT_DOUBLE_EQ(f.error(), 0.2);
  EXPECT_DOUBLE_EQ(f.error_max, 0.3);
  EXPECT_DOUBLE_EQ(f.mass_error(), 0.3);
  EXPECT_DOUBLE_EQ(f.predicted(), 0.1);
  EXPECT_DOUBLE_EQ(f.within_twice_share(), 0.5);
  EXPECT_NEAR(f.RatioQuantile(0.5), 1, 0.1);
  EXPECT_NEAR(f.RatioQuantile(0.95), 3, 0.3);
  EXPECT_TRUE(std::isnan(f.mass()));
  EXPECT_TRUE(std::isnan(f.recall()));
}

TEST(AuditTableTest, ErrorsThatRoundingAloneCanMakeAreEquallySmall) {
  EXPECT_EQ((AuditMeasure{.actual = 1e-4, .predicted = 1e-7}.Ratio()), 1);
  EXPECT_EQ((AuditMeasure{.actual = 4e-3, .predicted = 0}.Ratio()), 4);
}

TEST(AuditTableTest, ATenantsNewModelTakesThePlaceOfItsOldest) {
  AuditTable table;
  Add(table, "b", "first");
  for (int i = 0; i < 8; ++i) Add(table, "a", "m" + std::to_string(i));
  Add(table, "a", "m0");
  Add(table, "a", "new");
  std::vector<std::string> models;
  for (const HeadAudit& head : table.Of("a")) models.push_back(head.model);
  EXPECT_EQ(models, (std::vector<std::string>{"m0", "m2", "m3", "m4", "m5", "m6", "m7", "new"}));
  EXPECT_EQ(table.Of("b").size(), 1u);
}

TEST(AuditTableTest, ModelsAndHeadsAreBounded) {
  AuditTable table;
  for (int tenant = 0; tenant < 20; ++tenant) {
    for (int m = 0; m < 8; ++m) Add(table, std::to_string(tenant), std::to_string(m));
  }
  size_t models = 0;
  for (int tenant = 0; tenant < 20; ++tenant) models += table.Of(std::to_string(tenant)).size();
  EXPECT_EQ(models, 64u);
  for (uint32_t head = 0; head < 5000; ++head) Add(table, "19", "7", head, head);
  EXPECT_EQ(table.Of("19").size(), 7u + 4096);
}

}  // namespace
}  // namespace quarry
