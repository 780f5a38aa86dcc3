#include "daemon/attend_lane.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "cpu_index/budget.h"
#include "daemon/kv_segments.h"
#include "daemon/run_registry.h"

namespace quarry {

// What one unit scans, and by which index.
class AttendLane::View {
 public:
  View(const AttendLane& lane, uint32_t u)
      : index(*lane.indexes_[u]),
        // The exact scan reads no more than is asked; another index wants its whole run.
        segments(*lane.key_.shape, lane.key_.layer, lane.key_.kv_head,
                 &index == &ExactScan() && lane.clusters_[u] == nullptr ? lane.unit(u).tokens
                                                                        : lane.unit(u).run_tokens,
                 lane.unit(u).blocks, lane.unit(u).first_block) {}
  // All rows in memory; null where they could not be read, which the lane notes.
  const KvView* Whole(AttendLane* lane) {
    const KvView* const whole = segments.Whole();
    if (whole == nullptr) lane->NoteRead(segments.status());
    return whole;
  }

  const TokenIndex& index;
  KvSegments segments;
};

// The queries of one unit: contiguous, each with its range.
class AttendLane::Queries {
 public:
  Queries(const AttendLane& lane, const ScanUnit& unit) {
    const KvShape& s = *lane.key_.shape;
    for (const TokenRange& range : unit.ranges) {
      for (uint32_t g = 0; g < lane.group_; ++g) ranges_.push_back(range);
    }
    block_.q = Pack(lane, unit);
    block_.q_dtype = lane.key_.q_dtype;
    block_.queries = static_cast<uint32_t>(ranges_.size());
    block_.head_dim = s.head_dim;
    if (unit.turn != nullptr) TurnBack(*unit.turn);
    block_.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    block_.ranges = ranges_;
  }
  const QueryBlock& block() const { return block_; }

 private:
  // The lane's own buffer where the unit's members are neighbours in it, else a copy.
  const float* Pack(const AttendLane& lane, const ScanUnit& unit) {
    const size_t floats = size_t{lane.group_} * lane.key_.shape->head_dim;
    bool neighbours = true;
    for (size_t i = 1; i < unit.members.size(); ++i) {
      neighbours &= unit.members[i] == unit.members[i - 1] + 1;
    }
    const auto q_of = [&](uint32_t member) { return lane.members_[member].q; };
    if (neighbours) return q_of(unit.members.front());
    packed_.resize(unit.members.size() * floats);
    for (size_t i = 0; i < unit.members.size(); ++i) {
      std::copy_n(q_of(unit.members[i]), floats, packed_.data() + i * floats);
    }
    return packed_.data();
  }

  // Turned queries no longer fit the narrow type that they came in. Turning them for each unit
  // costs less than a hundredth of scanning one block.
  void TurnBack(const Rotation& turn) {
    if (block_.q != packed_.data()) {
      packed_.assign(block_.q, block_.q + size_t{block_.queries} * block_.head_dim);
    }
    turn.TurnQueries(packed_.data(), block_.queries, block_.head_dim);
    block_.q = packed_.data();
    block_.q_dtype = DType::kFp32;
  }

  absl::InlinedVector<TokenRange, 32> ranges_;
  std::vector<float> packed_;
  QueryBlock block_;
};

// The runs of a family, whose queries are the same but for what they see of each.
class AttendLane::FamilySearch {
 public:
  FamilySearch(AttendLane& lane, const Family& family)
      : lane_(lane), answers_(lane.UnitPartials(family.front())) {
    for (uint32_t u : family) {
      lane.ClearPartials(u);
      views_.emplace_back(lane, u);
      kv_.push_back(views_.back().segments.view());
      queries_.emplace_back(lane, lane.units_[u]);
      runs_.push_back({lane.clusters_[u], &kv_.back(), queries_.back().block().ranges});
    }
    limits_.tolerance = lane.key_.tolerance;
    for (uint32_t member : lane.units_[family.front()].members) {
      const auto first = lane.elsewhere_.begin() + member * lane.group_;
      elsewhere_.insert(elsewhere_.end(), first, first + lane.group_);
      const uint32_t most = lane.members_[member].budget.k;
      most_tokens_.insert(most_tokens_.end(), lane.group_, most > 0 ? most : ~0u);
    }
    limits_.most_tokens = most_tokens_;
    limits_.other_length = elsewhere_;
    limits_.history = &runs_.front().index->model()->history;
    search_.emplace(runs_, queries_.front().block(), limits_, lane.search_parts_);
  }
  FamilySearch(const FamilySearch&) = delete;

