#include "daemon/scan_plan.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "daemon/run_registry.h"

namespace quarry {
namespace {

// A stretch of one member's tokens that is scanned block by block.
struct Stretch {
  uint32_t member = 0;
  const BlockTable* table = nullptr;
  TokenRange tokens;
};

constexpr uint32_t kNoClass = ~0u;
// Tokens between the first and the last that is scanned are cut into about so many units, that more
// threads than there are KV heads have part in a short context: one thread takes 20 us for 256.
constexpr uint32_t kUnitsWanted = 8;
// What answers are merged with elsewhere is read if it is at most this part of their range.
constexpr uint32_t kRestShare = 8;

TokenRange Hull(TokenRange a, TokenRange b) {
  if (a.empty()) return b;
  return {std::min(a.lo, b.lo), std::max(a.hi, b.hi)};
}

void AddToUnit(uint32_t member, TokenRange range, ScanUnit* unit) {
  unit->tokens = Hull(unit->tokens, range);
  unit->members.push_back(member);
  unit->ranges.push_back(range);
}

// Cuts the stretches into units of blocks in which all members read the same memory.
class BlockPlanner {
 public:
  BlockPlanner(std::span<const Stretch> stretches, uint32_t task_tokens,
               std::vector<ScanUnit>* units)
      : stretches_(stretches), task_tokens_(task_tokens), units_(units) {}

  void Plan() {
    uint32_t lo = ~0u, hi = 0;
    for (const Stretch& s : stretches_) {
      lo = std::min(lo, s.tokens.lo);
      hi = std::max(hi, s.tokens.hi);
    }
    const uint32_t tokens = UnitTokens(hi - lo, task_tokens_);
    for (uint32_t cell = lo / tokens * tokens; cell < hi; cell += tokens) {
      PlanCell({cell, cell + tokens});
    }
  }

 private:
  void PlanCell(TokenRange cell) {
    active_.clear();
    for (const Stretch& s : stretches_) {
      if (!Intersect(s.tokens, cell).empty()) active_.push_back(&s);
    }
    if (active_.empty()) return;
    if (OneTable()) {
      const std::vector<uint32_t> one_class(active_.size(), 0);
      for (uint32_t lo = cell.lo; lo < cell.hi;) {
        const uint32_t hi = std::min(cell.hi, active_.front()->table->NextEdge(lo));
        Emit({lo, hi}, one_class);
        lo = hi;
      }
      return;
    }
    // Neighbouring blocks with the same sharing make one unit, if keys are turned alike.
    std::vector<uint32_t> classes, next;
    std::vector<int32_t> shifts, next_shifts;
    uint32_t start = cell.lo;
    for (uint32_t lo = cell.lo; lo < cell.hi; lo += kBlockTokens) {
      ClassesOfBlock({lo, lo + kBlockTokens}, &next, &next_shifts);
      if (lo > cell.lo && (next != classes || next_shifts != shifts)) {
        Emit({start, lo}, classes);
        start = lo;
      }
      classes = next;
      shifts = next_shifts;
    }
    Emit({start, cell.hi}, classes);
  }

  bool OneTable() const {
    return std::all_of(active_.begin(), active_.end(),
                       [&](const Stretch* s) { return s->table == active_.front()->table; });
  }

  // Numbers the members by the memory of their block and how far its keys are turned; kNoClass: the
  // block is not in its range.
  void ClassesOfBlock(TokenRange block, std::vector<uint32_t>* classes,
                      std::vector<int32_t>* shifts) {
    classes->assign(active_.size(), kNoClass);
    shifts->assign(active_.size(), 0);
    class_of_.clear();
    for (size_t i = 0; i < active_.size(); ++i) {
      if (Intersect(active_[i]->tokens, block).empty()) continue;
      const void* place = active_[i]->table->blocks[block.lo / kBlockTokens]->place();
      const Rotation* const turn = active_[i]->table->TurnAt(block.lo);
      if (turn != nullptr) (*shifts)[i] = turn->distance();
      (*classes)[i] =
          class_of_
              .try_emplace(std::pair(place, (*shifts)[i]), static_cast<uint32_t>(class_of_.size()))
              .first->second;
    }
  }

