#include "daemon/audit_table.h"

#include <algorithm>

namespace quarry {
namespace {

constexpr size_t kModelsOfTenant = 8, kModels = 64, kHeadsOfModel = 4096;

void AddMeasure(const AuditMeasure& m, AuditTable::Drift drift, AuditFigures* figures) {
  ++figures->audits;
  figures->error_sum += m.error;
  figures->error_max = std::max(figures->error_max, m.error);
  figures->predicted_sum += m.predicted;
  figures->mass_error_sum += m.mass_error;
  figures->within_twice += m.Ratio() <= 2;
  ++figures->ratios[static_cast<size_t>(AuditFigures::RatioBucket(m.Ratio()))];
  figures->drifts += drift == AuditTable::Drift::kFound;
  if (m.mass.has_value()) {
    ++figures->mass_audits;
    figures->mass_sum += *m.mass;
  }
  if (m.recall.has_value()) {
    ++figures->recall_audits;
    figures->recall_sum += *m.recall;
  }
}

}  // namespace

void AuditTable::Add(const AuditSubject& subject, uint32_t layer, uint32_t kv_head,
                     const AuditMeasure& measure, Drift drift) {
  const Key key{subject.tenant(), subject.model()};
  absl::MutexLock lock(&mutex_);
  if (!models_.contains(key)) MakeRoom(key.first);
  Model& model = models_[key];
  model.audited = ++adds_;
  const Head head{layer, kv_head};
  if (model.heads.size() >= kHeadsOfModel && !model.heads.contains(head)) return;
  AddMeasure(measure, drift, &model.heads[head]);
}

void AuditTable::MakeRoom(const std::string& tenant) {
  const auto first = models_.lower_bound({tenant, ""});
  auto last = first;
  size_t own = 0;
  for (; last != models_.end() && last->first.first == tenant; ++last) ++own;
  const auto earlier = [](const auto& a, const auto& b) {
    return a.second.audited < b.second.audited;
  };
  if (own >= kModelsOfTenant) {
    models_.erase(std::min_element(first, last, earlier));
  } else if (models_.size() >= kModels) {
    models_.erase(std::min_element(models_.begin(), models_.end(), earlier));
  }
}

std::vector<HeadAudit> AuditTable::Of(std::string_view tenant) const {
  std::vector<HeadAudit> audits;
  absl::MutexLock lock(&mutex_);
  for (const auto& [key, model] : models_) {
    if (key.first != tenant) continue;
    for (const auto& [head, figures] : model.heads) {
      audits.push_back({key.second, head.first, head.second, figures});
    }
  }
  return audits;
}

std::vector<HeadAudit> AuditTable::OfAll() const {
  std::map<std::string, std::map<Head, AuditFigures>> models;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [key, model] : models_) {
      for (const auto& [head, figures] : model.heads) models[key.second][head].Merge(figures);
    }
  }
  std::vector<HeadAudit> audits;
  for (const auto& [name, heads] : models) {
    for (const auto& [head, figures] : heads) {
      audits.push_back({name, head.first, head.second, figures});
    }
  }
  return audits;
}

}  // namespace quarry