  uint32_t parts() const { return search_->parts(); }
  void RunPart(uint32_t part) { search_->RunPart(part); }
  bool ScoredTokens() const { return search_->ScoredTokens(); }
  CappedQuery Capped(uint32_t query) { return {&*search_, query, &most_tokens_[query]}; }
  // False when the answers are there.
  bool Next() {
    if (search_->Next()) return true;
    search_->Finish(answers_);
    for (const View& view : views_) lane_.NoteRead(view.segments.status());
    return false;
  }

 private:
  AttendLane& lane_;
  const std::span<Partial> answers_;
  std::deque<View> views_;
  std::deque<KvView> kv_;
  std::deque<Queries> queries_;
  std::vector<ClusterRun> runs_;
  std::vector<float> elsewhere_;
  std::vector<uint32_t> most_tokens_;
  ClusterLimits limits_;
  std::optional<ClusterSearch> search_;
};

AttendLane::AttendLane(const LaneKey& key, std::span<const LaneMember> members,
                       std::span<const ScanUnit> units,
                       std::span<const KeyIndex* const> indexes, std::span<const ScanUnit> rest,
                       uint32_t search_parts)
    : key_(key),
      group_(key.shape->group()),
      units_(units),
      rest_(rest),
      search_parts_(search_parts),
      members_(members.begin(), members.end()),
      results_(members.size()) {
  const size_t head_dim = key.shape->head_dim;
  const size_t floats = group_ * head_dim;
  if (members_.size() > 1) {
    packed_q_.resize(members_.size() * floats);
    for (size_t m = 0; m < members_.size(); ++m) {
      std::copy_n(members_[m].q, floats, packed_q_.data() + m * floats);
      members_[m].q = packed_q_.data() + m * floats;
    }
  }
  PickIndexes(indexes);
  searches_.resize(families_.size());
  shares_caps_ = families_.size() > 1 &&
                 std::any_of(members_.begin(), members_.end(),
                             [](const LaneMember& member) { return member.budget.k > 0; });
  size_t slots = 0;
  for (uint32_t u = 0; u < indexes_.size(); ++u) {
    first_slot_.push_back(static_cast<uint32_t>(slots));
    slots += unit(u).members.size() * group_;
  }
  first_slot_.push_back(static_cast<uint32_t>(slots));
  partials_.resize(slots);
  acc_ = std::make_unique_for_overwrite<float[]>(slots * head_dim);
  if (!searched_.empty()) {
    coarse_.resize(units_.size());
    allotments_.resize(units_.size());
    for (size_t u = 0; u < units_.size(); ++u) {
      allotments_[u].threshold.resize(units_[u].members.size() * group_);
      allotments_[u].ties.resize(units_[u].members.size() * group_);
      if (!key.samples) continue;
      allotments_[u].floor.resize(units_[u].members.size() * group_);
      allotments_[u].lift_key.resize(units_[u].members.size() * group_);
    }
    lost_mass_.resize(members_.size() * group_);
  }
  if (whole_.empty() && searched_.empty()) MeasureElsewhere();
  EnterPhase(!whole_.empty()      ? Phase::kAttend
             : !searched_.empty() ? Phase::kScore
                                  : Phase::kSearch);
}

void AttendLane::PickIndexes(std::span<const KeyIndex* const> indexes) {
  clusters_.resize(units_.size() + rest_.size());
  indexes_.assign(clusters_.size(), &ExactScan());
  for (uint32_t u = 0; u < clusters_.size(); ++u) {
    const KeyIndex* const index =
        key_.kind == ScanKind::kIndexed && u < units_.size() ? indexes[u] : nullptr;
    if (key_.kind == ScanKind::kIndexed && key_.tolerance == 0) {
      const auto* const tokens = dynamic_cast<const TokenIndex*>(index);
      if (tokens != nullptr) indexes_[u] = tokens;
      searched_.push_back(u);
    } else if (const auto* const clusters = dynamic_cast<const ClusterIndex*>(index)) {
      AddToFamily(u, clusters);
    } else {
      whole_.push_back(u);
    }
  }
}

// The queries are the same for all units of a family.
void AttendLane::AddToFamily(uint32_t u, const ClusterIndex* clusters) {
  clusters_[u] = clusters;
  const auto same = std::find_if(families_.begin(), families_.end(), [&](const Family& family) {
    return clusters_[family.front()]->model() == clusters->model() &&
           units_[family.front()].members == units_[u].members &&
           DistanceOf(units_[family.front()].turn) == DistanceOf(units_[u].turn);
  });
  if (same != families_.end()) return same->push_back(u);
  families_.push_back({u});
}

AttendLane::~AttendLane() = default;

uint64_t AttendLane::scan_bytes() const {
  uint64_t tokens = 0;
  for (uint32_t u = 0; u < indexes_.size(); ++u) tokens += unit(u).tokens.size();
  return tokens * 2 * key_.shape->vector_bytes();
}

uint64_t AttendLane::work_bytes() const {
  constexpr uint64_t kQueriesPerScan = 16;
  uint64_t tokens = 0;  // over the queries
  for (const ScanUnit& unit : units_) {
    tokens += uint64_t{unit.tokens.size()} * unit.members.size() * group_;
  }
  return tokens * 2 * key_.shape->vector_bytes() / kQueriesPerScan;
}

std::span<Partial> AttendLane::UnitPartials(uint32_t unit) {
  return std::span(partials_).subspan(first_slot_[unit], first_slot_[unit + 1] - first_slot_[unit]);
}

void AttendLane::ClearPartials(uint32_t unit) {
  const size_t head_dim = key_.shape->head_dim;
  const std::span<Partial> partials = UnitPartials(unit);
  float* const acc = acc_.get() + size_t{first_slot_[unit]} * head_dim;
  std::fill_n(acc, partials.size() * head_dim, 0.0f);
  for (size_t i = 0; i < partials.size(); ++i) {
    partials[i] = Partial{};
    partials[i].acc = std::span(acc + i * head_dim, head_dim);
  }
}

uint32_t AttendLane::tasks() const {
  switch (phase_) {
    case Phase::kAttend:
      return static_cast<uint32_t>(whole_.size());
    case Phase::kAllocate:
      return static_cast<uint32_t>(members_.size() * group_);
    case Phase::kSearch:
      return static_cast<uint32_t>(families_.size());
    case Phase::kSearchPart: {
      uint32_t parts = 0;
      for (const auto& search : searches_) parts += search == nullptr ? 0 : search->parts();
      return parts;
    }
    case Phase::kScore:
    case Phase::kRefine:
      break;
  }
  return static_cast<uint32_t>(searched_.size());
}

void AttendLane::RunTask(uint32_t task) {
  switch (phase_) {
    case Phase::kAttend:
      return Attend(whole_[task]);
    case Phase::kScore:
      return Score(searched_[task]);
    case Phase::kAllocate:
      return Allocate(task);
    case Phase::kRefine:
      return Refine(searched_[task]);
    case Phase::kSearch:
      return Search(task);
    case Phase::kSearchPart:
      return SearchPart(task);
  }
}

void AttendLane::EnterPhase(Phase phase) {
  phase_ = phase;
  tasks_left_.store(tasks(), std::memory_order_relaxed);
}

void AttendLane::NoteRead(const absl::Status& status) {
  if (status.ok()) return;
  absl::MutexLock lock(&status_mutex_);
  status_.Update(status);
  failed_.store(true, std::memory_order_release);
}

absl::Status AttendLane::status() const {
  absl::ReaderMutexLock lock(&status_mutex_);
  return status_;
}

bool AttendLane::NextPhase() {
  if (failed_.load(std::memory_order_acquire)) return false;
  switch (phase_) {
    case Phase::kAttend:
      if (families_.empty()) return false;
      MeasureElsewhere();
      EnterPhase(Phase::kSearch);
      return true;
    case Phase::kScore:
      EnterPhase(Phase::kAllocate);
      return true;
    case Phase::kAllocate:
      EnterPhase(Phase::kRefine);
      return true;
    case Phase::kSearch:
    case Phase::kSearchPart:
      return NextStage();
    case Phase::kRefine:
      break;
  }
  return false;
}

bool AttendLane::NextStage() {
  if (shares_caps_ && phase_ == Phase::kSearchPart) ShareCaps();
  for (auto& search : searches_) {
    if (phase_ == Phase::kSearchPart && search != nullptr && !search->Next()) search.reset();
  }
  EnterPhase(Phase::kSearchPart);
  return tasks() > 0;
}

// All searches that score tokens do so in the same phase: they have the same stages before it.
void AttendLane::ShareCaps() {
  std::vector<std::vector<CappedQuery>> queries(members_.size() * group_);
  for (size_t f = 0; f < families_.size(); ++f) {
    if (searches_[f] == nullptr || !searches_[f]->ScoredTokens()) continue;
    const std::vector<uint32_t>& members = units_[families_[f].front()].members;
    for (uint32_t i = 0; i < members.size() * group_; ++i) {
      queries[members[i / group_] * group_ + i % group_].push_back(searches_[f]->Capped(i));
    }
  }
  for (size_t i = 0; i < queries.size(); ++i) {
    const uint32_t most = members_[i / group_].budget.k;
    if (most > 0 && queries[i].size() > 1) ShareCap(queries[i], most);
  }
}

// The lengths of the sums over what has been attended whole.
void AttendLane::MeasureElsewhere() {
  const size_t head_dim = key_.shape->head_dim;
  std::vector<Partial> totals(members_.size() * group_);
  std::vector<float> acc(totals.size() * head_dim);
  for (size_t i = 0; i < totals.size(); ++i) {
    totals[i].acc = std::span(acc).subspan(i * head_dim, head_dim);
  }
  for (uint32_t u : whole_) MergeUnit(u, totals);
  elsewhere_.clear();
  for (const Partial& total : totals) {
    elsewhere_.push_back(total.LogLength());
  }
}

void AttendLane::Attend(uint32_t u) {
  View view(*this, u);
  const KvView* const rows = view.Whole(this);
  if (rows == nullptr) return;
  const Queries queries(*this, unit(u));
  ClearPartials(u);
  // Every token is wanted: an index has nothing to add.
  ExactScan().AttendAll(*rows, queries.block(), UnitPartials(u));
}

void AttendLane::Score(uint32_t u) {
  View view(*this, u);
  const KvView* const rows = view.Whole(this);
  if (rows == nullptr) return;
  const Queries queries(*this, units_[u]);
  view.index.Score(*rows, queries.block(), &coarse_[u]);
}

void AttendLane::Allocate(uint32_t query) {
  // In token order, which breaks ties: the units' order is not each member's.
  struct Place {
    uint32_t first_token, unit, row;
  };
  const uint32_t member = query / group_;
  std::vector<Place> places;
  for (uint32_t u : searched_) {
    for (uint32_t slot = 0; slot < units_[u].members.size(); ++slot) {
      if (units_[u].members[slot] != member) continue;
      places.push_back({units_[u].ranges[slot].lo, u, slot * group_ + query % group_});
    }
  }
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.first_token < b.first_token; });
  std::vector<RunScores> scores;
  for (const Place& place : places) scores.push_back({&coarse_[place.unit], place.row});
  std::vector<RunShare> shares(scores.size());
  const LaneMember& asked = members_[member];
  const uint32_t head = key_.kv_head * group_ + query % group_;
  const uint64_t lift_key =
      key_.samples ? LiftKey(asked.budget.seed, key_.layer, head, asked.position) : 0;
  const double mass = AllocateBudget(asked.budget, scores, shares, lift_key);
  for (size_t i = 0; i < shares.size(); ++i) {
    RunAllotment& allotment = allotments_[places[i].unit];
    allotment.threshold[places[i].row] = shares[i].threshold;
    allotment.ties[places[i].row] = shares[i].ties;
    if (!key_.samples) continue;
    allotment.floor[places[i].row] = shares[i].floor;
    allotment.lift_key[places[i].row] = lift_key;
  }
  lost_mass_[query] = static_cast<float>(1.0 - mass);
}

