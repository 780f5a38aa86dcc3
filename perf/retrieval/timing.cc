// Timing of answers: several threads at once, nothing of a head in a cache when its turn comes.
#include <barrier>
#include <thread>

#include "perf/retrieval/trace_bench.h"
#include "perf/statistics.h"

namespace quarry::perf {

TraceBench::Times TraceBench::Time(const Heads& heads, const Budget& budget,
                                   uint32_t threads) const {
  const auto count = static_cast<uint32_t>(heads_.size());
  std::vector<Times> mine(threads, Times(count));
  std::vector<float> sinks(threads);
  std::barrier together(threads);
  const auto work = [&](uint32_t thread) {
    HeadAnswer answer(/*lists=*/false);
    for (uint32_t round = 0; round <= settings_.samples; ++round) {
      sinks[thread] += working_set_->PushOut(thread, threads, round);
      const uint32_t query = round % static_cast<uint32_t>(chosen_.size());
      const std::vector<TokenRange> ranges = Ranges(query);
      for (uint32_t first = 0; first < count; first += threads) {
        together.arrive_and_wait();
        const uint32_t h = first + thread;
        if (h >= count) continue;
        const QueryBlock queries = Queries(heads_[h], query, ranges);
        const double us = Microseconds([&] { answer.Answer(*heads[h], queries, Elsewhere(heads_[h], query), budget); });
        if (round > 0) mine[thread][h].push_back(us);  // the first warms up the thread's buffers
      }
      together.arrive_and_wait();
    }
  };
  std::vector<std::thread> others;
  for (uint32_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& t : others) t.join();
  Times out(count);
  for (const Times& times : mine) {
    for (uint32_t h = 0; h < count; ++h) {
      out[h].insert(out[h].end(), times[h].begin(), times[h].end());
    }
  }
  return out;
}

}  // namespace quarry::perf
