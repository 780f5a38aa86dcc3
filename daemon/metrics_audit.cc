// The figures of audits, as metrics.
#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "daemon/metrics.h"

namespace quarry {
namespace {

// Bounds on what a scraper keeps: clients choose the names of models.
constexpr size_t kModels = 8, kHeadsOfModel = 1024;

struct AuditFigure {
  const char *name, *help;
  double (*value)(const AuditFigures&);
};

// A name that ends in _total is a counter's.
constexpr AuditFigure kFigures[] = {
    {"quarry_audit_answers_total", "audited answers to one KV head's queries",
     [](const AuditFigures& f) { return static_cast<double>(f.audits); }},
    {"quarry_audit_output_error_ratio", "mean length of the error of o, by the length of o",
     [](const AuditFigures& f) { return f.error(); }},
    {"quarry_audit_output_error_max_ratio", "largest length of the error of o, by the length of o",
     [](const AuditFigures& f) { return f.error_max; }},
    {"quarry_audit_predicted_error_ratio", "mean of the errors that answers came with",
     [](const AuditFigures& f) { return f.predicted(); }},
    {"quarry_audit_within_twice_predicted_ratio",
     "share of answers in error by at most twice the predicted",
     [](const AuditFigures& f) { return f.within_twice_share(); }},
    {"quarry_audit_actual_by_predicted_p50_ratio", "actual by predicted error, median",
     [](const AuditFigures& f) { return f.RatioQuantile(0.5); }},
    {"quarry_audit_actual_by_predicted_p95_ratio", "actual by predicted error, 95th percentile",
     [](const AuditFigures& f) { return f.RatioQuantile(0.95); }},
    {"quarry_audit_mass_error_ratio", "mean relative error of e^lse",
     [](const AuditFigures& f) { return f.mass_error(); }},
    {"quarry_audit_captured_mass_ratio",
     "share of the softmax mass attended, under a tolerated error that on tokens read one by one",
     [](const AuditFigures& f) { return f.mass(); }},
    {"quarry_audit_recall_ratio",
     "share of the n attended tokens among the n best, under a tolerated error of the 100 best "
     "read",
     [](const AuditFigures& f) { return f.recall(); }},
    {"quarry_audit_head_drifts_total", "times that indexes did not fit live queries any more",
     [](const AuditFigures& f) { return static_cast<double>(f.drifts); }},
};

// Of each model, given by model and head: those of the most audited models.
std::vector<std::span<const HeadAudit>> MostAudited(std::span<const HeadAudit> heads) {
  std::vector<std::pair<uint64_t, std::span<const HeadAudit>>> models;
  for (size_t lo = 0, hi = 0; lo < heads.size(); lo = hi) {
    uint64_t audits = 0;
    for (; hi < heads.size() && heads[hi].model == heads[lo].model; ++hi) {
      audits += heads[hi].figures.audits;
    }
    models.emplace_back(audits, heads.subspan(lo, std::min(hi - lo, kHeadsOfModel)));
  }
  std::stable_sort(models.begin(), models.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  models.resize(std::min(models.size(), kModels));
  std::vector<std::span<const HeadAudit>> most;
  for (const auto& model : models) most.push_back(model.second);
  return most;
}

}  // namespace

std::vector<MetricSample> Metrics::CollectAudits() const {
  const std::vector<HeadAudit> heads = engine_.AuditsOfAllTenants();
  const std::vector<std::span<const HeadAudit>> models = MostAudited(heads);
  std::vector<MetricSample> samples;
  for (const AuditFigure& figure : kFigures) {
    const auto type = std::string_view(figure.name).ends_with("_total")
                          ? MetricSample::Type::kCounter
                          : MetricSample::Type::kGauge;
    for (const std::span<const HeadAudit> model : models) {
      for (const HeadAudit& head : model) {
        const double value = figure.value(head.figures);
        if (std::isnan(value)) continue;  // no audit of a kind that has the figure
        samples.push_back({type,
                           figure.name,
                           figure.help,
                           {{"model", head.model},
                            {"layer", std::to_string(head.layer)},
                            {"kv_head", std::to_string(head.kv_head)}},
                           value});
      }
    }
  }
  return samples;
}

}  // namespace quarry
