#include "daemon/audit_measure.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "cpu_index/budget.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/key_index.h"
#include "cpu_index/partial.h"
#include "daemon/audit_search.h"
#include "daemon/kv_segments.h"
#include "daemon/run_registry.h"
#include "daemon/scan_plan.h"

namespace quarry {
namespace {

// Of so many best tokens of a query head the recall is where most tokens are estimated.
constexpr size_t kBestTokens = 100;

bool Drops(Budget::Kind kind) {
  return kind == Budget::Kind::kFixedK || kind == Budget::Kind::kTopP ||
         kind == Budget::Kind::kDipr;
}

bool Estimates(Budget::Kind kind) { return kind == Budget::Kind::kError; }

// Attention of each query head of the group that is being summed up.
struct Sums {
  Sums(size_t heads, size_t head_dim) : acc(heads * head_dim), partials(heads) {
    for (size_t g = 0; g < heads; ++g) {
      partials[g].acc = std::span(acc).subspan(g * head_dim, head_dim);
    }
  }
  Sums(const Sums&) = delete;
  std::vector<float> acc;
  std::vector<Partial> partials;
};

// (o, lse) of each query head of the group.
struct Answer {
  std::vector<float> o, lse;
  void Merge(const Answer& other, size_t head_dim) {
    for (size_t g = 0; g < lse.size(); ++g) {
      MergeFinished(std::span(o).subspan(g * head_dim, head_dim), &lse[g],
                    std::span(other.o).subspan(g * head_dim, head_dim), other.lse[g]);
    }
  }
};

// ||a - b|| / ||b|| of the worst head.
double WorstError(const Answer& a, const Answer& b, size_t head_dim) {
  double worst = 0;
  for (size_t g = 0; g < b.lse.size(); ++g) {
    double difference = 0, length = 0;
    for (size_t d = g * head_dim; d < (g + 1) * head_dim; ++d) {
      difference += (double{a.o[d]} - b.o[d]) * (double{a.o[d]} - b.o[d]);
      length += double{b.o[d]} * b.o[d];
    }
    if (difference > 0) worst = std::max(worst, std::sqrt(difference / std::max(length, 1e-30)));
  }
  return worst;
}

// Part of the range: of a run, or of what no run covers.
struct Piece {
  TokenRange range;
  const RunUse* use = nullptr;
  std::shared_ptr<const KeyIndex> index;  // of the run, that answers; null: the exact scan
  const TokenIndex* tokens = nullptr;     // the same where the budget chooses among tokens
  const ClusterIndex* clusters = nullptr;  // the same where it tolerates an error
  CoarseScores exact, found;              // found: of `tokens`
  const CoarseScores& searched() const { return tokens == nullptr ? exact : found; }
};

class Measuring {
 public:
  Measuring(const AuditedQuery& query, const KvShape& shape, const BlockTable& table,
            uint32_t task_tokens, const std::function<bool()>& stop)
      : query_(query),
        shape_(shape),
        table_(table),
        task_tokens_(task_tokens),
        stop_(stop),
        pieces_(Pieces()) {}

  std::optional<AuditMeasure> Measure() {
    if (!IsAnswer()) return std::nullopt;
    Answer given{query_.o, query_.lse}, exact = Empty();
    AuditMeasure measure;
    measure.predicted = query_.predicted;
    measure.renewable = IsRenewable();
    if (!Attend(query_.range, &exact)) return std::nullopt;
    TakeMass(given, exact, &measure);
    if (Drops(query_.budget.kind)) {
      if (!Search()) return std::nullopt;
      measure.recall = Recall();
      if (!measure.recall.has_value()) return std::nullopt;
    }
    if (Estimates(query_.budget.kind)) {
      if (!Search() || !FindRead() || !TakeRead(exact, &measure)) return std::nullopt;
    }
    if (query_.merged) {
      Answer rest = Empty();
      const uint32_t behind = std::max(query_.range.hi, query_.rest_hi);
      if (!Attend({0, query_.range.lo}, &rest)) return std::nullopt;
      if (!Attend({query_.range.hi, behind}, &rest)) return std::nullopt;
      given.Merge(rest, shape_.head_dim);
      exact.Merge(rest, shape_.head_dim);
    }
    measure.error = WorstError(given, exact, shape_.head_dim);
    if (Estimates(query_.budget.kind)) measure.actual = measure.error;
    // Finite numbers may still be so large that their differences are not.
    const bool finite = std::isfinite(measure.error) && std::isfinite(measure.mass_error);
    return finite ? std::optional(measure) : std::nullopt;
  }

