#include "gpu/serve.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

double MsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

json Settled(absl::StatusOr<json> answer) {
  if (!answer.ok()) {
    return {{"status", absl::StatusCodeToString(answer.status().code())},
            {"error", std::string(answer.status().message())}};
  }
  (*answer)["status"] = "OK";
  return *std::move(answer);
}

// A count of 32 bits, whether the number was parsed or made.
bool IsCount(const json& x) {
  if (x.is_number_unsigned()) return x.get<uint64_t>() <= ~0u;
  return x.is_number_integer() && x.get<int64_t>() >= 0 && x.get<int64_t>() <= ~0u;
}

absl::StatusOr<std::vector<uint32_t>> TokensOf(const json& request, const char* key) {
  std::vector<uint32_t> out;
  if (!request.contains(key)) return out;
  if (!request[key].is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(key, " is not a list of token ids"));
  }
  for (const json& id : request[key]) {
    if (!IsCount(id)) {
      return absl::InvalidArgumentError(
          absl::StrCat(key, "[", out.size(), "] is ", id.dump(), ", not a token id"));
    }
    out.push_back(id.get<uint32_t>());
  }
  return out;
}

absl::StatusOr<uint32_t> CountOf(const json& request, const char* key, uint32_t otherwise) {
  if (!request.contains(key)) return otherwise;
  if (!IsCount(request[key])) {
    return absl::InvalidArgumentError(
        absl::StrCat(key, " is ", request[key].dump(), ", not a count"));
  }
  return request[key].get<uint32_t>();
}

absl::StatusOr<double> NumberOf(const json& request, const char* key, double otherwise) {
  if (!request.contains(key)) return otherwise;
  if (!request[key].is_number()) {
    return absl::InvalidArgumentError(
        absl::StrCat(key, " is ", request[key].dump(), ", not a number"));
  }
  return request[key].get<double>();
}

AttendCost Difference(const AttendCost& now, const AttendCost& before) {
  AttendCost d = now;
  d.head_steps -= before.head_steps;
  d.tokens_local -= before.tokens_local;
  d.tokens_daemon -= before.tokens_daemon;
  d.tokens_in_reach -= before.tokens_in_reach;
  d.bytes_touched -= before.bytes_touched;
  d.bytes_moved -= before.bytes_moved;
  d.recoveries -= before.recoveries;
  return d;
}

}  // namespace

json WorkerSession::Answer(const json& request) { return Settled(Dispatch(request)); }

void WorkerSession::Serve(std::istream& in, std::ostream& out) {
  std::string line;
  while (std::getline(in, line)) {
    if (line.empty()) continue;
    const json request = json::parse(line, nullptr, false);
    out << Answer(request).dump() << std::endl;
  }
}

absl::StatusOr<json> WorkerSession::Dispatch(const json& request) {
  if (!request.is_object() || !request.contains("op") || !request["op"].is_string()) {
    return absl::InvalidArgumentError("a request is a JSON object with an op");
  }
  const std::string op = request["op"].get<std::string>();
  if (op == "open") return Open(request);
  if (op == "ask") return Ask(request);
  if (op == "batch") return Batch(request);
  if (op == "fork") return Fork(request);
  if (op == "close") return Close(request);
  if (op == "stats") return Stats();
  return absl::InvalidArgumentError(absl::StrCat("op ", op, " is unknown"));
}

absl::StatusOr<Sequence*> WorkerSession::Find(const json& request) {
  QUARRY_ASSIGN_OR_RETURN(uint32_t id, CountOf(request, "sequence", 0));
  auto it = sequences_.find(id);
  if (it == sequences_.end()) {
    return absl::NotFoundError(absl::StrCat("sequence ", id, " is not open"));
  }
  return it->second.get();
}

void WorkerSession::AddCost(const Sequence& sequence, const AttendCost& before, json* out) {
  const AttendCost cost = Difference(sequence.cost(), before);
  const double steps = cost.head_steps == 0 ? 1.0 : static_cast<double>(cost.head_steps);
  (*out)["head_steps"] = cost.head_steps;
  (*out)["tokens_attended_mean"] =
      static_cast<double>(cost.tokens_local + cost.tokens_daemon) / steps;
  (*out)["daemon_tokens_attended_mean"] = static_cast<double>(cost.tokens_daemon) / steps;
  (*out)["tokens_in_reach_mean"] = static_cast<double>(cost.tokens_in_reach) / steps;
  (*out)["bytes_touched"] = cost.bytes_touched;
  (*out)["bytes_moved"] = cost.bytes_moved;
  (*out)["recoveries"] = cost.recoveries;
  (*out)["worker_kv_bytes"] = sequence.local_kv_bytes();
  (*out)["tokens"] = sequence.tokens();
  (*out)["shifted_tokens"] = sequence.shifted_tokens();
  uint64_t held = 0;
  if (service_ != nullptr) held = service_->HeldBytes(sequence.context()).value_or(0);
  (*out)["daemon_kv_bytes"] = held;
}

