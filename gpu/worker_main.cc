// quarry-worker: the reference worker's command line. See WORKER.md.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>

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
#include "gpu/working_bytes.h"
#include "proto/default_socket.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

struct Arguments {
  std::string model, socket = DefaultSocket(), attention = "daemon", kv_dtype;
  std::string prompt, prompt_ids, gold_ids;
  bool serve = false, json = false, ignore_end = false, reuse_shifted = false;
  uint32_t max_tokens = 0, max_new_tokens = 16, threads = 0, deadline_ms = 10000;
  uint32_t window_first = 128, window_last = 512;
  uint32_t budget_k = 0;
  double budget_share = 0, budget_mass = 0, budget_error = 0, budget_beta = -1;
  uint32_t budget_lift = 0, budget_seed = 0;
  std::string device = "host";
  uint64_t device_bytes = 16ull << 30;
  std::string weights = "auto", weights_dtype;
  std::optional<uint64_t> reserve_bytes;
  SamplerOptions sampling;
  std::string dump_directory, patterns;
  QueryRecorderOptions dump;
};

// Of host, cuda and cuda:N: the card's number, -1 for the host.
std::optional<int> ParseDevice(std::string_view name) {
  if (name == "host") return -1;
  if (name == "cuda") return 0;
  if (!name.starts_with("cuda:")) return std::nullopt;
  name.remove_prefix(5);
  int ordinal = 0;
  const char* const end = name.data() + name.size();
  const auto [next, error] = std::from_chars(name.data(), end, ordinal);
  if (error != std::errc() || next != end || ordinal < 0) return std::nullopt;
  return ordinal;
}

void Describe(CLI::App* app, Arguments* a) {
  app->add_option("--model", a->model, "Hugging Face folder of the model")->required();
  app->add_option("--socket", a->socket, "the daemon's shared-memory socket")
      ->envname(kSocketVariable);
  app->add_option("--attention", a->attention, "daemon, or full: everything in the worker")
      ->check(CLI::IsMember({"daemon", "full"}));
  app->add_option("--prompt", a->prompt, "text, if the model has a tokenizer.model");
  app->add_option("--prompt-ids", a->prompt_ids, "token ids, or @FILE with them");
  app->add_option("--gold-ids", a->gold_ids,
                  "token ids, or @FILE, to go on with in place of the generated ones");
  app->add_option("--max-new-tokens", a->max_new_tokens, "tokens to generate");
  app->add_option("--max-tokens", a->max_tokens, "room of the context; pins the rope regime");
  app->add_option("--kv-dtype", a->kv_dtype, "bf16, fp16 or fp32; the model's by default")
      ->check(CLI::IsMember({"bf16", "fp16", "fp32"}));
  app->add_option("--window-first", a->window_first, "first tokens that stay in the worker");
  app->add_option("--window-last", a->window_last, "last tokens that stay in the worker");
  app->add_option("--budget-k", a->budget_k, "tokens the daemon attends; with --budget-mass, -error or -beta a cap");
  app->add_option("--budget-share", a->budget_share, "share of its tokens the daemon attends")
      ->check(CLI::Range(0.0, 1.0));
  app->add_option("--budget-mass", a->budget_mass, "softmax mass the daemon attends")
      ->check(CLI::Range(0.0, 1.0));
  app->add_option("--budget-error", a->budget_error, "tolerated relative error of the answer")
      ->check(CLI::Range(1e-6, 0.999999));
  app->add_option("--budget-beta", a->budget_beta,
                  "DIPR: tokens whose score is at most so many nats below the largest")
      ->check(CLI::Range(0.0, 1e6));
  app->add_option("--budget-lift", a->budget_lift, "SoftmaxLift: tokens that the daemon samples")
      ->check(CLI::PositiveNumber);
  app->add_option("--budget-seed", a->budget_seed, "of these samples");
  for (const char* kind : {"--budget-share", "--budget-mass", "--budget-error", "--budget-beta",
                           "--budget-lift"}) {
    for (const char* other : {"--budget-share", "--budget-mass", "--budget-error", "--budget-beta",
                              "--budget-lift"}) {
      if (std::string_view(kind) != other) app->get_option(kind)->excludes(other);
    }
  }
  app->add_option("--prefill-patterns", a->patterns,
                  "what heads attend in the prefill: a file of quarry-patterns; approximate");
  app->add_flag("--reuse-shifted", a->reuse_shifted,
                "also reuse what is cached at another position or behind other text: approximate");
  app->add_option("--deadline-ms", a->deadline_ms, "of every request to the daemon");
  app->add_flag("--ignore-eos", a->ignore_end, "go on behind the model's end-of-sequence token");
  app->add_option("--temperature", a->sampling.temperature, "0: greedy")
      ->check(CLI::NonNegativeNumber);
  app->add_option("--top-p", a->sampling.top_p, "nucleus of the sampling");
  app->add_option("--seed", a->sampling.seed, "of the sampling");
  app->add_option("--threads", a->threads, "of the host's work; 0: all cores");
  app->add_option("--device", a->device, "where the model runs: host, cuda or cuda:N")
      ->check([](const std::string& name) {
        return ParseDevice(name) ? std::string() : "device " + name + ": not host, cuda or cuda:N";
      });
  app->add_option("--device-bytes", a->device_bytes,
                  "budget of the worker's memory, on whatever device");
  app->add_option("--weights", a->weights,
                  "resident on the device, streamed from the host layer by layer, or auto: as many "
                  "resident as fit")
      ->check(CLI::IsMember({"auto", "resident", "streamed"}));
  app->add_option("--weights-dtype", a->weights_dtype,
                  "int8 or int4: layers' weights as codes of so many bits; as stored by default")
      ->check(CLI::IsMember({"int8", "int4"}));
  app->add_option("--reserve-bytes", a->reserve_bytes,
                  "device memory that --weights auto leaves to activations and K/V; by default "
                  "what a prefill of --max-tokens takes");
  CLI::Option* const dump =
      app->add_option("--dump-kv", a->dump_directory,
                      "write layers as traces, to measure retrieval on, to this directory")
          ->check([](const std::string& path) {
            return path.empty() ? std::string("no directory is named") : std::string();
          });
  app->add_option("--dump-layers", a->dump.layers, "of the traces; all by default")
      ->delimiter(',')
      ->needs(dump);
  app->add_option("--dump-queries", a->dump.prompt_queries, "of the prompt, in each trace")
      ->needs(dump);
  app->add_option("--dump-seed", a->dump.seed, "of the places of these queries")->needs(dump);
  app->add_flag("--serve", a->serve, "JSON lines on standard input and output");
  app->add_flag("--json", a->json, "print one JSON object");
}

