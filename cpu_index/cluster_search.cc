// How a search of clustered indexes decides, for all of its parts, what they open and read.
#include "cpu_index/cluster_search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "cpu_index/cluster_part.h"
#include "cpu_index/simd.h"

namespace quarry {
namespace {

using Depth = ClusterLimits::Depth;

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kAll = std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::lowest();

// Of the tolerated error: what supers, and leaves, that stay closed may make of it.
constexpr float kSuperShare = 0.3f, kLeafShare = 0.4f;
// About so many tokens with the highest scores by their codes are scored by their rows for each
// query, where every code is read: a needle's score may be far too low, but hardly any other's is
// higher. Of 1,700 tokens with 2% of a query's mass or more, whose codes missed 3 nats of their
// scores or more, 9 in 10 were among the best 30 to 250. Alone they were too few: on pairs of
// needles in 131,072 tokens errors (mean, 95th percentile) at a tolerance of 0.02 were 0.025, 0.117
// with 256 and 0.017, 0.027 with 1024. Beside what may be heavy (below) 128 to 1024 err alike.
constexpr float kRankedTokens = 256;
// And all that would weigh what is tolerated if their codes missed their scores by so many
// deviations, each token's its scale times the query's. What decoding seeks in a text lies far from
// what it is grouped with, at scales of 1.5 to 2.9, and was missed by 2.6 to 3.6 deviations, 6 to
// 12 nats: phi3-b's layer 2 on 131,072 tokens of variables erred by 0.13 with two deviations of a
// usual token, and errs by 0.03 so. With four, heads that need few tokens are scanned.
constexpr float kCodesMiss = 3;
// Rows may miss some nats of a needle's score: of two tokens with half of the mass each, one with its
// score known, the other was left at a fortieth. A token that would weigh what is tolerated if it
// were heavier by so much is read exactly, as far as few are.
constexpr float kRowsMiss = 5;
constexpr uint32_t kBestExact = 64;
// What a search knows of tokens was learned of queries that have most of their mass among them.
// Where what lies elsewhere counts beside it (Elsewhere), in a window, estimates err by e to this
// power as much if that is all. Of 41,472 queries on models at work predictions were within a
// factor of two for 94.97% with 0 and for 95.42% with 0.2, where as many erred above as below.
constexpr float kDoubtElsewhere = 0.2f;
// A query whose predicted error would be more than so many times what is tolerated is attended
// exactly.
constexpr float kMostOverdrawn = 2;
// What scoring leaves, reading a token's code, and the row of one that any query of a block reads
// take, by the time of an exact scan of a token. Of heads of 64 to 128 dimensions, one to four
// queries a KV head, out of memory: rows 2.3 to 3.0; leaves and codes together 0.27 of heads of 96
// and 128. With AVX2, 128 dimensions: 2.2, and 0.22.
constexpr float kLeavesTime = 0.06f, kCodesTime = 0.25f, kRowTime = 2.9f;
// What a search takes beside what it reads: of fewer tokens the scan is as fast.
constexpr uint64_t kFewTokens = 10000;
// Of what the other queries of a block read, what the one that reads most does not: where half of
// all tokens are read, about as much as if they had a quarter of it in common.
constexpr float kUnshared = 0.25f;
// Leaves of less than this share of the tolerated error, by the root of their number, stand for their
// super.
constexpr float kNegligible = 0.05f, kLeastNegligible = 1e-3f;

constexpr ErrorCut kNothing{.refine = kAll, .exact = kAll};

// What tokens score by their codes, if those of a leaf lie around its centre with this deviation as
// in a normal distribution.
ScoreHistogram TokensAround(const ScoreHistogram& centres, float deviation) {
  constexpr int kBins = ScoreHistogram::kBins, kReach = 96;  // bins
  ScoreHistogram tokens;
  if (centres.top == kNone) return tokens;
  const float width = ScoreHistogram::kPerNat * deviation + 0.5f;
  // Of a leaf's tokens those that lie so many bins below its centre's; past kReach none.
  float spread[2 * kReach + 1];
  const auto reach = static_cast<int>(std::min(float{kReach}, 4 * width));
  for (int b = 0; b <= 2 * reach; ++b) {
    const float x = static_cast<float>(b - reach) / width;
    spread[b] = 0.3989f * kLeafRows / width * std::exp(-0.5f * x * x);
  }
  tokens.top = centres.top + static_cast<float>(reach) / ScoreHistogram::kPerNat;
  float count[kBins + 2 * kReach] = {}, left = 0;
  for (int b = 0; b < kBins - 1; ++b) {
    for (int j = 0; j <= 2 * reach && centres.count[b] > 0; ++j) {
      count[b + j] += static_cast<float>(centres.count[b]) * spread[j];
    }
    left += count[b];
    tokens.count[b] = static_cast<uint32_t>(left);
    left -= static_cast<float>(tokens.count[b]);
  }
  return tokens;
}

// The score that about `count` of them have at least.
float BestOf(const ScoreHistogram& tokens, uint32_t count) {
  constexpr int kSeen = ScoreHistogram::kBins - 1;
  uint64_t above = 0;
  int b = 0;
  while (b < kSeen && above < count) above += tokens.count[b++];
  return above == 0 ? kLeast : tokens.Below(b);
}

// out [queries][dims] += weight[i] * slope * query i
void AddSlope(std::span<const uint16_t> slope, const QueryBlock& queries,
              std::span<const float> weight, std::span<Partial> out) {
  const uint32_t d = queries.head_dim;
  std::vector<float> along(size_t{queries.queries} * d);
  kernels::ScoreTile tile{};
  tile.q = queries.q;
  tile.queries = queries.queries;
  tile.head_dim = d;
  tile.k = slope.data();
  tile.tokens = d;
  tile.dtype = kernels::kBf16;
  tile.scale = queries.scale;
  tile.out = along.data();
  tile.ld_out = d;
  Kernels().score(tile);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    for (uint32_t c = 0; c < d; ++c) out[i].acc[c] += weight[i] * along[size_t{i} * d + c];
  }
}

}  // namespace

