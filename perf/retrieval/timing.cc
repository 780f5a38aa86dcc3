// Timing of answers: several threads at once, nothing of a head in a cache when its turn comes.
#include <barrier>
#include <thread>

#include "perf/retrieval/trace_bench.h"
#include "perf/statistics.h"

namespace quarry::perf {

TraceBench::Timed TraceBench::Time(const Heads& heads, const Heads& scans, const Budget& budget,
                                   uint32_t threads) const {
  const auto count = static_cast<uint32_t>(heads_.size());
  std::vector<Timed> mine(threads, Timed{Times(count), Times(count)});
  std::vector<float> sinks(threads);
  std::barrier together(threads);
  const auto work = [&](uint32_t thread) {
    HeadAnswer answer(/*lists=*/false);
    uint64_t turn = 0;
    const auto answer_all = [&](const Heads& some, const Budget& within, uint32_t round,
                                Times* times) {
      sinks[thread] += working_set_->PushOut(thread, threads, turn++);
      const uint32_t query = round % tests_;
      const std::vector<TokenRange> ranges = Ranges(query);
      for (uint32_t first = 0; first < count; first += threads) {
        together.arrive_and_wait();
        const uint32_t h = first + thread;
        if (h >= count) continue;
        const QueryBlock queries = Queries(heads_[h], query, ranges);
        const double us = Microseconds(
            [&] { answer.Answer(*some[h], queries, Elsewhere(heads_[h], query), within); });
        if (round > 0) (*times)[h].push_back(us);  // the first warms up the thread's buffers
      }
      together.arrive_and_wait();
    };
    for (uint32_t round = 0; round <= settings_.samples; ++round) {
      answer_all(heads, budget, round, &mine[thread].answers);
      if (!scans.empty()) answer_all(scans, Budget(), round, &mine[thread].scans);
    }
  };
  std::vector<std::thread> others;
  for (uint32_t t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& t : others) t.join();
  Timed out{Times(count), Times(count)};
  for (const Timed& times : mine) {
    for (uint32_t h = 0; h < count; ++h) {
      out.answers[h].insert(out.answers[h].end(), times.answers[h].begin(), times.answers[h].end());
      out.scans[h].insert(out.scans[h].end(), times.scans[h].begin(), times.scans[h].end());
    }
  }
  return out;
}

}  // namespace quarry::perf