 private:
  bool IsAnswer() const {
    const auto finite = [](float x) { return std::isfinite(x); };
    return std::all_of(query_.o.begin(), query_.o.end(), finite) &&
           std::all_of(query_.lse.begin(), query_.lse.end(),
                       [&](float lse) { return finite(lse) || lse == kEmptyLse; });
  }

  bool IsRenewable() const {
    const auto indexed = [](const Piece& piece) { return piece.index != nullptr; };
    const auto elsewhere = [&](const Piece& piece) {
      return indexed(piece) && piece.use->turn != nullptr;
    };
    return std::any_of(pieces_.begin(), pieces_.end(), indexed) &&
           std::none_of(pieces_.begin(), pieces_.end(), elsewhere);
  }

  Answer Empty() const {
    return {std::vector<float>(query_.q.size()), std::vector<float>(query_.lse.size(), kEmptyLse)};
  }

  // For a range whose keys are turned alike; until the next call.
  QueryBlock Queries(TokenRange range) {
    ranges_.assign(query_.lse.size(), range);
    QueryBlock block{.q = query_.q.data(),
                     .q_dtype = query_.q_dtype,
                     .queries = static_cast<uint32_t>(ranges_.size()),
                     .head_dim = shape_.head_dim,
                     .scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)),
                     .ranges = ranges_};
    if (const Rotation* turn = table_.TurnAt(range.lo); turn != nullptr) {
      turned_ = query_.q;
      turn->TurnQueries(turned_.data(), block.queries, block.head_dim);
      block.q = turned_.data();
      block.q_dtype = DType::kFp32;
    }
    return block;
  }

  // What of the range is read at once: keys that are turned alike, for one look at stop_.
  TokenRange FirstStep(TokenRange range) const {
    return {range.lo, static_cast<uint32_t>(std::min<uint64_t>({range.hi,
                                                                uint64_t{range.lo} + task_tokens_,
                                                                table_.NextEdge(range.lo)}))};
  }

  KvSegments Segments(TokenRange range) const {
    return KvSegments(shape_, query_.layer, query_.kv_head, range, table_.blocks.data(), 0);
  }

  // Adds exact attention over `range`; false: stopped.
  bool Add(TokenRange range, std::span<Partial> partials) {
    for (uint32_t lo = range.lo; lo < range.hi;) {
      if (stop_()) return false;
      const TokenRange step = FirstStep({lo, range.hi});
      const KvSegments segments = Segments(step);
      ExactScan().AttendAll(segments.view(), Queries(step), partials);
      lo = step.hi;
    }
    return true;
  }

  // Merges exact attention over `range` into the answer; false: stopped.
  bool Attend(TokenRange range, Answer* answer) {
    Sums sums(query_.lse.size(), shape_.head_dim);
    if (!Add(range, sums.partials)) return false;
    Answer part = Empty();
    for (size_t g = 0; g < sums.partials.size(); ++g) {
      part.lse[g] =
          sums.partials[g].Finish(std::span(part.o).subspan(g * shape_.head_dim, shape_.head_dim));
    }
    answer->Merge(part, shape_.head_dim);
    return true;
  }

