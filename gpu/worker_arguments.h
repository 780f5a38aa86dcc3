// quarry-worker's arguments, and the options that they are turned into. See WORKER.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gpu/model.h"
#include "gpu/query_recorder.h"
#include "gpu/sampler.h"
#include "gpu/sequence.h"
#include "proto/default_socket.h"

namespace CLI {
class App;
}

namespace quarry {

struct WorkerArguments {
  std::string model, socket = DefaultSocket(), attention = "daemon", kv_dtype;
  std::string prompt, prompt_ids, gold_ids;
  bool serve = false, json = false, ignore_end = false, reuse_shifted = false;
  uint32_t max_tokens = 0, max_new_tokens = 16, threads = 0, deadline_ms = 10000;
  uint32_t window_first = 128, window_last = 512;
  uint32_t query_samples = SequenceOptions().query_samples;
  uint32_t budget_k = 0;
  double budget_share = 0, budget_mass = 0, budget_error = 0, budget_beta = -1;
  uint32_t budget_lift = 0, budget_seed = 0;
  std::string device = "host";
  uint64_t device_bytes = 16ull << 30;
  std::string weights = "auto", weights_dtype;
  std::string rings = "auto", local_kv = "device";
  std::optional<uint64_t> reserve_bytes;
  SamplerOptions sampling;
  std::string dump_directory, patterns;
  QueryRecorderOptions dump;
};

// Of host, cuda and cuda:N: the card's number, -1 for the host. Nothing for another name.
std::optional<int> ParseDeviceName(std::string_view name);

void DescribeArguments(CLI::App* app, WorkerArguments* a);

SequenceOptions SequenceOptionsOf(const WorkerArguments& a, const ModelConfig& config);

// For one context of max_tokens tokens.
WeightOptions WeightOptionsOf(const WorkerArguments& a, const ModelConfig& config,
                              uint32_t max_tokens);

}  // namespace quarry
