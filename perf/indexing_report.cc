#include "perf/indexing_report.h"

#include <cstdio>

#include "perf/statistics.h"

namespace quarry::perf {

void IndexingReport::Print(const char* line, const std::string& name,
                           const nlohmann::json& fields) const {
  nlohmann::json out = options_.labels;
  out.update({{"line", line}, {"name", name}});
  out.update(fields);
  std::printf("%s\n", out.dump().c_str());
}

void IndexingReport::Add(uint32_t round, const IndexingPhase& phase) {
  std::vector<double>& all = steps_[phase.name];
  all.insert(all.end(), phase.us.begin(), phase.us.end());
  const Quantiles us = QuantilesOf(phase.us);
  const double built = phase.end.built - phase.begin.built;
  if (json()) {
    Print("phase", phase.name,
          {{"round", round},
           {"steps", phase.us.size()},
           {"us_p50", us.p50},
           {"us_p90", us.p90},
           {"us_p99", us.p99},
           {"us_max", us.max},
           {"seconds", phase.seconds},
           {"runs", phase.end.runs},
           {"indexed_runs_begin", phase.begin.indexed},
           {"indexed_runs_end", phase.end.indexed},
           {"built", built},
           {"relearned_runs", phase.end.relearned - phase.begin.relearned},
           {"index_core_s", phase.index_core_s},
           {"complete", phase.complete}});
  } else {
    std::printf(
        "%-11s %5zu steps  p50 %8.2f ms  p90 %8.2f  p99 %8.2f  max %8.2f   runs indexed "
        "%2.0f to %2.0f of %2.0f  built %4.0f  index threads %.2f of a core%s\n",
        phase.name.c_str(), phase.us.size(), us.p50 / 1e3, us.p90 / 1e3, us.p99 / 1e3, us.max / 1e3,
        phase.begin.indexed, phase.end.indexed, phase.end.runs, built,
        phase.index_core_s / phase.seconds, phase.complete ? "" : "  STOPPED AT THE LIMIT");
  }
  std::fflush(stdout);
}

void IndexingReport::Add(uint32_t round, const IndexBuild& build) {
  const double built = build.end.built - build.begin.built;
  const double per_gib = build.core_s / options_.gib;
  if (json()) {
    Print("build", build.name,
          {{"round", round},
           {"seconds", build.seconds},
           {"core_s", build.core_s},
           {"core_s_per_gib", per_gib},
           {"gib", options_.gib},
           {"heads", options_.heads},
           {"built", built},
           {"failed", build.end.failed - build.begin.failed}});
  } else {
    std::printf(
        "build, %-21s %6.2f s until indexed, %6.2f core-s, %5.2f a GiB of K and V; %.0f "
        "indexes for %.0f heads\n",
        build.name.c_str(), build.seconds, build.core_s, per_gib, built, options_.heads);
  }
  std::fflush(stdout);
}

void IndexingReport::Compare(const std::string& name, const std::string& with) const {
  const std::vector<double>&us = steps_.at(name), &quiet = steps_.at(with);
  const Quantiles of_steps = QuantilesOf(us), of_quiet = QuantilesOf(quiet);
  const double p50 = of_steps.p50 / of_quiet.p50, p99 = of_steps.p99 / of_quiet.p99;
  if (json()) {
    Print("disturbed", name,
          {{"by", with},
           {"steps", us.size()},
           {"quiet_steps", quiet.size()},
           {"p50_ratio", p50},
           {"p99_ratio", p99}});
  } else {
    std::printf("%-11s by %-8s  p50 %.2f  p99 %.2f   (%zu and %zu steps)\n", name.c_str(),
                with.c_str(), p50, p99, us.size(), quiet.size());
  }
}

}  // namespace quarry::perf