float LogAdd(float a, float b) {
  const float most = std::max(a, b);
  return most == kNone ? kNone : most + std::log(std::exp(a - most) + std::exp(b - most));
}

ClusterQueries::ClusterQueries(const ClusterModel& head, const QueryBlock& queries,
                               const ClusterLimits& limited)
    : model(head),
      block(queries),
      limits(limited),
      tolerance(limited.tolerance / head.caution),
      every_code(head.open_all && limited.depth == Depth::kAsNeeded) {}

void ClusterQueries::Prepare(const ClusterIndex::Parts& parts) {
  const uint32_t d = block.head_dim;
  coordinates.resize(size_t{count()} * d);
  std::vector<float> mean_score(count());
  kernels::ScoreTile tile{};
  tile.q = block.q;
  tile.queries = count();
  tile.head_dim = d;
  tile.scale = block.scale;
  tile.dtype = kernels::kBf16;
  tile.k = model.query_map.data();
  tile.tokens = d;
  tile.out = coordinates.data();
  tile.ld_out = d;
  Kernels().score(tile);
  tile.dtype = kernels::kFp32;
  tile.k = model.basis.mean.data();
  tile.tokens = 1;
  tile.out = mean_score.data();
  tile.ld_out = 1;
  Kernels().score(tile);
  node = NodeLevel::Prepare(coordinates, d, model.rank(), mean_score, model.centre_step);
  for (uint32_t i = 0; i < count(); ++i) {
    const KeyCodes::Query one = parts.codes.Prepare(Coordinates(i).first(model.rank()), 0);
    code.weight.insert(code.weight.end(), one.weight, one.weight + KeyCodes::kCoordinates);
    code.scale.push_back(one.scale);
    code.offset.push_back(one.offset);
  }
  row = parts.key_rows.Prepare(coordinates, count());
  leaf_breadth = model.Breadth(model.leaf, coordinates, count());
  super_breadth = model.Breadth(model.super, coordinates, count());
  code_variance = model.CodeVariance(coordinates, count());
  for (float& variance : code_variance) {
    code_miss.push_back(kCodesMiss * std::sqrt(variance));
    variance = std::min(ClusterModel::kMostCodeVariance, variance);
  }
  for (uint32_t i = 0; i < count(); ++i) {
    unrest.push_back(model.UnrestOf(code_variance[i], leaf_breadth[i], super_breadth[i]));
    trusted.push_back(model.Trusts(Coordinates(i)));
  }
}

