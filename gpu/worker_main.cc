// quarry-worker: the reference worker's command line. See WORKER.md.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/program_socket.h"
#include "cpu_index/simd.h"
#include "gpu/cuda/cuda_device.h"
#include "gpu/sampler.h"
#include "gpu/sequence.h"
#include "gpu/serve.h"
#include "gpu/token_ids.h"
#include "gpu/tokenizer.h"
#include "gpu/trace_dump.h"
#include "gpu/worker_arguments.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

absl::StatusOr<std::vector<uint32_t>> PromptIds(const WorkerArguments& a,
                                                const Tokenizer* tokenizer) {
  std::vector<uint32_t> ids;
  if (tokenizer != nullptr) {
    QUARRY_ASSIGN_OR_RETURN(ids, tokenizer->Encode(a.prompt));
  } else {
    QUARRY_ASSIGN_OR_RETURN(ids, ParseTokenIds(a.prompt_ids));
  }
  if (ids.empty()) {
    return absl::InvalidArgumentError(
        "the prompt is empty: give --prompt-ids, --prompt or --serve");
  }
  return ids;
}

// What is to be generated behind what.
struct Task {
  std::vector<uint32_t> ids, gold;
  uint32_t new_tokens = 0, max_tokens = 0;
};

absl::StatusOr<Task> TaskOf(const WorkerArguments& a, const ModelConfig& config,
                            const Tokenizer* tokenizer) {
  Task task;
  QUARRY_ASSIGN_OR_RETURN(task.ids, PromptIds(a, tokenizer));
  QUARRY_ASSIGN_OR_RETURN(task.gold, ParseTokenIds(a.gold_ids));
  task.new_tokens = task.gold.empty() ? a.max_new_tokens : static_cast<uint32_t>(task.gold.size());
  const uint64_t wanted = uint64_t{task.ids.size()} + task.new_tokens;
  task.max_tokens = a.max_tokens != 0
                        ? a.max_tokens
                        : static_cast<uint32_t>(std::min<uint64_t>(config.max_tokens, wanted));
  return task;
}

// The code whose name an answer has.
absl::StatusCode CodeOf(const std::string& name) {
  constexpr int kLast = static_cast<int>(absl::StatusCode::kUnauthenticated);
  for (int code = 1; code <= kLast; ++code) {
    const auto of = static_cast<absl::StatusCode>(code);
    if (absl::StatusCodeToString(of) == name) return of;
  }
  return absl::StatusCode::kUnknown;
}

absl::Status Print(const WorkerArguments& a, const Tokenizer* tokenizer, nlohmann::json answer) {
  std::string text;
  if (answer["status"] == "OK") {
    const auto ids = answer["predicted"].get<std::vector<uint32_t>>();
    text = tokenizer != nullptr ? tokenizer->Decode(ids) : absl::StrJoin(ids, " ");
  }
  if (a.json) {
    if (tokenizer != nullptr) answer["text"] = text;
    // An answer may end inside a character.
    std::cout << answer.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << std::endl;
  }
  if (answer["status"] != "OK") {
    return absl::Status(CodeOf(answer["status"].get<std::string>()),
                        answer["error"].get<std::string>());
  }
  if (!a.json) std::cout << text << std::endl;
  return absl::OkStatus();
}

