// quarry-patterns: finds, offline, what each head of a model attends in a sparse prefill.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cpu_index/simd.h"
#include "gpu/model.h"
#include "gpu/sparse/pattern.h"
#include "gpu/sparse/pattern_picture.h"
#include "gpu/sparse/pattern_search.h"
#include "gpu/sparse/sampled_layers.h"
#include "gpu/thread_team.h"
#include "gpu/token_ids.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

struct Arguments {
  std::string model, prompt_ids, output, image, show;
  uint32_t made_tokens = 0, max_tokens = 0, rows = 256, layers_at_a_time = 0, threads = 0;
  uint64_t seed = 1, device_bytes = 16ull << 30;
  PatternSearchOptions search;
};

void Describe(CLI::App* app, Arguments* a) {
  CLI::Option* const show =
      app->add_option("--show", a->show, "print (and draw) this pattern file; search nothing");
  CLI::Option* const model =
      app->add_option("--model", a->model, "Hugging Face folder of the model");
  CLI::Option* const ids = app->add_option("--prompt-ids", a->prompt_ids,
                                           "token ids of the reference text, or @FILE with them");
  app->add_option("--made-tokens", a->made_tokens,
                  "so many made ones in their place: random, with repetitions")
      ->excludes(ids)
      ->check(CLI::PositiveNumber);
  app->add_option("--seed", a->seed, "of the made tokens");
  app->add_option("--max-tokens", a->max_tokens,
                  "room of the context, which pins the rope regime; the text's length by default");
  app->add_option("--tiles-share", a->search.tiles_share,
                  "what each candidate may cost, of dense attention's tiles")
      ->capture_default_str();
  app->add_option("--max-error", a->search.max_error,
                  "relative error of the output beyond which a head stays dense")
      ->capture_default_str();
  app->add_option("--rows", a->rows, "rows whose outputs are compared, spread over the text")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--layers-at-a-time", a->layers_at_a_time,
                  "run the model once for every so many layers, to save memory; 0: all");
  app->add_option("--output", a->output, "write the pattern file here");
  app->add_option("--image", a->image, "draw the choice as a PNG file");
  app->add_option("--threads", a->threads, "0: all cores");
  app->add_option("--device-bytes", a->device_bytes, "budget of the model's memory");
  show->excludes(model);
}

// The folder's name.
std::string ModelName(const std::string& folder) {
  const std::filesystem::path path = std::filesystem::path(folder).lexically_normal();
  return (path.has_filename() ? path : path.parent_path()).filename().string();
}

absl::Status Check(const Arguments& a) {
  if (a.model.empty()) return absl::InvalidArgumentError("--model is needed, or --show");
  if (a.prompt_ids.empty() && a.made_tokens == 0) {
    return absl::InvalidArgumentError("no reference text: give --prompt-ids or --made-tokens");
  }
  return ValidatePatternSearch(a.search);
}

// `rows` of the tokens, one in the middle of each of as many equal stretches.
std::vector<uint32_t> ComparedRows(uint32_t tokens, uint32_t rows) {
  rows = std::min(rows, tokens);
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < rows; ++i) {
    out.push_back(static_cast<uint32_t>((2 * uint64_t{i} + 1) * tokens / (2 * uint64_t{rows})));
  }
  return out;
}

void PrintHead(uint32_t layer, uint32_t head, const HeadPattern& p) {
  std::cout << absl::StrFormat("%5d %5d  %-34s", layer, head, PatternText(p.pattern));
  if (p.error >= 0) std::cout << absl::StrFormat(" %6.3f %8.4f", p.tiles_share, p.error);
}