void ClusterQueries::PrepareCoarse() {
  const std::vector<float> all = model.CodeVariance(coordinates, count());
  for (uint32_t i = 0; i < count(); ++i) {
    const float usual = model.UnrestOf(code_variance[i], 0, 0).token;
    Coarse& own = coarse.emplace_back();
    for (uint32_t step = 0; step < kScaleSteps; ++step) {
      const float scale = 1 + static_cast<float>(step) / kStepsPerScale;
      const float scaled = std::min(ClusterModel::kMostCodeVariance, all[i] * scale * scale);
      own.spread[step] = 0.5f * (scaled - code_variance[i]);
      own.unrest[step] = std::log(model.UnrestOf(scaled, 0, 0).token / usual);
    }
  }
}

uint32_t ClusterQueries::MostTokens(uint32_t query) const {
  return limits.most_tokens.empty() ? ~0u : limits.most_tokens[query];
}

float ClusterQueries::Elsewhere(uint32_t query) const {
  return limits.other_length.empty() ? kNone : limits.other_length[query] - model.log_length;
}

ClusterSearch::ClusterSearch(std::span<const ClusterRun> runs, const QueryBlock& queries,
                             const ClusterLimits& limits, uint32_t parts)
    : queries_(std::make_unique<ClusterQueries>(*runs.front().index->model(), queries, limits)),
      expected_(queries.queries),
      cuts_(queries.queries, kNothing),
      scanned_(queries.queries),
      top_(queries.queries),
      closed_(queries.queries),
      mass_(queries.queries) {
  for (const ClusterRun& run : runs) {
    tokens_ += run.index->tokens();
    far_rows_ |= run.view->fetcher != nullptr;
  }
  uint64_t tokens = 0;
  for (size_t lo = 0, hi = 0; lo < runs.size(); lo = hi) {
    do {
      tokens += runs[hi++].index->tokens();
    } while (hi < runs.size() && tokens * parts < tokens_ * (parts_.size() + 1));
    parts_.push_back(std::make_unique<ClusterPart>(runs.subspan(lo, hi - lo), *queries_));
  }
  const bool needed = limits.depth == Depth::kAsNeeded;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    uint64_t seen = 0;
    for (const ClusterRun& run : runs) seen += Intersect(run.view->tokens(), run.ranges[i]).size();
    seen_ = std::max(seen_, seen);
    scanned_[i] = needed && limits.tolerance <= 0;
  }
  const std::vector<uint64_t> no_rows(queries.queries);
  ScanIfFaster(no_rows);
  if (!ScansAll() && UsesHistory() && limits.history->ScanNext(limits.tolerance)) ScanUncapped();
  if (!ScansAll()) {
    queries_->Prepare(runs.front().index->parts());
    for (uint32_t i = 0; i < queries.queries; ++i) {
      if (needed && !queries_->trusted[i]) scanned_[i] = true;
    }
    ScanIfFaster(no_rows);
    if (ScansAll()) NoteLook(false, no_rows);
  }
  if (!ScansAll()) DecideSupers();
  if (ScansAll()) stage_ = Stage::kAttend;
}

ClusterSearch::~ClusterSearch() = default;