  // One unit per class. (A member of kNoClass everywhere in `tokens` has no range in it.)
  void Emit(TokenRange tokens, std::span<const uint32_t> classes) {
    const size_t first_unit = units_->size();
    for (size_t i = 0; i < active_.size(); ++i) {
      const TokenRange range = Intersect(active_[i]->tokens, tokens);
      if (range.empty()) continue;
      while (units_->size() <= first_unit + classes[i]) units_->emplace_back();
      AddToUnit(active_[i]->member, range, &(*units_)[first_unit + classes[i]]);
    }
    for (size_t u = first_unit; u < units_->size(); ++u) {
      ScanUnit& unit = (*units_)[u];
      const Stretch* reader = *std::find_if(active_.begin(), active_.end(), [&](const Stretch* s) {
        return s->member == unit.members.front() && !Intersect(s->tokens, unit.tokens).empty();
      });
      unit.first_block = unit.tokens.lo / kBlockTokens;
      unit.blocks = &reader->table->blocks[unit.first_block];
      unit.turn = reader->table->TurnAt(unit.tokens.lo);
    }
  }

  const std::span<const Stretch> stretches_;
  const uint32_t task_tokens_;
  std::vector<ScanUnit>* const units_;
  std::vector<const Stretch*> active_;
  absl::flat_hash_map<std::pair<const void*, int32_t>, uint32_t> class_of_;
};

// Units of whole runs; what no run covers is left in `tail`.
void PlanRuns(std::span<const ScanMember> members, std::vector<ScanUnit>* units,
              std::vector<Stretch>* tail) {
  absl::flat_hash_map<std::pair<const Run*, int32_t>, size_t>
      unit_of;  // by run and where it is used
  for (uint32_t m = 0; m < members.size(); ++m) {
    const ScanMember& member = members[m];
    uint32_t next = member.range.lo;
    for (const RunUse& use : member.table->runs) {
      const TokenRange range = Intersect(use.tokens, member.range);
      if (range.empty()) continue;
      if (next < range.lo) tail->push_back({m, member.table, {next, range.lo}});
      next = range.hi;
      const int32_t shift = DistanceOf(use.turn.get());
      auto [it, fresh] = unit_of.try_emplace(std::pair(use.run.get(), shift), units->size());
      if (fresh) {
        ScanUnit& unit = units->emplace_back();
        unit.run = use.run.get();
        unit.turn = use.turn.get();
        unit.run_tokens = TokensHere(*use.run, unit.turn);
        unit.first_block = unit.run_tokens.lo / kBlockTokens;
        unit.blocks = use.run->blocks().data();
      }
      AddToUnit(m, range, &(*units)[it->second]);
    }
    if (next < member.range.hi) tail->push_back({m, member.table, {next, member.range.hi}});
  }
}

}  // namespace

uint32_t UnitTokens(uint32_t tokens, uint32_t task_tokens) {
  const uint32_t blocks = (tokens - 1) / (kUnitsWanted * kBlockTokens) + 1;
  return std::min(task_tokens, blocks * kBlockTokens);
}

std::vector<ScanUnit> PlanScan(std::span<const ScanMember> members, ScanKind kind,
                               uint32_t task_tokens) {
  std::vector<ScanUnit> units;
  std::vector<Stretch> stretches;
  if (kind == ScanKind::kIndexed) {
    PlanRuns(members, &units, &stretches);
  } else {
    for (uint32_t m = 0; m < members.size(); ++m) {
      if (!members[m].range.empty()) stretches.push_back({m, members[m].table, members[m].range});
    }
  }
  if (!stretches.empty()) BlockPlanner(stretches, task_tokens, &units).Plan();
  std::stable_sort(units.begin(), units.end(),
                   [](const ScanUnit& a, const ScanUnit& b) { return a.tokens.lo < b.tokens.lo; });
  return units;
}

std::array<TokenRange, 2> RestBeside(TokenRange range, uint32_t rest_hi) {
  const TokenRange before{0, range.lo}, behind{range.hi, std::max(range.hi, rest_hi)};
  if (uint64_t{before.size()} + behind.size() > range.size() / kRestShare) return {};
  return {before, behind};
}

}  // namespace quarry
