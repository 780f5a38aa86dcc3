// The worker's JSON-lines interface (WORKER.md).
#pragma once

#include <istream>
#include <map>
#include <memory>
#include <ostream>
#include <span>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "absl/status/statusor.h"
#include "gpu/sampler.h"
#include "gpu/sequence.h"
#include "gpu/sequence_batch.h"

namespace quarry {

// Several sequences of one model. Not thread-safe.
class WorkerSession {
 public:
  // service may be null: full attention. All outlive the session.
  WorkerSession(const Model& model, Device& device, KvService* service,
                const SequenceOptions& options)
      : model_(model), device_(device), service_(service), options_(options) {}

  // One request and its answer; never throws, every failure is an answer.
  nlohmann::json Answer(const nlohmann::json& request);
  // The sequence that a request names. NotFound if it is not open.
  absl::StatusOr<Sequence*> Find(const nlohmann::json& request);
  // Until the end of the input; each answer is flushed.
  void Serve(std::istream& in, std::ostream& out);

 private:
  absl::StatusOr<nlohmann::json> Dispatch(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Open(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Ask(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Batch(const nlohmann::json& request);
  // A question and what has been answered so far.
  struct Asking;
  absl::Status Begin(const nlohmann::json& request, Asking* asking);
  // Runs what is to run, and predicts tokens, until all are done.
  void Generate(std::span<Asking> asked);
  std::vector<absl::StatusOr<uint32_t>> ExtendTogether(const std::vector<Sequence*>& sequences,
                                                       std::span<const uint32_t> tokens,
                                                       std::span<const TokenDraw> draws);
  absl::StatusOr<nlohmann::json> AnswerOf(const Asking& asking);
  // Before it ends.
  void DropBatchOf(const Sequence* sequence);
  absl::StatusOr<nlohmann::json> Fork(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Close(const nlohmann::json& request);
  absl::StatusOr<nlohmann::json> Stats();
  void AddCost(const Sequence& sequence, const AttendCost& before, nlohmann::json* out);

  const Model& model_;
  Device& device_;
  KvService* const service_;
  const SequenceOptions options_;
  uint64_t next_ = 1;
  std::map<uint64_t, std::unique_ptr<Sequence>> sequences_;
  std::unique_ptr<SequenceBatch> batch_;  // the latest, if its sequences are still there
};

}  // namespace quarry