  void TakeMass(const Answer& given, const Answer& exact, AuditMeasure* measure) const {
    double least = 1;
    for (size_t g = 0; g < exact.lse.size(); ++g) {
      const double share = std::exp(double{given.lse[g]} - exact.lse[g]);
      measure->mass_error = std::max(measure->mass_error, std::abs(share - 1));
      least = std::min(least, share);
    }
    if (query_.budget.kind == Budget::Kind::kSoftmaxLift) measure->actual = measure->mass_error;
    if (!Drops(query_.budget.kind)) return;
    measure->mass = least;
    measure->actual = 1 - least;
  }

  void AddTail(TokenRange range, std::vector<Piece>* pieces) const {
    for (uint32_t lo = range.lo; lo < range.hi;) {
      pieces->push_back({.range = FirstStep({lo, range.hi})});
      lo = pieces->back().range.hi;
    }
  }

  // In token order.
  std::vector<Piece> Pieces() const {
    std::vector<Piece> pieces;
    uint32_t next = query_.range.lo;
    for (const RunUse& use : table_.runs) {
      const TokenRange part = Intersect(use.tokens, query_.range);
      if (part.empty()) continue;
      AddTail({next, part.lo}, &pieces);
      std::shared_ptr<const KeyIndex> index = use.run->indexes()->Get(query_.layer, query_.kv_head);
      const auto* const tokens = dynamic_cast<const TokenIndex*>(index.get());
      const bool estimates = Estimates(query_.budget.kind);
      if (estimates == (tokens != nullptr)) index = nullptr;  // it was passed by
      const auto* const clusters = dynamic_cast<const ClusterIndex*>(index.get());
      pieces.push_back({.range = part,
                        .use = &use,
                        .index = std::move(index),
                        .tokens = estimates ? nullptr : tokens,
                        .clusters = clusters});
      next = part.hi;
    }
    AddTail({next, query_.range.hi}, &pieces);
    return pieces;
  }

  // The scores of all tokens, and those that the indexes find; false: stopped.
  bool Search() {
    for (Piece& piece : pieces_) {
      if (stop_()) return false;
      const QueryBlock queries = Queries(piece.range);
      const KvSegments segments = Segments(piece.range);
      ExactScan().Score(segments.view(), queries, &piece.exact);
      if (piece.tokens == nullptr) continue;
      if (stop_()) return false;
      const TokenRange run = TokensHere(*piece.use->run, piece.use->turn.get());
      const KvSegments all(shape_, query_.layer, query_.kv_head, run,
                           piece.use->run->blocks().data(), run.lo / kBlockTokens);
      piece.tokens->Score(all.view(), queries, &piece.found);
    }
    return true;
  }

  // Marks the tokens whose rows, or keys and values, the search reads that is done again as the
  // answer's was; false: stopped.
  bool FindRead() {
    read_.assign(query_.range.size(), false);
    Sums beside(query_.lse.size(), shape_.head_dim);
    std::vector<AuditedRun> runs;
    for (const Piece& piece : pieces_) {
      if (piece.clusters != nullptr) {
        runs.push_back({piece.clusters, piece.use, piece.range});
        continue;
      }
      if (!Add(piece.range, beside.partials)) return false;
      for (uint32_t t = piece.range.lo; t < piece.range.hi; ++t) MarkRead(t);
    }
    if (runs.empty()) return true;
    for (const TokenRange& rest : RestBeside(query_.range, query_.rest_hi)) {
      if (query_.merged && !Add(rest, beside.partials)) return false;
    }
    std::vector<float> lengths;
    for (const Partial& sum : beside.partials) lengths.push_back(sum.LogLength());
    std::vector<uint32_t> read;
    if (!SearchAgain(query_, shape_, runs, lengths, stop_, &read)) return false;
    for (uint32_t token : read) MarkRead(token);
    return true;
  }

  void MarkRead(uint32_t token) {
    if (token >= query_.range.lo && token < query_.range.hi) read_[token - query_.range.lo] = true;
  }