absl::StatusOr<PatternFile> Search(const Arguments& a) {
  QUARRY_RETURN_IF_ERROR(Check(a));
  const std::unique_ptr<Device> device = MakeHostDevice({a.device_bytes, a.threads});
  QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(a.model, device.get()));
  std::vector<uint32_t> tokens = MadeTokens(a.made_tokens, model->config().vocab, a.seed);
  if (!a.prompt_ids.empty()) {
    QUARRY_ASSIGN_OR_RETURN(tokens, ParseTokenIds(a.prompt_ids));
  }
  if (tokens.empty()) return absl::InvalidArgumentError("the reference text is empty");
  const auto count = static_cast<uint32_t>(tokens.size());
  ThreadTeam team(a.threads != 0 ? a.threads : std::max(1u, std::thread::hardware_concurrency()));
  const std::vector<Pattern> candidates = PatternCandidates();
  const std::vector<uint32_t> rows = ComparedRows(count, a.rows);
  PatternFile file{ModelName(a.model), model->config().layers, model->config().heads, {}};
  std::cout << "layer  head  chosen                               tiles    error   errors of";
  for (const Pattern& c : candidates) std::cout << "  " << PatternText(c);
  std::cout << std::endl;
  const auto take = [&](const SampledLayer& layer) {
    const std::vector<SearchedHead> found =
        SearchPatterns({layer.kv, {0, count}, layer.q.data(), rows}, candidates, a.search, &team);
    for (uint32_t h = 0; h < found.size(); ++h) {
      PrintHead(layer.layer, h, found[h].best);
      std::vector<std::string> errors(candidates.size(), "      -");
      for (const SearchedCandidate& c : found[h].candidates) {
        errors[c.candidate] = absl::StrFormat("%7.4f", c.error);
      }
      std::cout << "  ";
      for (const std::string& error : errors) std::cout << " " << error;
      std::cout << std::endl;
      file.patterns.push_back(found[h].best);
    }
    return absl::OkStatus();
  };
  QUARRY_RETURN_IF_ERROR(
      SampleLayers(*model, *device,
                   {tokens, a.max_tokens != 0 ? a.max_tokens : count, a.layers_at_a_time}, take));
  return file;
}

absl::StatusOr<PatternFile> Show(const std::string& path) {
  QUARRY_ASSIGN_OR_RETURN(const PatternFile file, LoadPatterns(path));
  std::cout << "layer  head  pattern                              tiles    error\n";
  for (uint32_t l = 0; l < file.layers; ++l) {
    for (uint32_t h = 0; h < file.heads; ++h) {
      PrintHead(l, h, file.At(l, h));
      std::cout << "\n";
    }
  }
  return file;
}

absl::Status Run(const Arguments& a) {
  QUARRY_RETURN_IF_ERROR(ChooseSimdLevel().status());
  QUARRY_ASSIGN_OR_RETURN(const PatternFile file, a.show.empty() ? Search(a) : Show(a.show));
  double tiles = 0;
  for (const HeadPattern& head : file.patterns) {
    tiles += head.tiles_share >= 0 ? head.tiles_share : 1;
  }
  std::cout << absl::StrFormat("%d heads, %.3f of the dense tiles, recipe %s\n",
                               file.patterns.size(),
                               tiles / static_cast<double>(file.patterns.size()),
                               RecipeOf(file).dense() ? "dense" : PatternsDigest(file).Hex());
  if (!a.output.empty()) QUARRY_RETURN_IF_ERROR(SavePatterns(file, a.output));
  if (!a.image.empty()) QUARRY_RETURN_IF_ERROR(DrawPatterns(file).SavePng(a.image));
  return absl::OkStatus();
}

}  // namespace
}  // namespace quarry

int main(int argc, char** argv) {
  quarry::Arguments arguments;
  CLI::App app("quarry-patterns: finds what each head of a model attends in a sparse prefill");
  quarry::Describe(&app, &arguments);
  app.set_version_flag("--version", QUARRY_VERSION);
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = quarry::Run(arguments);
  if (status.ok()) return 0;
  std::fprintf(stderr, "quarry-patterns: %s\n", status.ToString().c_str());
  return 1;
}