// The folder's name.
std::string ModelName(const std::string& folder) {
  const std::filesystem::path path = std::filesystem::path(folder).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

// A recorder if traces are to be written, and the directory for them.
absl::StatusOr<std::optional<QueryRecorder>> MakeRecorder(const WorkerArguments& a,
                                                          const ModelConfig& config) {
  if (a.dump_directory.empty()) return std::nullopt;
  if (a.serve) return absl::InvalidArgumentError("--dump-kv and --serve do not go together");
  if (a.reuse_shifted) {
    return absl::InvalidArgumentError("--dump-kv and --reuse-shifted do not go together");
  }
  QUARRY_ASSIGN_OR_RETURN(QueryRecorder recorder, QueryRecorder::Create(config, a.dump));
  std::error_code error;
  std::filesystem::create_directories(a.dump_directory, error);
  if (error) {
    return absl::InvalidArgumentError(absl::StrCat(a.dump_directory, ": ", error.message()));
  }
  return recorder;
}

// `recorder` takes the sequence's queries, if there is one; then its layers are written.
absl::Status Generate(const WorkerArguments& a, const Model& model, Task task,
                      const Tokenizer* tokenizer, const std::optional<QueryRecorder>& recorder,
                      WorkerSession* session) {
  // The prompt but for its last token, which begins the generation.
  const uint32_t last = task.ids.back();
  task.ids.pop_back();
  const nlohmann::json opened =
      session->Answer({{"op", "open"}, {"tokens", task.ids}, {"max_tokens", task.max_tokens}});
  if (opened["status"] != "OK") return Print(a, tokenizer, opened);
  nlohmann::json answer =
      session->Answer({{"op", "ask"},
                       {"sequence", opened["sequence"]},
                       {"tokens", {last}},
                       {"new", task.new_tokens},
                       {"gold", task.gold},
                       {"stop", a.ignore_end ? std::vector<uint32_t>() : model.config().end_tokens},
                       {"temperature", a.sampling.temperature},
                       {"top_p", a.sampling.top_p},
                       {"seed", a.sampling.seed}});
  answer["prefill_ms"] = opened["ttft_ms"];
  answer["reused_tokens"] = opened["reused_tokens"];
  if (recorder && answer["status"] == "OK") {
    QUARRY_ASSIGN_OR_RETURN(Sequence * sequence, session->Find(opened));
    QUARRY_RETURN_IF_ERROR(DumpTraces(*sequence, *recorder, ModelName(a.model), a.dump_directory));
  }
  return Print(a, tokenizer, answer);
}

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(const WorkerArguments& a) {
  const int ordinal = *ParseDeviceName(a.device);
  if (ordinal < 0) return MakeHostDevice({a.device_bytes, a.threads});
  return MakeCudaDevice({a.device_bytes, ordinal});
}

// The service's channel on a device that is to ring; nothing where the host is to.
absl::StatusOr<std::optional<HostMapping>> MapChannel(const WorkerArguments& a, Device* device,
                                                      KvService* service) {
  const bool wanted = a.rings == "device" || (a.rings == "auto" && a.device != "host");
  if (service == nullptr && a.rings == "device") {
    return absl::InvalidArgumentError("--rings device and --attention full do not go together");
  }
  if (service == nullptr || !wanted) return std::nullopt;
  absl::StatusOr<HostMapping> mapping = device->MapHost(service->channel_memory());
  if (mapping.ok()) return *std::move(mapping);
  if (a.rings == "device") return mapping.status();
  std::fprintf(stderr, "quarry-worker: the host sends what the device would: %s\n",
               std::string(mapping.status().message()).c_str());
  return std::nullopt;
}

absl::Status Run(const WorkerArguments& a) {
  const auto start = std::chrono::steady_clock::now();
  QUARRY_RETURN_IF_ERROR(ChooseSimdLevel().status());
  std::unique_ptr<Tokenizer> tokenizer;
  if (!a.prompt.empty()) {
    QUARRY_ASSIGN_OR_RETURN(tokenizer, Tokenizer::Load(a.model));
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Device> device, MakeDevice(a));
  QUARRY_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(a.model));
  Task task;
  if (!a.serve) {
    QUARRY_ASSIGN_OR_RETURN(task, TaskOf(a, config, tokenizer.get()));
  }
  const uint32_t room = !a.serve            ? task.max_tokens
                        : a.max_tokens != 0 ? a.max_tokens
                                            : config.max_tokens;
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Model> model,
                          Model::Load(a.model, device.get(), WeightOptionsOf(a, config, room)));
  std::unique_ptr<KvService> service;
  if (a.attention == "daemon") {
    ClientOptions options;
    options.socket_path = a.socket;
    options.name = "quarry-worker";
    options.deadline = absl::Milliseconds(a.deadline_ms);
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, ConnectProgram(options));
    service = MakeKvService(std::move(client));
  }
  QUARRY_ASSIGN_OR_RETURN(std::optional<QueryRecorder> recorder, MakeRecorder(a, model->config()));
  QUARRY_ASSIGN_OR_RETURN(const std::optional<HostMapping> mapping,
                          MapChannel(a, device.get(), service.get()));
  SequenceOptions sequence_options = SequenceOptionsOf(a, model->config());
  sequence_options.device_rings = mapping.has_value();
  if (recorder) sequence_options.recorder = &*recorder;
  PatternFile patterns;
  if (!a.patterns.empty()) {
    QUARRY_ASSIGN_OR_RETURN(patterns, LoadPatterns(a.patterns));
    sequence_options.patterns = &patterns;
  }
  WorkerSession session(*model, *device, service.get(), sequence_options);
  if (!a.serve) {
    return Generate(a, *model, std::move(task), tokenizer.get(), recorder, &session);
  }
  const double load_ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  std::cout << nlohmann::json({{"status", "OK"},
                               {"ready", true},
                               {"model", a.model},
                               {"vocab", model->config().vocab},
                               {"max_tokens", model->config().max_tokens},
                               {"load_ms", load_ms}})
                   .dump()
            << std::endl;
  session.Serve(std::cin, std::cout);
  return absl::OkStatus();
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::WorkerArguments arguments;
  CLI::App app("quarry-worker: runs a model with its K/V in the daemon");
  quarry::DescribeArguments(&app, &arguments);
  app.set_version_flag("--version", QUARRY_VERSION);
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = quarry::Run(arguments);
  if (status.ok()) return 0;
  std::fprintf(stderr, "quarry-worker: %s\n", status.ToString().c_str());
  return 1;
}