absl::StatusOr<json> WorkerSession::Open(const json& request) {
  const Clock::time_point start = Clock::now();
  QUARRY_ASSIGN_OR_RETURN(std::vector<uint32_t> tokens, TokensOf(request, "tokens"));
  QUARRY_ASSIGN_OR_RETURN(uint32_t max_tokens,
                          CountOf(request, "max_tokens", model_.config().max_tokens));
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Sequence> sequence,
                          Sequence::Open(model_, device_, service_, options_, tokens, max_tokens));
  json out = {{"sequence", next_}, {"reused_tokens", sequence->reused_tokens()}};
  if (!tokens.empty()) {
    QUARRY_ASSIGN_OR_RETURN(
        out["predicted"],
        sequence->ExtendAndDraw(std::span(tokens).subspan(sequence->reused_tokens()),
                                Sequence::Role::kPrompt, {}));
  }
  out["ttft_ms"] = MsSince(start);
  AddCost(*sequence, {}, &out);
  sequences_[next_++] = std::move(sequence);
  return out;
}

struct WorkerSession::Asking {
  const Clock::time_point start = Clock::now();
  Sequence* sequence = nullptr;    // null: status says why
  std::unique_ptr<Sequence> fork;  // asked in place of the one that was named
  std::vector<uint32_t> next;      // to run; none: it is done
  std::vector<uint32_t> gold, stop;
  uint32_t wanted = 1;
  std::optional<Sampler> sampler;
  AttendCost before;
  absl::Status status;
  std::vector<uint32_t> predicted;
  double ttft_ms = 0, total_ms = 0;

  bool done() const { return next.empty(); }
  void End(absl::Status with) {
    status = std::move(with);
    total_ms = MsSince(start);
    next.clear();
  }
  // Of the token after what is to run.
  TokenDraw NextDraw() { return predicted.size() < wanted ? sampler->Draw() : TokenDraw(); }
  void Take(const absl::StatusOr<uint32_t>& token) {
    if (!token.ok() || predicted.size() == wanted) return End(token.status());
    const size_t i = predicted.size();
    predicted.push_back(*token);
    if (i == 0) ttft_ms = MsSince(start);
    const bool stops = std::find(stop.begin(), stop.end(), predicted.back()) != stop.end();
    // The last token is run only if it is a gold one.
    if (stops || (gold.empty() && i + 1 == wanted)) return End(absl::OkStatus());
    next = {gold.empty() ? predicted.back() : gold[i]};
  }
};

absl::Status WorkerSession::Begin(const json& request, Asking* asking) {
  QUARRY_ASSIGN_OR_RETURN(Sequence * sequence, Find(request));
  QUARRY_ASSIGN_OR_RETURN(std::vector<uint32_t> tokens, TokensOf(request, "tokens"));
  QUARRY_ASSIGN_OR_RETURN(asking->gold, TokensOf(request, "gold"));
  QUARRY_ASSIGN_OR_RETURN(asking->stop, TokensOf(request, "stop"));
  QUARRY_ASSIGN_OR_RETURN(asking->wanted, CountOf(request, "new", 1));
  SamplerOptions sampling;
  QUARRY_ASSIGN_OR_RETURN(sampling.temperature, NumberOf(request, "temperature", 0));
  if (!(sampling.temperature >= 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature is ", sampling.temperature, ", it must be at least 0"));
  }
  QUARRY_ASSIGN_OR_RETURN(sampling.top_p, NumberOf(request, "top_p", 1));
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_p is ", sampling.top_p, ", it must be above 0 and at most 1"));
  }
  QUARRY_ASSIGN_OR_RETURN(sampling.seed, CountOf(request, "seed", 0));
  if (!asking->gold.empty() && asking->gold.size() != asking->wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat("gold has ", asking->gold.size(), " tokens, new is ", asking->wanted));
  }
  if (tokens.empty()) return absl::InvalidArgumentError("no tokens to run");
  if (request.value("fork", json(false)) == json(true)) {
    QUARRY_ASSIGN_OR_RETURN(asking->fork, sequence->Fork());
    sequence = asking->fork.get();
  }
  asking->sequence = sequence;
  asking->next = std::move(tokens);
  asking->before = sequence->cost();
  asking->sampler.emplace(sampling);
  return absl::OkStatus();
}

