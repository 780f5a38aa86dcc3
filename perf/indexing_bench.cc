// Indexing beside decoding: how much the threads that build indexes disturb decode steps, what a
// step takes before, while and after its context's runs are indexed, and how long that takes.
//
// Workload: contexts of made heads (retrieval/synthetic_trace.h; layers take turns with the
// families), prefilled layer by layer with sampled queries. A step is one token as an engine
// decodes it over shared memory, with a tolerated error, back to back, with nothing between two
// steps: id declared, and per layer K and V stored and all but the window attended. Steps go on
// from one length (perf/made_context.h). Each round has a daemon without blocks and these phases:
//   scanned        the prompt's ids are not known yet, so that no run is there
//   own first      they are: the context's own runs get their first indexes
//   own again      four times the samples came, as many as are kept: the same runs are learned
//                  again, while their first indexes are searched
//   indexed        nothing is being indexed
//   other first    another context has just been prefilled: its runs get their first indexes
//   indexed
// then the other context is closed, and two more are prefilled and indexed, one after another, with
// nobody decoding: one as fast as its K and V are taken, one that computes each layer for
// --layer-seconds, as a model does. A phase of indexing lasts until all is indexed, and has the
// steps that ended before. `disturbed` compares the steps of all rounds with those of the phases
// `indexed`, `own first` with those of `scanned`, since a step ends up shorter than it began.
// `build`: seconds from the end of the prefill (own first: from the ids) until all runs are
// indexed, and the processor time of the index threads since the beginning of the prefill, also by
// GiB of the runs' K and V. The own runs are all there at once; those of a prefill come layer by
// layer. Floor of a step: K and V, or of runs with an index its codes and what is read exactly,
// over the machine's read bandwidth (kernel_bench, retrieval_bench).
//
// Prints a table; --json prints JSON lines.
#include <bit>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "perf/bench_daemon.h"
#include "perf/head_dim_option.h"
#include "perf/indexing_report.h"
#include "perf/made_context.h"
#include "perf/retrieval/synthetic_trace.h"
#include "perf/retrieval/truth.h"

namespace quarry {
namespace {

using perf::Die;
using perf::IndexBuild;
using perf::IndexState;
using perf::IndexingFormat;
using perf::IndexingPhase;
using perf::IndexingReport;
using perf::MadeContext;
using perf::MadeModel;

constexpr perf::Window kWindow;
// With that many the runs are learned again once, however many live queries were sampled before.
constexpr uint32_t kTimesMoreSamples = 4;
constexpr uint32_t kSampleEvery = 16;  // live attends, of which the daemon samples one
constexpr absl::Duration kPoll = absl::Milliseconds(10);  // between two looks at the indexes

struct Settings {
  uint32_t runs = 4, run_tokens = 8192;
  uint32_t layers = 4, kv_heads = 4, heads = 16, head_dim = 128;
  std::vector<std::string> families = {"rope", "mass-300"};
  float error = 0.05f;
  uint32_t samples = 64;  // of a prefill
  double layer_seconds = 2;  // of the one that computes
  uint32_t executor_threads = 0, index_threads = 1;
  uint32_t steps = 512;  // of a phase in which nothing is indexed
  uint32_t rounds = 1;
  double limit_seconds = 120;  // of a phase in which something is
  uint32_t seed = 1;
  std::string daemon;
  bool quick = false, json = false;

  // Behind the last run comes nothing but what the window holds.
  uint32_t tokens() const { return kWindow.first + runs * run_tokens + kWindow.last; }
  void MakeQuick() {
    runs = 3;
    run_tokens = 2048;
    layers = 2;
    kv_heads = 1;
    heads = 2;
    head_dim = 64;
    families = {"rope"};
    samples = 32;
    layer_seconds = 0.1;
    steps = 32;
    limit_seconds = 30;
  }
};

class Bench {
 public:
  Bench(const Settings& settings, const MadeModel& model)
      : settings_(settings), model_(model), report_(ReportOptions()) {}

  void Run() {
    for (round_ = 0; round_ < settings_.rounds; ++round_) RunRound();
    report_.Compare("own first", "scanned");
    report_.Compare("own again", "indexed");
    report_.Compare("other first", "indexed");
  }

 private:
  using Reached = std::function<bool(const IndexState&)>;