void ClusterSearch::RunPart(uint32_t part) {
  switch (stage_) {
    case Stage::kLeaves:
      return parts_[part]->ScoreLeaves(super_floors_);
    case Stage::kTokens:
      return parts_[part]->ScoreTokens(*floors_);
    case Stage::kAttend:
      return Attend(part);
  }
}

bool ClusterSearch::Next() {
  switch (stage_) {
    case Stage::kLeaves:
      DecideLeaves();
      stage_ = ScansAll() ? Stage::kAttend : Stage::kTokens;
      return true;
    case Stage::kTokens:
      DecideTokens();
      stage_ = Stage::kAttend;
      return true;
    case Stage::kAttend:
      break;
  }
  return false;
}

// Log of what is known to be elsewhere, as far as it counts beside what tokens weigh here.
float ClusterSearch::Elsewhere(uint32_t query, float own) const {
  const float most = std::log(std::max(1.0f, ClusterModel::kTried.front() / queries_->tolerance));
  return own == kNone ? queries_->Elsewhere(query)
                      : std::min(queries_->Elsewhere(query), own + most);
}

// Log of what all tokens weigh, with what is known to be elsewhere.
float ClusterSearch::Mass(uint32_t query, float ClusterFindings::* mass) const {
  float own = kNone;
  for (const auto& part : parts_) own = LogAdd(own, part->findings()[query].*mass);
  return LogAdd(own, Elsewhere(query, own));
}

ScoreHistogram ClusterSearch::Together(uint32_t query,
                                       ScoreHistogram ClusterFindings::* scores) const {
  ScoreHistogram all = parts_.front()->findings()[query].*scores;
  for (size_t p = 1; p < parts_.size(); ++p) all.Add(parts_[p]->findings()[query].*scores);
  return all;
}

// By e^top_.
float ClusterSearch::Sum(uint32_t query, float ClusterFindings::* weight, int power) const {
  float sum = 0;
  for (const auto& part : parts_) {
    const ClusterFindings& found = part->findings()[query];
    if (found.max == kNone) continue;
    sum += found.*weight * std::exp(static_cast<float>(power) * (found.max - top_[query]));
  }
  return sum;
}

// The least weight of a node of `tokens` tokens (a log) that is opened, so that those below it err by
// at most `share` of what is tolerated.
float ClusterSearch::OpenedFrom(uint32_t query, float share, float tokens, float doubt) const {
  const float allowed = Mass(query, &ClusterFindings::mass) - tokens +
                        std::log(share * queries_->tolerance / doubt);
  return std::max(kLeast, OpenFrom(Together(query, &ClusterFindings::weights), allowed));
}

bool ClusterSearch::ScansAll() const {
  return std::find(scanned_.begin(), scanned_.end(), false) == scanned_.end();
}

// Attends all but queries with a cap exactly, unless what is to be done still should take clearly
// less time. rows: [queries] how many each query is to read.
void ClusterSearch::ScanIfFaster(std::span<const uint64_t> rows) {
  const ClusterQueries& q = *queries_;
  if (!MayScan()) return;
  float search = TimeOfRows(rows);
  if (q.every_code && stage_ == Stage::kLeaves) {  // codes are still to be read
    search += kCodesTime * static_cast<float>(tokens_);
  }
  // Keys and values of those that are scanned anyway are there for the others.
  const auto scanned = static_cast<float>(std::count(scanned_.begin(), scanned_.end(), true));
  const float others = 1 - scanned / static_cast<float>(q.count());
  const float most = ScanHistory::kWorthwhile * others * static_cast<float>(seen_);
  if (seen_ > kFewTokens && search <= most) return;
  ScanUncapped();
}

// By the time of a token's scan; of queries that may be scanned instead.
float ClusterSearch::TimeOfRows(std::span<const uint64_t> rows) const {
  uint64_t most = 0, sum = 0;
  for (uint32_t i = 0; i < queries_->count(); ++i) {
    if (scanned_[i] || queries_->MostTokens(i) != ~0u) continue;
    most = std::max(most, rows[i]);
    sum += rows[i];
  }
  return kRowTime * (static_cast<float>(most) + kUnshared * static_cast<float>(sum - most));
}

