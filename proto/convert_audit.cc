// Audits: messages to types and back.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/convert.h"

namespace quarry {

wire::HeadAudit ToProto(const HeadAudit& audit) {
  const AuditFigures& f = audit.figures;
  wire::HeadAudit out;
  out.set_model(audit.model);
  out.set_layer(audit.layer);
  out.set_kv_head(audit.kv_head);
  out.set_audits(f.audits);
  out.set_error_sum(f.error_sum);
  out.set_error_max(f.error_max);
  out.set_predicted_sum(f.predicted_sum);
  out.set_within_twice(f.within_twice);
  out.set_mass_error_sum(f.mass_error_sum);
  out.set_mass_audits(f.mass_audits);
  out.set_mass_sum(f.mass_sum);
  out.set_recall_audits(f.recall_audits);
  out.set_recall_sum(f.recall_sum);
  out.set_drifts(f.drifts);
  for (uint64_t n : f.ratios) out.add_ratios(n);
  return out;
}

absl::StatusOr<HeadAudit> FromProto(const wire::HeadAudit& message) {
  HeadAudit audit;
  AuditFigures& f = audit.figures;
  if (message.ratios_size() != AuditFigures::kRatioBuckets) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ratios has ", message.ratios_size(), " numbers, must have ", AuditFigures::kRatioBuckets));
  }
  audit.model = message.model();
  audit.layer = message.layer();
  audit.kv_head = message.kv_head();
  f.audits = message.audits();
  f.error_sum = message.error_sum();
  f.error_max = message.error_max();
  f.predicted_sum = message.predicted_sum();
  f.within_twice = message.within_twice();
  f.mass_error_sum = message.mass_error_sum();
  f.mass_audits = message.mass_audits();
  f.mass_sum = message.mass_sum();
  f.recall_audits = message.recall_audits();
  f.recall_sum = message.recall_sum();
  f.drifts = message.drifts();
  std::copy(message.ratios().begin(), message.ratios().end(), f.ratios.begin());
  return audit;
}

}  // namespace quarry