void AttendLane::Refine(uint32_t u) {
  View view(*this, u);
  const KvView* const rows = view.Whole(this);
  if (rows == nullptr) return;
  const Queries queries(*this, units_[u]);
  ClearPartials(u);
  view.index.Refine(*rows, queries.block(), coarse_[u], allotments_[u], UnitPartials(u));
  coarse_[u] = CoarseScores{};  // of no more use, and large
}

void AttendLane::Search(uint32_t f) {
  auto search = std::make_unique<FamilySearch>(*this, families_[f]);
  if (search->parts() > 1 || shares_caps_) {
    searches_[f] = std::move(search);
    return;
  }
  do {
    search->RunPart(0);
  } while (search->Next());
}

void AttendLane::SearchPart(uint32_t task) {
  for (const auto& search : searches_) {
    const uint32_t parts = search == nullptr ? 0 : search->parts();
    if (task < parts) return search->RunPart(task);
    task -= parts;
  }
}

std::span<const Partial> AttendLane::MergeUnits(std::vector<Partial>* totals,
                                                std::vector<float>* acc) {
  // Mostly, a short range is one unit with every member in its place.
  const size_t queries = members_.size() * group_;
  if (units_.size() == 1 && partials_.size() == queries) return partials_;  // and there is no rest
  const size_t head_dim = key_.shape->head_dim;
  acc->assign(queries * head_dim, 0.0f);
  totals->resize(queries);
  for (size_t i = 0; i < queries; ++i) {
    (*totals)[i].acc = std::span(*acc).subspan(i * head_dim, head_dim);
  }
  for (uint32_t u = 0; u < units_.size(); ++u) MergeUnit(u, *totals);
  // The rest has been read for these answers, but is no part of them.
  for (uint32_t u = static_cast<uint32_t>(units_.size()); u < indexes_.size(); ++u) {
    (*totals)[unit(u).members.front() * group_].bytes += UnitPartials(u).front().bytes;
  }
  return *totals;
}

