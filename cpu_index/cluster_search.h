// The search of clustered indexes: all runs of a query that share a model, at once.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cpu_index/cluster_index.h"
#include "cpu_index/error_cut.h"
#include "cpu_index/key_index.h"

namespace quarry {

class ClusterPart;
struct ClusterFindings;
struct ClusterQueries;
struct TokenFloors;

// One run that is searched.
struct ClusterRun {
  const ClusterIndex* index = nullptr;
  const KvView* view = nullptr;          // that the index fits
  std::span<const TokenRange> ranges;    // [queries] of tokens that each query sees of it
};

// How far a search goes. A query's answer is estimated where it is not read; its predicted error
// (Partial::doubt) is to be at most `tolerance` of the length of what the answer is merged with,
// the answer itself included. A query is attended exactly, whatever it may read, if it is unlike
// all that were sampled, or if its error cannot be brought near to what is tolerated; with
// ClusterModel::scan_if_faster all are where estimates should not take clearly less time, unless
// rows are to be fetched.
struct ClusterLimits {
  float tolerance = 0;         // 0: every token's key and value are read
  // [queries] how many tokens are read one by one for each; empty: any number. A query may be
  // answered by what is read for another one beside its own. Looked at when tokens are decided on,
  // so that it may be shared out over several searches until then.
  std::span<const uint32_t> most_tokens;
  // [queries] log of the length of the sum of e^score * value over what the answer will be merged
  // with, as far as it is known: it makes errors here matter less, but no more than
  // ClusterModel::kTried of what is found here is left. Empty: nothing is.
  std::span<const float> other_length;
  // With ClusterModel::scan_if_faster: of the head's searches; this one goes by it and adds to it,
  // so that whether it estimates depends on those before. May be null.
  ScanHistory* history = nullptr;
  // What calibration forces. Depths: supers alone; all leaves; all codes; and then the rows, or the
  // keys and values, of so many best tokens of each query.
  enum class Depth { kAsNeeded, kSupers, kLeaves, kCodes, kRows, kExact };
  Depth depth = Depth::kAsNeeded;
  uint32_t best_tokens = 0;
};

// Attention of every query over the tokens that it sees of `runs`, all of one model, in stages whose
// parts, some of the runs each, any threads may run at the same time; what is opened and read is
// decided between the stages for all parts together. Up to rounding the answer is the same with any
// number of parts.
class ClusterSearch {
 public:
  // parts: into which the runs are cut, about even in tokens; no more than that, and a run is not
  // cut. What `runs`, `queries` and `limits` point to outlives
  // the search; queries.ranges is not used.
  ClusterSearch(std::span<const ClusterRun> runs, const QueryBlock& queries,
                const ClusterLimits& limits, uint32_t parts = 1);
  ~ClusterSearch();

  uint32_t parts() const { return static_cast<uint32_t>(parts_.size()); }
  // Of the current stage, each part once.
  void RunPart(uint32_t part);
  // When all parts of a stage have been run. False after the last one.
  bool Next();

  // Whether tokens were scored in the stage whose parts have been run, so that Next decides which
  // of them are read.
  bool ScoredTokens() const { return stage_ == Stage::kTokens; }
  // Then, before Next: by their scores, the tokens that would be read one by one for the query if
  // their number were not bounded; none if it is attended exactly.
  ScoreHistogram WantedTokens(uint32_t query);

  // After the last stage: merges the answers into acc [queries]; the bytes of all of it go to
  // acc[0]. refined: may be null; the tokens that are attended by their rows, or by their keys and
  // values, in no order; not those whose rows were looked at and left.
  void Finish(std::span<Partial> acc, std::vector<uint32_t>* refined = nullptr) const;
  // Then: which share of the square of a query's predicted error adds up over tokens and groups.
  float TogetherShare(uint32_t query) const;
  // Then, where every code is read: how many rows the leaves' centres let expect that a query
  // needs, and how many it did; none if it was attended exactly.
  struct Rows {
    uint64_t expected = 0, needed = 0;
  };
  Rows RowsOf(uint32_t query) const { return {expected_[query], cuts_[query].tokens}; }
  // Then: how long it would take as a search that turns to the scan if that is faster, by the time
  // of an exact scan of the same.
  float Time() const;

 private:
  enum class Stage { kLeaves, kTokens, kAttend };

  float Elsewhere(uint32_t query, float own) const;
  float Mass(uint32_t query, float ClusterFindings::* mass) const;
  ScoreHistogram Together(uint32_t query, ScoreHistogram ClusterFindings::* scores) const;
  float Sum(uint32_t query, float ClusterFindings::* weight, int power = 1) const;
  float OpenedFrom(uint32_t query, float share, float tokens, float doubt) const;
  bool ScansAll() const;
  void ScanIfFaster(std::span<const uint64_t> rows);
  void ScanUncapped();
  bool MayScan() const;  // where that is faster
  bool UsesHistory() const;
  float TimeOfRows(std::span<const uint64_t> rows) const;
  float TimeOfLook(bool codes, std::span<const uint64_t> rows) const;
  void NoteLook(bool codes, std::span<const uint64_t> rows) const;
  void DecideSupers();
  void DecideLeaves();
  float LeafFloor(uint32_t query) const;
  void WeighTokens();
  void DecideTokens();
  float Allowed(uint32_t query) const;
  float Correction(uint32_t query, float allowed) const;
  ErrorCut CutOf(uint32_t query, const ScoreHistogram& tokens, uint32_t most_tokens) const;
  ErrorCut ForcedCut(uint32_t query) const;
  void Attend(uint32_t part);
  ErrorCut Left(uint32_t query) const;

  const std::unique_ptr<ClusterQueries> queries_;
  std::vector<std::unique_ptr<ClusterPart>> parts_;
  bool far_rows_ = false;           // some are fetched: a scan of all is never the faster way
  uint64_t tokens_ = 0, seen_ = 0;  // of all runs, and of these what a query sees that sees most
  Stage stage_ = Stage::kLeaves;
  // What was decided, by query.
  std::vector<float> super_floors_;
  std::unique_ptr<TokenFloors> floors_;
  std::vector<uint64_t> expected_;  // rows, by the leaves' centres
  std::vector<ErrorCut> cuts_;
  std::vector<bool> scanned_;  // attended exactly
  // Expected once leaves are scored, known once tokens are: near their largest score; by e^top_,
  // the error that closed groups may make, and what all that is estimated weighs.
  std::vector<float> top_, closed_, mass_;
  std::vector<ScoreHistogram> tokens_by_score_;  // known once tokens are
  size_t leaves_ = 0;  // that were scored
};

// One query in one of the searches that answer it, and where that search's limit for it stands.
struct CappedQuery {
  ClusterSearch* search = nullptr;  // whose tokens are scored
  uint32_t query = 0;
  uint32_t* most_tokens = nullptr;  // of ClusterLimits::most_tokens
};
// Shares out how many tokens may be read one by one for a query over all of its searches, before
// their Next: those of the highest scores, whichever search found them, of what each wants.
void ShareCap(std::span<const CappedQuery> searches, uint32_t most);

// All of it on the calling thread.
void SearchClusters(std::span<const ClusterRun> runs, const QueryBlock& queries,
                    const ClusterLimits& limits, std::span<Partial> acc,
                    std::vector<uint32_t>* refined = nullptr);

}  // namespace quarry