void ClusterSearch::ScanUncapped() {
  for (uint32_t i = 0; i < queries_->count(); ++i) {
    if (queries_->MostTokens(i) != ~0u) continue;
    scanned_[i] = true;
    cuts_[i] = kNothing;
  }
}

bool ClusterSearch::MayScan() const {
  const ClusterQueries& q = *queries_;
  return q.limits.depth == Depth::kAsNeeded && q.model.scan_if_faster && !far_rows_;
}

bool ClusterSearch::UsesHistory() const { return queries_->limits.history != nullptr && MayScan(); }

// By that of a scan. codes: whether they were read; rows: [queries] that are read still.
float ClusterSearch::TimeOfLook(bool codes, std::span<const uint64_t> rows) const {
  const bool scans = std::find(scanned_.begin(), scanned_.end(), true) != scanned_.end();
  const float looked =
      (kLeavesTime + (codes ? kCodesTime : 0)) * static_cast<float>(tokens_) + TimeOfRows(rows);
  return looked / static_cast<float>(seen_) + (scans ? 1 : 0);
}

void ClusterSearch::NoteLook(bool codes, std::span<const uint64_t> rows) const {
  if (!UsesHistory()) return;
  const float tolerance = queries_->limits.tolerance;
  queries_->limits.history->Looked(tolerance, TimeOfLook(codes, rows), ScansAll(),
                                   tolerance <= queries_->model.scans_from);
}

float ClusterSearch::Time() const {
  std::vector<uint64_t> rows;
  for (const ErrorCut& cut : cuts_) rows.push_back(cut.tokens);
  const bool codes = queries_->every_code;
  // One that would take longer turns to the scan.
  return std::min(TimeOfLook(codes, rows), 1 + kLeavesTime + (codes ? kCodesTime : 0));
}

// Little work: not worth a stage of its own.
void ClusterSearch::DecideSupers() {
  const ClusterQueries& q = *queries_;
  for (const auto& part : parts_) part->ScoreSupers();
  const bool all = q.limits.depth != Depth::kAsNeeded || q.every_code;
  super_floors_.assign(q.count(), all ? kLeast : kAll);
  for (uint32_t i = 0; i < q.count(); ++i) {
    if (all || scanned_[i]) continue;
    super_floors_[i] =
        OpenedFrom(i, kSuperShare, kLogSuper, q.model.super_doubt * q.unrest[i].super);
  }
}

