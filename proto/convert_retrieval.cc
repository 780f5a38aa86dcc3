// Attends and top-k.

#include "absl/strings/str_cat.h"
#include "proto/convert.h"
#include "proto/status_macros.h"

namespace quarry {

wire::Budget ToProto(const Budget& budget) {
  wire::Budget out;
  out.set_kind(static_cast<wire::BudgetKind>(budget.kind));
  out.set_k(budget.k);
  out.set_mass(budget.mass);
  out.set_error(budget.error);
  out.set_beta(budget.beta);
  out.set_seed(budget.seed);
  return out;
}

absl::StatusOr<Budget> FromProto(const wire::Budget& message) {
  if (message.kind() < 0 || message.kind() > static_cast<int>(Budget::kLastKind)) {
    return absl::InvalidArgumentError(
        absl::StrCat("budget kind is ", static_cast<int>(message.kind()), ", not a known kind"));
  }
  return Budget{.kind = static_cast<Budget::Kind>(message.kind()),
                .k = message.k(),
                .mass = message.mass(),
                .error = message.error(),
                .beta = message.beta(),
                .seed = message.seed()};
}

absl::StatusOr<RowFromWire> FromProto(const wire::AttendRow& message) {
  RowFromWire out;
  AttendRow& row = out.row;
  row.context.value = message.context();
  row.layer = message.layer();
  row.range = FromProto(message.range());
  row.first_head = message.first_head();
  row.heads = message.heads();
  QUARRY_ASSIGN_OR_RETURN(row.budget, FromProto(message.budget()));
  QUARRY_ASSIGN_OR_RETURN(row.q_dtype, DTypeFromWire(message.q_dtype(), "q_dtype"));
  row.q = message.q().data();
  out.q_bytes = message.q().size();
  row.merged = message.merged();
  row.token_position = message.position();
  row.has_token = message.has_token();
  if (row.has_token) {
    row.token_position = message.token().position();
    row.k = message.token().k().data();
    row.v = message.token().v().data();
    out.k_bytes = message.token().k().size();
    out.v_bytes = message.token().v().size();
  }
  return out;
}

wire::AttendRow ToProto(const AttendRow& row, uint32_t head_dim, uint32_t group, DType kv_dtype) {
  wire::AttendRow out;
  out.set_context(row.context.value);
  out.set_layer(row.layer);
  *out.mutable_range() = ToProto(row.range);
  out.set_first_head(row.first_head);
  out.set_heads(row.heads);
  *out.mutable_budget() = ToProto(row.budget);
  out.set_q_dtype(static_cast<wire::DType>(row.q_dtype));
  if (row.q != nullptr) {
    out.set_q(row.q, size_t{row.heads} * head_dim * DTypeBytes(row.q_dtype));
  }
  out.set_merged(row.merged);
  if (!row.has_token) out.set_position(row.token_position);
  if (row.has_token) {
    size_t bytes = size_t{row.heads / group} * head_dim * DTypeBytes(kv_dtype);
    out.mutable_token()->set_position(row.token_position);
    out.mutable_token()->set_k(row.k, bytes);
    out.mutable_token()->set_v(row.v, bytes);
  }
  return out;
}

wire::AttendAnswer ToProto(const AttendAnswer& answer) {
  wire::AttendAnswer out;
  out.set_status(static_cast<uint32_t>(answer.status.code()));
  if (!answer.status.ok()) {
    out.set_error(std::string(answer.status.message()));
    return out;
  }
  *out.mutable_covered() = ToProto(answer.covered);
  out.set_tokens_attended(answer.tokens_attended);
  out.set_bytes_touched(answer.bytes_touched);
  out.set_error_estimate(answer.error_estimate);
  out.set_shifted_tokens(answer.shifted_tokens);
  out.set_o(answer.o.data(), answer.o.size_bytes());
  out.set_lse(answer.lse.data(), answer.lse.size_bytes());
  return out;
}

absl::Status FromProto(const wire::AttendAnswer& message, AttendAnswer* answer) {
  answer->status =
      absl::Status(static_cast<absl::StatusCode>(message.status()), message.error());
  if (!answer->status.ok()) return answer->status;
  if (message.o().size() != answer->o.size_bytes() ||
      message.lse().size() != answer->lse.size_bytes()) {
    return absl::DataLossError(absl::StrCat("answer has ", message.o().size(), " bytes of o and ",
                                            message.lse().size(), " of lse, expected ",
                                            answer->o.size_bytes(), " and ",
                                            answer->lse.size_bytes()));
  }
  answer->covered = FromProto(message.covered());
  answer->tokens_attended = message.tokens_attended();
  answer->bytes_touched = message.bytes_touched();
  answer->error_estimate = message.error_estimate();
  answer->shifted_tokens = message.shifted_tokens();
  message.o().copy(reinterpret_cast<char*>(answer->o.data()), message.o().size());
  message.lse().copy(reinterpret_cast<char*>(answer->lse.data()), message.lse().size());
  return absl::OkStatus();
}

wire::TopKReply ToProto(const TopKAnswer& answer) {
  wire::TopKReply out;
  for (size_t h = 0; h < answer.heads.size(); ++h) {
    wire::TopKHead* head = out.add_heads();
    for (const TopKEntry& e : answer.heads[h]) {
      head->add_tokens(e.token);
      head->add_scores(e.score);
    }
    if (h < answer.k.size()) head->set_k(answer.k[h]);
    if (h < answer.v.size()) head->set_v(answer.v[h]);
  }
  out.set_shifted_tokens(answer.shifted_tokens);
  return out;
}

absl::StatusOr<TopKAnswer> FromProto(const wire::TopKReply& message) {
  TopKAnswer answer;
  for (const wire::TopKHead& head : message.heads()) {
    if (head.tokens_size() != head.scores_size()) {
      return absl::DataLossError(absl::StrCat("top-k head has ", head.tokens_size(),
                                              " tokens and ", head.scores_size(), " scores"));
    }
    std::vector<TopKEntry>& entries = answer.heads.emplace_back();
    for (int i = 0; i < head.tokens_size(); ++i) {
      entries.push_back({head.tokens(i), head.scores(i)});
    }
    answer.k.push_back(head.k());
    answer.v.push_back(head.v());
  }
  answer.shifted_tokens = message.shifted_tokens();
  return answer;
}

}  // namespace quarry