  // What the tokens that are read weigh, and how many of the best they are; false: stopped.
  bool TakeRead(const Answer& exact, AuditMeasure* measure) const {
    double least_mass = 1, least_recall = 1;
    for (uint32_t g = 0; g < query_.lse.size(); ++g) {
      if (stop_()) return false;
      std::vector<std::pair<float, bool>> tokens;  // the score, and whether it is read
      double mass = 0;
      for (const Piece& piece : pieces_) {
        for (float score : piece.exact.Row(g)) {
          tokens.emplace_back(score, read_[tokens.size()]);
          if (tokens.back().second) mass += std::exp(double{score} - exact.lse[g]);
        }
      }
      const auto best = static_cast<ptrdiff_t>(std::min(tokens.size(), kBestTokens));
      std::nth_element(tokens.begin(), tokens.begin() + best - 1, tokens.end(), std::greater<>());
      const auto hits = std::count_if(tokens.begin(), tokens.begin() + best,
                                      [](const auto& token) { return token.second; });
      least_mass = std::min(least_mass, mass);
      least_recall = std::min(least_recall, static_cast<double>(hits) / static_cast<double>(best));
    }
    measure->mass = least_mass;
    measure->recall = least_recall;
    return true;
  }

  // None: stopped.
  std::optional<double> Recall() const {
    double worst = 1;
    for (uint32_t g = 0; g < query_.lse.size(); ++g) {
      if (stop_()) return std::nullopt;
      worst = std::min(worst, RecallOf(g));
    }
    return worst;
  }

  // Of one query head: the share of its n tokens whose scores are among the n best.
  double RecallOf(uint32_t g) const {
    std::vector<float> taken = Taken(g);
    if (taken.empty()) return 1;
    std::vector<float> all;
    for (const Piece& piece : pieces_) {
      const std::span<const float> row = piece.exact.Row(g);
      all.insert(all.end(), row.begin(), row.end());
    }
    const auto last = all.begin() + static_cast<ptrdiff_t>(std::min(taken.size(), all.size()) - 1);
    std::nth_element(all.begin(), last, all.end(), std::greater<>());
    const auto hits =
        std::count_if(taken.begin(), taken.end(), [&](float score) { return score >= *last; });
    return static_cast<double>(hits) / static_cast<double>(taken.size());
  }

  // The exact scores of the tokens that the budget takes of what was found.
  std::vector<float> Taken(uint32_t g) const {
    std::vector<RunScores> scores;
    for (const Piece& piece : pieces_) scores.push_back({&piece.searched(), g});
    std::vector<RunShare> shares(scores.size());
    AllocateBudget(query_.budget, scores, shares);
    std::vector<float> taken;
    for (size_t p = 0; p < pieces_.size(); ++p) {
      const Piece& piece = pieces_[p];
      const CoarseScores& searched = piece.searched();
      RunAllotment allotment;
      allotment.threshold = {shares[p].threshold};
      allotment.ties = {shares[p].ties};
      AllottedTokens allotted(allotment, 0);
      const std::span<const float> row = searched.Row(g);
      for (size_t i = 0; i < row.size(); ++i) {
        const uint32_t token = searched.tokens.lo + searched.NodeOf(g, i);
        if (token < piece.range.lo || token >= piece.range.hi) continue;
        if (!allotted.Take(token, row[i])) continue;
        taken.push_back(piece.exact.Row(g)[token - piece.range.lo]);
      }
    }
    return taken;
  }

  const AuditedQuery& query_;
  const KvShape& shape_;
  const BlockTable& table_;
  const uint32_t task_tokens_;
  const std::function<bool()>& stop_;
  std::vector<TokenRange> ranges_;
  std::vector<float> turned_;
  std::vector<Piece> pieces_;
  std::vector<bool> read_;  // of the range's tokens
};

}  // namespace

double AuditMeasure::Ratio() const { return ErrorRatio(actual, predicted); }

std::optional<AuditMeasure> MeasureAudit(const AuditedQuery& query, const KvShape& shape,
                                         const BlockTable& table, uint32_t task_tokens,
                                         const std::function<bool()>& stop) {
  return Measuring(query, shape, table, task_tokens, stop).Measure();
}

}  // namespace quarry