void ClusterSearch::DecideLeaves() {
  const ClusterQueries& q = *queries_;
  std::vector<ScoreHistogram> tokens(q.count());  // expected
  std::vector<uint64_t> rows(q.count());
  std::vector<float> ranked(q.count(), kAll), heavy(q.count(), kAll);
  for (uint32_t i = 0; i < q.count() && q.every_code; ++i) {
    if (scanned_[i]) continue;
    const float variance = q.model.leaf.variance * q.leaf_breadth[i] - q.code_variance[i];
    tokens[i] =
        TokensAround(Together(i, &ClusterFindings::centres), std::sqrt(std::max(variance, 0.0f)));
    // Scores of tokens count in what codes miss.
    tokens[i].top += 0.5f * q.code_variance[i];
    top_[i] = tokens[i].top;
    const float mass = Mass(i, &ClusterFindings::mass);
    mass_[i] = std::exp(mass - top_[i]);
    expected_[i] = CutOf(i, tokens[i], q.MostTokens(i)).tokens;
    const float needed =
        UsesHistory() ? q.limits.history->NeededRows(q.model.needed_rows) : q.model.needed_rows;
    rows[i] = static_cast<uint64_t>(needed * static_cast<float>(expected_[i]));
    ranked[i] = BestOf(tokens[i], kRankedTokens);
    heavy[i] = mass + std::log(q.tolerance) + 0.5f * q.code_variance[i];
    const float usual = heavy[i] - q.code_miss[i];  // of a token of scale 1
    if (usual < ranked[i]) rows[i] = std::max(rows[i], tokens[i].CountFrom(usual));
  }
  if (q.every_code && !(UsesHistory() && q.limits.history->LookDeeper())) ScanIfFaster(rows);
  if (ScansAll()) return NoteLook(false, rows);
  queries_->PrepareCoarse();
  const std::vector<float> none(q.count(), kAll);
  floors_ = std::make_unique<TokenFloors>(
      TokenFloors{.outlier = none, .known = none, .leaf = none, .ranked = none, .heavy = none});
  for (uint32_t i = 0; i < q.count(); ++i) {
    if (scanned_[i]) continue;
    floors_->leaf[i] = LeafFloor(i);
    if (!q.every_code) continue;
    // By a lower bound of the mass: estimates from spread are least true of such heads.
    const float mass = Mass(i, &ClusterFindings::centre_mass);
    floors_->known[i] = mass + std::log(q.tolerance * kOutlierShare);
    // Of tokens with what their codes may miss.
    const float spread = 0.5f * q.code_variance[i];
    floors_->outlier[i] = std::min({floors_->known[i] + q.code_miss[i],
                                    ranked[i] - spread + q.code_miss[i], heavy[i] - spread});
    floors_->ranked[i] = ranked[i];
    floors_->heavy[i] = heavy[i];
  }
}

float ClusterSearch::LeafFloor(uint32_t query) const {
  const ClusterQueries& q = *queries_;
  if (q.limits.depth >= Depth::kCodes) return kLeast;
  if (q.limits.depth != Depth::kAsNeeded) return kAll;
  return OpenedFrom(query, kLeafShare, kLogLeaf, q.model.leaf_doubt * q.unrest[query].leaf);
}

// What all tokens weigh, now that those of opened leaves are scored.
void ClusterSearch::WeighTokens() {
  const ClusterQueries& q = *queries_;
  tokens_by_score_.resize(q.count());
  for (uint32_t i = 0; i < q.count(); ++i) {
    ScoreHistogram& tokens = tokens_by_score_[i];
    for (const auto& part : parts_) tokens.top = std::max(tokens.top, part->findings()[i].max);
    tokens.top = std::ceil(tokens.top * ScoreHistogram::kPerNat) / ScoreHistogram::kPerNat;
    tokens.Add(Together(i, &ClusterFindings::weights));
    top_[i] = tokens.top;
    closed_[i] = Sum(i, &ClusterFindings::by_leaf) * q.model.leaf_doubt * q.unrest[i].leaf +
                 Sum(i, &ClusterFindings::by_super) * q.model.super_doubt * q.unrest[i].super;
    mass_[i] = Sum(i, &ClusterFindings::by_code) + Sum(i, &ClusterFindings::by_leaf) +
               Sum(i, &ClusterFindings::by_super);
  }
}

ScoreHistogram ClusterSearch::WantedTokens(uint32_t query) {
  if (tokens_by_score_.empty()) WeighTokens();
  if (scanned_[query] || !std::isfinite(mass_[query])) return {};
  ScoreHistogram wanted = tokens_by_score_[query];
  const float least = CutOf(query, wanted, ~0u).refine;
  for (int b = 0; b < ScoreHistogram::kBins; ++b) {
    if (b == ScoreHistogram::kBins - 1 || wanted.Below(b + 1) < least) wanted.count[b] = 0;
  }
  return wanted;
}