// All that run one token next do so together.
void WorkerSession::Generate(std::span<Asking> asked) {
  for (;;) {
    std::vector<Asking*> together;
    std::vector<Sequence*> sequences;
    std::vector<uint32_t> tokens;
    std::vector<TokenDraw> draws;
    bool any = false;
    for (Asking& asking : asked) {
      any |= !asking.done();
      if (asking.next.size() == 1) {
        together.push_back(&asking);
        sequences.push_back(asking.sequence);
        tokens.push_back(asking.next.front());
        draws.push_back(asking.NextDraw());
      } else if (!asking.done()) {
        asking.Take(asking.sequence->ExtendAndDraw(asking.next, Sequence::Role::kBudgeted,
                                                   asking.NextDraw()));
      }
    }
    if (!any) return;
    if (together.empty()) continue;
    const auto chosen = ExtendTogether(sequences, tokens, draws);
    for (size_t i = 0; i < together.size(); ++i) together[i]->Take(chosen[i]);
  }
}

std::vector<absl::StatusOr<uint32_t>> WorkerSession::ExtendTogether(
    const std::vector<Sequence*>& sequences, std::span<const uint32_t> tokens,
    std::span<const TokenDraw> draws) {
  if (sequences.size() == 1) {
    return {sequences[0]->ExtendAndDraw(tokens, Sequence::Role::kBudgeted, draws[0])};
  }
  if (batch_ == nullptr || !std::ranges::equal(batch_->sequences(), sequences)) {
    batch_ = std::make_unique<SequenceBatch>(sequences);
  }
  return batch_->ExtendAndDraw(tokens, draws);
}

absl::StatusOr<json> WorkerSession::AnswerOf(const Asking& asking) {
  QUARRY_RETURN_IF_ERROR(asking.status);
  json out = {
      {"predicted", asking.predicted}, {"ttft_ms", asking.ttft_ms}, {"total_ms", asking.total_ms}};
  AddCost(*asking.sequence, asking.before, &out);
  return out;
}

void WorkerSession::DropBatchOf(const Sequence* sequence) {
  if (batch_ != nullptr && std::ranges::count(batch_->sequences(), sequence) > 0) batch_.reset();
}

absl::StatusOr<json> WorkerSession::Ask(const json& request) {
  Asking asking;
  QUARRY_RETURN_IF_ERROR(Begin(request, &asking));
  Generate({&asking, 1});
  return AnswerOf(asking);
}

absl::StatusOr<json> WorkerSession::Batch(const json& request) {
  if (!request.contains("asks") || !request["asks"].is_array()) {
    return absl::InvalidArgumentError("a batch has asks, a list");
  }
  std::vector<Asking> asked(request["asks"].size());
  std::set<const Sequence*> sequences;
  for (size_t i = 0; i < asked.size(); ++i) {
    const json& ask = request["asks"][i];
    absl::Status begun = ask.is_object() ? Begin(ask, &asked[i])
                                         : absl::InvalidArgumentError("an ask is a JSON object");
    if (begun.ok() && !sequences.insert(asked[i].sequence).second) {
      begun = absl::InvalidArgumentError(absl::StrCat("asks[", i, "] names sequence ",
                                                      ask["sequence"].dump(),
                                                      " once more, and no fork of it"));
    }
    if (!begun.ok()) asked[i].End(begun);
  }
  Generate(asked);
  json answers = json::array();
  for (const Asking& asking : asked) {
    answers.push_back(Settled(AnswerOf(asking)));
    if (asking.fork != nullptr) DropBatchOf(asking.fork.get());
  }
  return json{{"answers", std::move(answers)}};
}

absl::StatusOr<json> WorkerSession::Fork(const json& request) {
  QUARRY_ASSIGN_OR_RETURN(Sequence * sequence, Find(request));
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Sequence> fork, sequence->Fork());
  json out = {{"sequence", next_}, {"tokens", fork->tokens()}};
  sequences_[next_++] = std::move(fork);
  return out;
}

absl::StatusOr<json> WorkerSession::Close(const json& request) {
  QUARRY_ASSIGN_OR_RETURN(const Sequence* sequence, Find(request));
  DropBatchOf(sequence);
  sequences_.erase(request["sequence"].get<uint64_t>());
  return json::object();
}

absl::StatusOr<json> WorkerSession::Stats() {
  uint64_t local = 0, held = 0;
  for (const auto& [id, sequence] : sequences_) {
    local += sequence->local_kv_bytes();
    if (service_ == nullptr) continue;
    QUARRY_ASSIGN_OR_RETURN(uint64_t bytes, service_->HeldBytes(sequence->context()));
    held += bytes;
  }
  const DeviceStats device = device_.Stats();
  return json{{"worker_kv_bytes", local},
              {"daemon_kv_bytes", held},
              {"device", std::string(device_.name())},
              {"device_peak_bytes", device.peak_bytes},
              {"device_overhead_bytes", device.overhead_bytes},
              {"device_mapped_bytes", device.mapped_bytes},
              {"device_driver_used_bytes", device.driver_used_bytes},
              {"weights_resident_bytes", model_.residence().resident_bytes},
              {"weights_streamed_bytes", model_.residence().streamed_bytes},
              {"weights_spare_bytes", model_.spare_weight_bytes()}};
}

}  // namespace quarry
