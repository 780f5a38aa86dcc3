// `quarry audit`: what the daemon found when it compared its own answers with exact attention.
#include <cmath>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "client/cli/commands.h"
#include "client/cli/connection.h"
#include "client/cli/heat_map.h"
#include "proto/status_macros.h"

namespace quarry::cli {
namespace {

using nlohmann::json;

// Figures of a wrong index may have any size.
std::string Share(double value) {
  return std::isnan(value) ? "-" : absl::StrFormat("%.3g%%", 100 * value);
}
std::string Factor(double value) {
  return std::isnan(value) ? "-" : absl::StrFormat("%.3g", value);
}

void PrintHeader(const std::string& model) {
  std::printf("%s\n%7s %7s %8s %9s %9s %10s %8s %8s %7s %9s %8s %8s %7s\n", model.c_str(), "layer",
              "KV head", "audits", "error", "largest", "predicted", "median", "95%", "<= 2x",
              "lse error", "mass", "recall", "drifts");
}

void PrintLine(const std::string& layer, const std::string& head, const AuditFigures& f) {
  std::printf("%7s %7s %8llu %9s %9s %10s %8s %8s %7s %9s %8s %8s %7llu\n", layer.c_str(),
              head.c_str(), static_cast<unsigned long long>(f.audits), Share(f.error()).c_str(),
              Share(f.error_max).c_str(), Share(f.predicted()).c_str(),
              Factor(f.RatioQuantile(0.5)).c_str(), Factor(f.RatioQuantile(0.95)).c_str(),
              Share(f.within_twice_share()).c_str(), Share(f.mass_error()).c_str(),
              Share(f.mass()).c_str(), Share(f.recall()).c_str(),
              static_cast<unsigned long long>(f.drifts));
}

// A figure that no audit has is null.
json Number(double value) { return std::isnan(value) ? json() : json(value); }

json ToJson(const AuditFigures& f) {
  return {{"audits", f.audits},
          {"error", Number(f.error())},
          {"error_max", f.error_max},
          {"predicted", Number(f.predicted())},
          {"actual_by_predicted_p50", Number(f.RatioQuantile(0.5))},
          {"actual_by_predicted_p95", Number(f.RatioQuantile(0.95))},
          {"within_twice", Number(f.within_twice_share())},
          {"lse_error", Number(f.mass_error())},
          {"mass", Number(f.mass())},
          {"recall", Number(f.recall())},
          {"drifts", f.drifts}};
}

// Heads come by model: calls `head` for each and, behind the last of a model, `total`.
template <typename OnHead, typename OnTotal>
void VisitModels(std::span<const HeadAudit> heads, OnHead head, OnTotal total) {
  AuditFigures sum;
  for (size_t i = 0; i < heads.size(); ++i) {
    sum.Merge(heads[i].figures);
    head(heads[i], i == 0 || heads[i].model != heads[i - 1].model);
    if (i + 1 < heads.size() && heads[i + 1].model == heads[i].model) continue;
    total(heads[i].model, sum);
    sum = {};
  }
}

void PrintJson(std::span<const HeadAudit> audits) {
  json heads = json::array(), models = json::array();
  VisitModels(
      audits,
      [&](const HeadAudit& audit, bool) {
        json line = ToJson(audit.figures);
        line["model"] = audit.model;
        line["layer"] = audit.layer;
        line["kv_head"] = audit.kv_head;
        heads.push_back(std::move(line));
      },
      [&](const std::string& model, const AuditFigures& sum) {
        json line = ToJson(sum);
        line["model"] = model;
        models.push_back(std::move(line));
      });
  std::printf("%s\n", json({{"heads", heads}, {"models", models}}).dump().c_str());
}

void PrintTable(std::span<const HeadAudit> audits) {
  if (audits.empty()) {
    std::printf("no audits: no answer under a budget was drawn yet, or audit.fraction is 0\n");
    return;
  }
  VisitModels(
      audits,
      [](const HeadAudit& audit, bool first) {
        if (first) PrintHeader(audit.model);
        PrintLine(std::to_string(audit.layer), std::to_string(audit.kv_head), audit.figures);
      },
      [](const std::string&, const AuditFigures& sum) {
        PrintLine("all", "all", sum);
        std::printf("\n");
      });
  std::printf(
      "error: of o, by its length; median, 95%%, <= 2x: of actual by predicted error; lse error: "
      "of\n"
      "e^lse. mass, recall: what was attended, under budgets that drop the rest; under a "
      "tolerated\n"
      "error what was read one by one of the mass and of the 100 best tokens, where the rest is\n"
      "estimated. The worst query head of a KV head counts.\n");
}

}  // namespace

absl::Status Audit(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(const std::vector<HeadAudit> heads, client->Audits());
  if (!a.image.empty()) QUARRY_RETURN_IF_ERROR(DrawHeatMaps(heads).SavePng(a.image));
  if (a.json) {
    PrintJson(heads);
  } else {
    PrintTable(heads);
  }
  return absl::OkStatus();
}

}  // namespace quarry::cli
