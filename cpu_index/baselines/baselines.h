// Baselines: the indexes of FAISS and hnswlib behind KeyIndex, built from keys alone.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "cpu_index/key_index.h"

namespace quarry {

enum class BaselineKind {
  kFaissFlat,         // every key; what FAISS itself makes of an exact scan
  kFaissIvfFlat,      // clusters of whole keys
  kFaissIvfPq,        // clusters of 4-bit product codes (fast scan), re-ranked by the run's keys
  kHnsw,              // hnswlib's graph
};

// "faiss-flat", "faiss-ivf-flat", "faiss-ivf-pq", "hnsw".
std::string_view BaselineName(BaselineKind kind);

struct BaselineOptions {
  uint32_t seed = 1;      // equal keys, options and seed give equal indexes
  uint32_t nlist = 0;     // clusters of the IVF kinds; 0: four times the root of the tokens
  uint32_t pq_m = 0;      // product codes of 4 bits per key; divides head_dim; 0: head_dim / 2
  uint32_t hnsw_m = 32;   // links per key and level; twice as many on the lowest
  uint32_t ef_construction = 200;
};

// What may change between searches.
struct BaselineSearch {
  uint32_t candidates = 128;  // tokens returned per query, where its range is the whole run
  uint32_t nprobe = 16;       // clusters searched
  uint32_t ef_search = 128;   // hnswlib's queue; at least `candidates` is used
};

// Holds keys as fp32, minus their mean, which moves all of a query's scores alike: it changes no
// ranking, and clusters and graphs are the better for it. Score returns lists of exact scores; a
// query whose range is a part of the run asks for correspondingly more of the whole run.
// Searches may run on many threads at once; FAISS is kept to the calling thread.
class BaselineIndex : public TokenIndex {
 public:
  // Not while searches run.
  void set_search(const BaselineSearch& search) {
    search_ = search;
    ApplySearch();
  }
  const BaselineSearch& search() const { return search_; }
  // Of the index beside the run's own keys and values.
  virtual uint64_t memory_bytes() const = 0;

  void AttendAll(const KvView& run, const QueryBlock& queries,
                 std::span<Partial> acc) const override;
  void Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
              const RunAllotment& allotment, std::span<Partial> acc) const override;

 private:
  // Hands search() to the library.
  virtual void ApplySearch() = 0;

  BaselineSearch search_;
};

// Reads the run's keys, on the calling thread; the values do not matter. InvalidArgument names the
// option or the run that cannot be; ResourceExhausted: no memory. From the first call on, FAISS
// uses OpenBLAS for any number of queries, and OpenBLAS keeps to one thread, in the whole process.
absl::StatusOr<std::unique_ptr<BaselineIndex>> BuildBaseline(BaselineKind kind, const KvView& run,
                                                             const BaselineOptions& options);

}  // namespace quarry