SequenceOptions OptionsOf(const Arguments& a, const ModelConfig& config) {
  SequenceOptions options;
  options.window = {a.window_first, a.window_last, a.attention == "full"};
  options.kv_dtype = a.kv_dtype.empty()     ? config.dtype
                     : a.kv_dtype == "bf16" ? DType::kBf16
                     : a.kv_dtype == "fp16" ? DType::kFp16
                                            : DType::kFp32;
  Budget& budget = options.budget.budget;
  budget.k = a.budget_k;
  budget.seed = a.budget_seed;
  if (a.budget_error > 0) {
    budget.kind = Budget::Kind::kError;
    budget.error = static_cast<float>(a.budget_error);
  } else if (a.budget_beta >= 0) {
    budget.kind = Budget::Kind::kDipr;
    budget.beta = static_cast<float>(a.budget_beta);
  } else if (a.budget_lift > 0) {
    budget.kind = Budget::Kind::kSoftmaxLift;
    budget.k = a.budget_lift;
  } else if (a.budget_mass > 0) {
    budget.kind = Budget::Kind::kTopP;
    budget.mass = static_cast<float>(a.budget_mass);
  } else if (a.budget_k > 0) {
    budget.kind = Budget::Kind::kFixedK;
  }
  options.budget.share = a.budget_share;
  options.reuse_shifted = a.reuse_shifted;
  return options;
}

absl::StatusOr<std::vector<uint32_t>> PromptIds(const Arguments& a, const Tokenizer* tokenizer) {
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

absl::StatusOr<Task> TaskOf(const Arguments& a, const ModelConfig& config,
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

// For one context of max_tokens tokens.
WeightOptions WeightsOf(const Arguments& a, const ModelConfig& config, uint32_t max_tokens) {
  WeightOptions weights;
  weights.mode = a.weights == "resident"   ? WeightMode::kResident
                 : a.weights == "streamed" ? WeightMode::kStreamed
                                           : WeightMode::kAuto;
  weights.form = a.weights_dtype == "int8"   ? WeightForm::kInt8
                 : a.weights_dtype == "int4" ? WeightForm::kInt4
                                             : WeightForm::kPlain;
  weights.reserve_bytes = a.reserve_bytes ? *a.reserve_bytes
                                          : WorkingBytes(config, OptionsOf(a, config), max_tokens,
                                                         a.attention == "daemon");
  return weights;
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

absl::Status Print(const Arguments& a, const Tokenizer* tokenizer, nlohmann::json answer) {
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
absl::StatusOr<std::optional<QueryRecorder>> MakeRecorder(const Arguments& a,
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
absl::Status Generate(const Arguments& a, const Model& model, Task task, const Tokenizer* tokenizer,
                      const std::optional<QueryRecorder>& recorder, WorkerSession* session) {
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

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(const Arguments& a) {
  const int ordinal = *ParseDevice(a.device);
  if (ordinal < 0) return MakeHostDevice({a.device_bytes, a.threads});
  return MakeCudaDevice({a.device_bytes, ordinal});
}

absl::Status Run(const Arguments& a) {
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
                          Model::Load(a.model, device.get(), WeightsOf(a, config, room)));
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
  SequenceOptions sequence_options = OptionsOf(a, model->config());
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
  quarry::Arguments arguments;
  CLI::App app("quarry-worker: runs a model with its K/V in the daemon");
  quarry::Describe(&app, &arguments);
  app.set_version_flag("--version", QUARRY_VERSION);
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = quarry::Run(arguments);
  if (status.ok()) return 0;
  std::fprintf(stderr, "quarry-worker: %s\n", status.ToString().c_str());
  return 1;
}