// totals: one per query of all members.
void AttendLane::MergeUnit(uint32_t u, std::span<Partial> totals) {
  const std::span<Partial> partials = UnitPartials(u);
  for (size_t i = 0; i < partials.size(); ++i) {
    totals[unit(u).members[i / group_] * group_ + i % group_].Merge(partials[i]);
  }
}

// Of what a query did not read; where answers are merged elsewhere, by that merge.
float AttendLane::ErrorOf(const Partial& total, uint32_t query) const {
  if (!lost_mass_.empty()) return lost_mass_[query];
  if (total.doubt <= 0) return 0;
  std::vector<float> acc(total.acc.begin(), total.acc.end());
  Partial merged = total;
  merged.acc = acc;
  for (auto u = static_cast<uint32_t>(units_.size()); u < indexes_.size(); ++u) {
    const std::span<const Partial> partials =
        std::span(partials_).subspan(first_slot_[u], first_slot_[u + 1] - first_slot_[u]);
    for (size_t i = 0; i < partials.size(); ++i) {
      if (unit(u).members[i / group_] * group_ + i % group_ == query) merged.Merge(partials[i]);
    }
  }
  return merged.RelativeError();
}

void AttendLane::Finish() {
  const size_t head_dim = key_.shape->head_dim;
  std::vector<Partial> merged;
  std::vector<float> acc;
  const std::span<const Partial> totals = MergeUnits(&merged, &acc);
  for (size_t m = 0; m < members_.size(); ++m) {
    for (uint32_t g = 0; g < group_; ++g) {
      const Partial& total = totals[m * group_ + g];
      members_[m].lse[g] = total.Finish(std::span(members_[m].o + g * head_dim, head_dim));
      results_[m].tokens += total.tokens;
      results_[m].bytes += total.bytes;
      results_[m].error_estimate =
          std::max(results_[m].error_estimate, ErrorOf(total, m * group_ + g));
    }
  }
}

}  // namespace quarry