void ClusterSearch::DecideTokens() {
  const ClusterQueries& q = *queries_;
  if (tokens_by_score_.empty()) WeighTokens();
  std::vector<uint64_t> rows(q.count());
  for (const auto& part : parts_) leaves_ += part->leaf_row();
  for (uint32_t i = 0; i < q.count(); ++i) {
    if (scanned_[i]) continue;
    if (q.limits.depth != Depth::kAsNeeded) {
      cuts_[i] = ForcedCut(i);
      continue;
    }
    cuts_[i] = CutOf(i, tokens_by_score_[i], q.MostTokens(i));
    rows[i] = cuts_[i].tokens;
    scanned_[i] = !std::isfinite(mass_[i]) ||
                  (cuts_[i].error > kMostOverdrawn * Allowed(i) && q.MostTokens(i) == ~0u);
    if (scanned_[i]) cuts_[i] = kNothing;
  }
  if (UsesHistory() && q.every_code) {
    q.limits.history->Needed(std::accumulate(rows.begin(), rows.end(), uint64_t{0}),
                             std::accumulate(expected_.begin(), expected_.end(), uint64_t{0}));
  }
  ScanIfFaster(rows);
  NoteLook(true, rows);
}

// By e^top_.
float ClusterSearch::Allowed(uint32_t query) const {
  const float own = std::log(mass_[query]) + top_[query];
  const double elsewhere = std::exp(double{Elsewhere(query, own)} - top_[query]);
  return static_cast<float>(queries_->tolerance * std::hypot(double{mass_[query]}, elsewhere));
}

// Of all doubts, where that is allowed.
float ClusterSearch::Correction(uint32_t query, float allowed) const {
  const float own = allowed / mass_[query];
  const float hypot = own / queries_->tolerance;  // of 1 and what is elsewhere
  const float share = 1 / (1 + std::sqrt(std::max(0.0f, hypot * hypot - 1)));
  return queries_->model.CorrectionAt(own) * std::exp(kDoubtElsewhere * (1 - share));
}

ErrorCut ClusterSearch::CutOf(uint32_t query, const ScoreHistogram& tokens,
                              uint32_t most_tokens) const {
  const ClusterQueries& q = *queries_;
  if (tokens.top == kNone) return kNothing;
  const float allowed = Allowed(query), correction = Correction(query, allowed);
  ErrorCutInput in;
  in.tokens = tokens;
  in.token_doubt = correction * q.model.token_doubt * q.unrest[query].token;
  in.common_part = q.model.common_doubt / q.model.token_doubt;
  in.refined_part = q.model.row_doubt / q.model.token_doubt;
  in.closed = correction * closed_[query];
  in.allowed = allowed;
  in.most_tokens = most_tokens;
  in.surely_from = tokens.top + std::log(in.allowed) - kRowsMiss;
  in.surely_most = kBestExact;
  return FindErrorCut(in);
}

ErrorCut ClusterSearch::ForcedCut(uint32_t query) const {
  const ClusterLimits& limits = queries_->limits;
  std::vector<float> scores;
  for (const auto& part : parts_) {
    const std::span<const float> some = part->TokenScores(query);
    scores.insert(scores.end(), some.begin(), some.end());
  }
  if (limits.best_tokens == 0 || scores.empty()) return kNothing;
  float least = kLeast;
  if (limits.best_tokens < scores.size()) {
    const auto last = scores.begin() + (limits.best_tokens - 1);
    std::nth_element(scores.begin(), last, scores.end(), std::greater<>());
    least = std::max(kLeast, *last);
  }
  return {.refine = least, .exact = limits.depth == Depth::kExact ? least : kAll};
}

void ClusterSearch::Attend(uint32_t part) {
  const ClusterQueries& q = *queries_;
  const float share = std::max(kLeastNegligible, kNegligible * q.tolerance) /
                      std::sqrt(static_cast<float>(leaves_ + 1));
  std::vector<float> least;
  for (uint32_t i = 0; i < q.count(); ++i) {
    const float max = parts_[part]->findings()[i].max;
    const float own = max == kNone ? 0 : mass_[i] * std::exp(top_[i] - max);
    least.push_back(std::max(share * own, std::numeric_limits<float>::min()));
  }
  parts_[part]->Attend(cuts_, least, scanned_);
}