  void StartDaemon();
  void RunRound();
  void DecodeQuietly(const char* name, MadeContext* context);
  void DecodeWhileIndexing(const char* name, MadeContext* context, const Reached& reached);
  // DeadlineExceeded after the limit.
  IndexState WaitUntil(const char* what, const Reached& reached) const;
  void PrefillAndWait(const char* name, const MadeContext::Options& options);
  IndexBuild BeginBuild(const char* name) const;
  void EndBuild(IndexBuild build);
  static bool AllIndexed(const IndexState& s) {
    return s.runs > 0 && s.indexed == s.runs && s.queued == 0;
  }
  // The runs of so many prompts are there, and all indexed.
  Reached AllOf(double contexts) const {
    return [wanted = contexts * settings_.runs](const IndexState& s) {
      return s.runs == wanted && AllIndexed(s);
    };
  }

  IndexState State() const;
  double IndexCoreSeconds() const {
    return absl::ToDoubleSeconds(daemon_->ThreadCpuTime("quarry-index"));
  }

  void EndPhase(const IndexingPhase& phase);
  IndexingReport::Options ReportOptions() const;

  const Settings& settings_;
  const MadeModel& model_;
  uint32_t round_ = 0;
  testing::DaemonProcess* daemon_ = nullptr;
  std::unique_ptr<Client> client_;
  IndexState last_;  // at the end of a phase
  IndexingReport report_;
};

IndexingReport::Options Bench::ReportOptions() const {
  const KvShape& s = model_.shape();
  return {.format = settings_.json ? IndexingFormat::kJson : IndexingFormat::kTable,
          .labels = {{"bench", "indexing"},
                     {"tokens", settings_.tokens()},
                     {"layers", s.layers},
                     {"kv_heads", s.kv_heads},
                     {"heads", s.heads},
                     {"head_dim", s.head_dim},
                     {"error", settings_.error},
                     {"executor_threads", settings_.executor_threads},
                     {"index_threads", settings_.index_threads},
                     {"seed", settings_.seed}},
          .heads = static_cast<double>(settings_.runs) * s.layers * s.kv_heads,
          .gib = static_cast<double>(settings_.runs) * settings_.run_tokens *
                 static_cast<double>(s.bytes_per_token()) / (1 << 30)};
}

void Bench::EndPhase(const IndexingPhase& phase) {
  last_ = phase.end;
  report_.Add(round_, phase);
}

IndexState Bench::State() const {
  std::map<std::string, double> all = perf::ValueOrDie(client_->Statistics(), "statistics");
  return {all["quarry_engine_runs_count"],          all["quarry_index_runs_count"],
          all["quarry_index_queued_runs_count"],    all["quarry_index_built_total"],
          all["quarry_index_relearned_runs_total"], all["quarry_index_failed_total"]};
}

void Bench::DecodeQuietly(const char* name, MadeContext* context) {
  IndexingPhase phase{.name = name};
  phase.begin = last_;
  const double core_s = IndexCoreSeconds();
  const absl::Time start = absl::Now();
  for (uint32_t i = 0; i < settings_.steps; ++i) phase.us.push_back(context->Step());
  phase.seconds = absl::ToDoubleSeconds(absl::Now() - start);
  phase.index_core_s = IndexCoreSeconds() - core_s;
  phase.end = State();
  if (phase.end.built != phase.begin.built || phase.end.queued > 0) {
    Die(absl::InternalError(absl::StrCat(phase.end.built - phase.begin.built,
                                         " indexes were built, ", phase.end.queued,
                                         " runs are being indexed")),
        name);
  }
  EndPhase(phase);
}

void Bench::DecodeWhileIndexing(const char* name, MadeContext* context, const Reached& reached) {
  IndexingPhase phase{.name = name};
  phase.begin = last_;
  phase.end = State();
  const double core_s = IndexCoreSeconds();
  const absl::Time start = absl::Now(), limit = start + absl::Seconds(settings_.limit_seconds);
  std::vector<double> since;  // the last look, at which it was still indexing
  absl::Time look = start + kPoll;
  while (!reached(phase.end)) {
    if (absl::Now() > limit) {
      phase.complete = false;
      phase.us.insert(phase.us.end(), since.begin(), since.end());
      break;
    }
    since.push_back(context->Step());
    if (absl::Now() < look) continue;
    phase.end = State();
    look = absl::Now() + kPoll;
    if (!reached(phase.end)) phase.us.insert(phase.us.end(), since.begin(), since.end());
    since.clear();
  }
  phase.seconds = absl::ToDoubleSeconds(absl::Now() - start);
  phase.index_core_s = IndexCoreSeconds() - core_s;
  EndPhase(phase);
  WaitUntil(name, reached);  // the limit may have come first
}

IndexState Bench::WaitUntil(const char* what, const Reached& reached) const {
  const absl::Time limit = absl::Now() + absl::Seconds(settings_.limit_seconds);
  for (;;) {
    const IndexState state = State();
    if (reached(state)) return state;
    if (absl::Now() > limit) {
      Die(absl::DeadlineExceededError(
              absl::StrCat(state.indexed, " of ", state.runs, " runs are indexed, ", state.queued,
                           " wait, ", settings_.limit_seconds, " s after the last step")),
          what);
    }
    absl::SleepFor(kPoll);
  }
}

void Bench::PrefillAndWait(const char* name, const MadeContext::Options& options) {
  IndexBuild build = BeginBuild(name);
  const MadeContext context(client_.get(), model_, options);
  build.start = absl::Now();
  WaitUntil(name, AllOf(2));
  EndBuild(std::move(build));
}

IndexBuild Bench::BeginBuild(const char* name) const {
  return {.name = name, .start = absl::Now(), .core_s = -IndexCoreSeconds(), .begin = State()};
}

void Bench::EndBuild(IndexBuild build) {
  build.seconds = absl::ToDoubleSeconds(absl::Now() - build.start);
  build.core_s += IndexCoreSeconds();
  build.end = State();
  report_.Add(round_, build);
}

void Bench::StartDaemon() {
  testing::DaemonOptions options;
  options.binary = settings_.daemon;
  const uint64_t context_bytes = uint64_t{settings_.tokens()} * model_.shape().bytes_per_token();
  options.config = absl::StrCat("[engine]\narena_bytes = \"", (3 * context_bytes >> 20) + 512,
                                "MiB\"\nrun_tokens = ", settings_.run_tokens,
                                "\nfirst_run_token = ", kWindow.first,
                                "\nexecutor_threads = ", settings_.executor_threads,
                                "\n[index]\nkind = \"clusters\"\nthreads = ", settings_.index_threads,
                                "\nquery_samples = ", kTimesMoreSamples * settings_.samples, "\n");
  options.arguments = {"--metrics", "off"};
  client_ = nullptr;
  daemon_ = &perf::StartDaemon(options);
  client_ = perf::ConnectTo(
      *daemon_, {.name = "indexing_bench", .slot_bytes = 8 << 20, .deadline = absl::Seconds(60)});
  last_ = State();
}

void Bench::RunRound() {
  StartDaemon();
  uint32_t next_id = 0;
  const auto made = [&](MadeContext::Ids ids) {
    const MadeContext::Options made{
        .first_id = next_id, .ids = ids, .samples = settings_.samples, .error = settings_.error};
    next_id += 2 * settings_.tokens();
    return made;
  };

  MadeContext own(client_.get(), model_, made(MadeContext::Ids::kLater));
  DecodeQuietly("scanned", &own);
  IndexBuild build = BeginBuild("own, decoding");
  own.DeclarePrompt();
  DecodeWhileIndexing("own first", &own, [this](const IndexState& s) {
    return s.runs == settings_.runs && s.indexed == s.runs;
  });
  EndBuild(std::move(build));
  // Once, of live queries' doing if there were many.
  own.SendSamples(settings_.samples, kTimesMoreSamples * settings_.samples);
  DecodeWhileIndexing("own again", &own, [this](const IndexState& s) {
    return s.relearned >= settings_.runs && AllIndexed(s);
  });
  DecodeQuietly("indexed", &own);
  {
    build = BeginBuild("another, decoding");
    const MadeContext other(client_.get(), model_, made(MadeContext::Ids::kAtOpen));
    build.start = absl::Now();
    DecodeWhileIndexing("other first", &own, AllOf(2));
    EndBuild(std::move(build));
    DecodeQuietly("indexed", &own);
  }
  PrefillAndWait("nobody decoding", made(MadeContext::Ids::kAtOpen));
  MadeContext::Options computed = made(MadeContext::Ids::kAtOpen);
  computed.layer_seconds = settings_.layer_seconds;
  PrefillAndWait("behind its prefill", computed);
}

absl::Status Check(const Settings& s) {
  if (s.kv_heads == 0 || s.heads % s.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--heads ", s.heads, ": whole groups of --kv-heads ", s.kv_heads, " are wanted"));
  }
  if (s.run_tokens % kBlockTokens != 0) {
    return absl::InvalidArgumentError(absl::StrCat("--run-tokens ", s.run_tokens,
                                                   ": a multiple of ", kBlockTokens, " is wanted"));
  }
  if (!std::has_single_bit(s.samples)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--samples ", s.samples, ": a power of two is wanted"));
  }
  if (s.steps > kSampleEvery * s.samples) {
    return absl::InvalidArgumentError(
        absl::StrCat("--steps ", s.steps, ": at most ", kSampleEvery, " times --samples ",
                     s.samples, " are possible before live queries have the runs learned again"));
  }
  return absl::OkStatus();
}

int Run(const Settings& settings) {
  Die(Check(settings), "indexing_bench");
  std::fprintf(stderr, "seed %u\n", settings.seed);
  const MadeModel model =
      perf::ValueOrDie(MadeModel::Make({.families = settings.families,
                                        .layers = settings.layers,
                                        .prompt_tokens = settings.tokens(),
                                        .query_samples = kTimesMoreSamples * settings.samples,
                                        .kv_heads = settings.kv_heads,
                                        .group = settings.heads / settings.kv_heads,
                                        .head_dim = settings.head_dim,
                                        .seed = settings.seed}),
                       "indexing_bench");
  Bench(settings, model).Run();
  return 0;
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Settings settings;
  CLI::App app("Decode steps beside the building of indexes");
  app.add_flag("--quick", settings.quick, "the sizes of a test, whatever else is said of them");
  app.add_option("--runs", settings.runs, "of a prompt")->check(CLI::Range(1, 1024));
  app.add_option("--run-tokens", settings.run_tokens, "a multiple of 256")
      ->check(CLI::Range(2048, 1 << 20));
  app.add_option("--layers", settings.layers, "of the model")->check(CLI::Range(1, 1024));
  app.add_option("--kv-heads", settings.kv_heads, "of a layer")->check(CLI::Range(1, 1024));
  app.add_option("--heads", settings.heads, "query heads of a layer")->check(CLI::Range(1, 8192));
  app.add_option("--head-dim", settings.head_dim, "of keys and values")
      ->check(quarry::perf::HeadDim());
  app.add_option("--families", settings.families,
                 absl::StrCat("of the layers in turn: ",
                              absl::StrJoin(quarry::perf::SyntheticFamilies(), ", ")))
      ->delimiter(',');
  app.add_option("--error", settings.error, "tolerated, of decode steps")
      ->check(CLI::Range(0.001, 0.9));
  app.add_option("--samples", settings.samples, "sampled queries of a prefill")
      ->check(CLI::Range(32, 4096));
  app.add_option("--layer-seconds", settings.layer_seconds, "of the prefill that computes")
      ->check(CLI::Range(0.0, 3600.0));
  app.add_option("--executor-threads", settings.executor_threads, "0: the daemon's default")
      ->check(CLI::Range(0, 1024));
  app.add_option("--index-threads", settings.index_threads, "of the daemon")
      ->check(CLI::Range(1, 1024));
  app.add_option("--steps", settings.steps, "of a phase in which nothing is indexed")
      ->check(CLI::Range(1, 1000000));
  app.add_option("--rounds", settings.rounds, "each with a daemon of its own")
      ->check(CLI::Range(1, 1000));
  app.add_option("--limit-seconds", settings.limit_seconds, "of a phase in which something is")
      ->check(CLI::Range(0.1, 36000.0));
  app.add_option("--seed", settings.seed, "of keys, values and queries");
  app.add_option("--daemon", settings.daemon, "quarryd (default: beside this build's folder)");
  app.add_flag("--json", settings.json, "JSON lines");
  CLI11_PARSE(app, argc, argv);
  if (settings.quick) settings.MakeQuick();
  return quarry::Run(settings);
}
