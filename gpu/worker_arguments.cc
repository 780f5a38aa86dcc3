#include "gpu/worker_arguments.h"

#include <charconv>
#include <limits>
#include <string>

#include <CLI/CLI.hpp>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/program_socket.h"
#include "gpu/working_bytes.h"

namespace quarry {
namespace {

// CLI::Range takes what is not a number.
CLI::Validator Between(double least, double most) {
  const auto check = [=](const std::string& text) -> std::string {
    double value = 0;
    if (absl::SimpleAtod(text, &value) && value >= least && value <= most) return {};
    return absl::StrCat("'", text, "' is not a number from ", least, " to ", most);
  };
  return {check, absl::StrCat("[", least, " - ", most, "]")};
}

}  // namespace

std::optional<int> ParseDeviceName(std::string_view name) {
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

void DescribeArguments(CLI::App* app, WorkerArguments* a) {
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
  app->add_option("--query-samples", a->query_samples,
                  "positions of a prefill whose queries the daemon gets, to learn indexes from")
      ->check(CLI::Range(0, 4096));
  app->add_option("--budget-k", a->budget_k,
                  "tokens the daemon attends; with --budget-mass, -error or -beta a cap");
  app->add_option("--budget-share", a->budget_share, "share of its tokens the daemon attends")
      ->check(Between(1e-6, 1));
  app->add_option("--budget-mass", a->budget_mass, "softmax mass the daemon attends")
      ->check(Between(1e-6, 1));
  app->add_option("--budget-error", a->budget_error, "tolerated relative error of the answer")
      ->check(Between(1e-6, 0.999999));
  app->add_option("--budget-beta", a->budget_beta,
                  "DIPR: tokens whose score is at most so many nats below the largest")
      ->check(Between(0, 1e6));
  app->add_option("--budget-lift", a->budget_lift, "SoftmaxLift: tokens that the daemon samples")
      ->check(CLI::Range(1u, ~0u));
  app->add_option("--budget-seed", a->budget_seed, "of these samples");
  for (const char* kind :
       {"--budget-share", "--budget-mass", "--budget-error", "--budget-beta", "--budget-lift"}) {
    for (const char* other :
         {"--budget-share", "--budget-mass", "--budget-error", "--budget-beta", "--budget-lift"}) {
      if (std::string_view(kind) != other) app->get_option(kind)->excludes(other);
    }
  }
  for (const char* kind : {"--budget-share", "--budget-lift"}) {  // these say how many themselves
    app->get_option(kind)->excludes("--budget-k");
  }
  app->add_option("--prefill-patterns", a->patterns,
                  "what heads attend in the prefill: a file of quarry-patterns; approximate");
  app->add_flag("--reuse-shifted", a->reuse_shifted,
                "also reuse what is cached at another position or behind other text: approximate");
  app->add_option("--deadline-ms", a->deadline_ms, "of every request to the daemon");
  app->add_flag("--ignore-eos", a->ignore_end, "go on behind the model's end-of-sequence token");
  app->add_option("--temperature", a->sampling.temperature, "0: greedy")
      ->check(Between(0, std::numeric_limits<double>::max()));
  app->add_option("--top-p", a->sampling.top_p, "nucleus of the sampling: above 0, at most 1")
      ->check(Between(std::numeric_limits<double>::denorm_min(), 1));
  app->add_option("--seed", a->sampling.seed, "of the sampling");
  app->add_option("--threads", a->threads, "of the host's work; 0: all cores");
  app->add_option("--device", a->device, "where the model runs: host, cuda or cuda:N")
      ->check([](const std::string& name) {
        return ParseDeviceName(name) ? std::string()
                                     : "device " + name + ": not host, cuda or cuda:N";
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
  app->add_option("--local-kv", a->local_kv,
                  "where the worker's own K/V lie: on the device, or in the host's memory, which a "
                  "card reads over its link")
      ->check(CLI::IsMember({"device", "host"}));
  app->add_option("--rings", a->rings,
                  "who sends a token's queries to the daemon and waits for its answers: the device "
                  "itself, the host, or auto: a card that can")
      ->check(CLI::IsMember({"auto", "device", "host"}));
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

SequenceOptions SequenceOptionsOf(const WorkerArguments& a, const ModelConfig& config) {
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
  options.local_kv = a.local_kv == "host" ? KvMemory::kHost : KvMemory::kDevice;
  options.budget.share = a.budget_share;
  options.reuse_shifted = a.reuse_shifted;
  options.query_samples = a.query_samples;
  return options;
}

WeightOptions WeightOptionsOf(const WorkerArguments& a, const ModelConfig& config,
                              uint32_t max_tokens) {
  WeightOptions weights;
  // On the host they would be streamed from the same memory.
  weights.mode = a.weights == "streamed"                         ? WeightMode::kStreamed
                 : a.weights == "resident" || a.device == "host" ? WeightMode::kResident
                                                                 : WeightMode::kAuto;
  weights.form = a.weights_dtype == "int8"   ? WeightForm::kInt8
                 : a.weights_dtype == "int4" ? WeightForm::kInt4
                                             : WeightForm::kPlain;
  weights.reserve_bytes = a.reserve_bytes ? *a.reserve_bytes
                                          : WorkingBytes(config, SequenceOptionsOf(a, config),
                                                         max_tokens, a.attention == "daemon");
  weights.leave_free_bytes = kOperationBytes;
  return weights;
}

}  // namespace quarry