// The error that is left, less what other queries had read of what this one had left to its codes.
ErrorCut ClusterSearch::Left(uint32_t query) const {
  const ClusterQueries& q = *queries_;
  ErrorCut cut = cuts_[query];
  if (!(cut.error > 0)) return cut;
  const float correction = Correction(query, Allowed(query));
  const float unrest = correction * q.unrest[query].token, doubt = q.model.token_doubt * unrest;
  const float apart = cut.error * cut.error - cut.together * cut.together -
                      doubt * doubt * Sum(query, &ClusterFindings::others_squares, 2);
  cut.together =
      std::max(correction * closed_[query],
               cut.together - q.model.common_doubt * unrest * Sum(query, &ClusterFindings::others));
  cut.error = std::sqrt(std::max(0.0f, apart) + cut.together * cut.together);
  return cut;
}

float ClusterSearch::TogetherShare(uint32_t query) const {
  const ErrorCut cut = Left(query);
  return cut.error > 0 ? cut.together * cut.together / (cut.error * cut.error) : 0;
}

void ClusterSearch::Finish(std::span<Partial> acc, std::vector<uint32_t>* refined) const {
  const ClusterQueries& q = *queries_;
  const uint32_t d = q.block.head_dim;
  std::vector<float> sums(size_t{q.count()} * d);
  std::vector<Partial> estimated(q.count());
  for (uint32_t i = 0; i < q.count(); ++i) {
    estimated[i].acc = std::span(sums).subspan(size_t{i} * d, d);
    for (const auto& part : parts_) {
      acc[i].Merge(part->exact()[i]);
      estimated[i].Merge(part->estimated()[i]);
    }
  }
  const auto add_slope = [&](std::span<const uint16_t> slope, float ClusterFindings::* weight) {
    std::vector<float> weights;
    for (uint32_t i = 0; i < q.count(); ++i) {
      const bool none = estimated[i].max == kNone;
      weights.push_back(none ? 0 : Sum(i, weight) * std::exp(top_[i] - estimated[i].max));
    }
    if (std::any_of(weights.begin(), weights.end(), [](float w) { return w != 0; })) {
      AddSlope(slope, q.block, weights, estimated);
    }
  };
  add_slope(q.model.token_slope, &ClusterFindings::by_code);
  add_slope(q.model.leaf.slope, &ClusterFindings::by_leaf);
  add_slope(q.model.super.slope, &ClusterFindings::by_super);
  if (q.prepared()) acc[0].bytes += q.model.query_bytes();
  for (const auto& part : parts_) acc[0].bytes += part->bytes();
  for (uint32_t i = 0; i < q.count(); ++i) {
    if (estimated[i].max != kNone) {
      const float error =
          Left(i).error * std::exp(top_[i] - estimated[i].max + q.model.log_length);
      estimated[i].doubt = error * error;
    }
    acc[i].Merge(estimated[i]);
  }
  if (refined == nullptr) return;
  for (const auto& part : parts_) part->ListRead(refined);
}

void ShareCap(std::span<const CappedQuery> searches, uint32_t most) {
  std::vector<ScoreHistogram> wanted;
  for (const CappedQuery& one : searches) wanted.push_back(one.search->WantedTokens(one.query));
  const std::vector<uint32_t> shares = ShareTokens(wanted, most);
  for (size_t i = 0; i < searches.size(); ++i) *searches[i].most_tokens = shares[i];
}

void SearchClusters(std::span<const ClusterRun> runs, const QueryBlock& queries,
                    const ClusterLimits& limits, std::span<Partial> acc,
                    std::vector<uint32_t>* refined) {
  if (runs.empty() || queries.queries == 0) return;
  ClusterSearch search(runs, queries, limits);
  do {
    search.RunPart(0);
  } while (search.Next());
  search.Finish(acc, refined);
}

}  // namespace quarry
