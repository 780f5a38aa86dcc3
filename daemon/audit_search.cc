#include "daemon/audit_search.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>

#include "cpu_index/cluster_search.h"
#include "daemon/kv_segments.h"
#include "daemon/run_registry.h"

namespace quarry {
namespace {

// The runs of one model whose keys are turned alike.
class Family {
 public:
  Family(const AuditedQuery& query, const KvShape& shape, std::span<const float> other_length,
         const Rotation* turn)
      : query_(query),
        shape_(shape),
        turn_(turn),
        most_tokens_(query.lse.size(), query.budget.k > 0 ? query.budget.k : ~0u) {
    block_ = {.q = query.q.data(),
              .q_dtype = query.q_dtype,
              .queries = static_cast<uint32_t>(query.lse.size()),
              .head_dim = shape.head_dim,
              .scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
    limits_ = {
        .tolerance = query.budget.error, .most_tokens = most_tokens_, .other_length = other_length};
    if (turn == nullptr) return;
    turned_ = query.q;
    turn->TurnQueries(turned_.data(), block_.queries, block_.head_dim);
    block_.q = turned_.data();
    block_.q_dtype = DType::kFp32;
  }
  Family(const Family&) = delete;

  bool Takes(const AuditedRun& run) const {
    return runs_.front().index->model() == run.clusters->model() &&
           DistanceOf(turn_) == DistanceOf(run.use->turn.get());
  }
  void Add(const AuditedRun& run) {
    const TokenRange tokens = TokensHere(*run.use->run, turn_);
    segments_.emplace_back(shape_, query_.layer, query_.kv_head, tokens,
                           run.use->run->blocks().data(), tokens.lo / kBlockTokens);
    views_.push_back(segments_.back().view());
    ranges_.emplace_back(most_tokens_.size(), run.range);
    runs_.push_back({run.clusters, &views_.back(), ranges_.back()});
  }
  // A part is a run: answers do not depend on parts.
  void Begin() { search_.emplace(runs_, block_, limits_, static_cast<uint32_t>(runs_.size())); }
  ClusterSearch& search() { return *search_; }
  CappedQuery Capped(uint32_t query) { return {&*search_, query, &most_tokens_[query]}; }

  // After the last stage.
  void ListRead(std::vector<uint32_t>* read) const {
    std::vector<float> acc(query_.q.size());
    std::vector<Partial> answers(most_tokens_.size());
    for (size_t g = 0; g < answers.size(); ++g) {
      answers[g].acc = std::span(acc).subspan(g * shape_.head_dim, shape_.head_dim);
    }
    search_->Finish(answers, read);
  }

 private:
  const AuditedQuery& query_;
  const KvShape& shape_;
  const Rotation* const turn_;
  std::vector<uint32_t> most_tokens_;
  std::vector<float> turned_;
  QueryBlock block_;
  ClusterLimits limits_;
  std::deque<KvSegments> segments_;
  std::deque<KvView> views_;
  std::deque<std::vector<TokenRange>> ranges_;
  std::vector<ClusterRun> runs_;
  std::optional<ClusterSearch> search_;
};

void ShareCaps(std::span<Family* const> families, uint32_t queries, uint32_t most) {
  for (uint32_t i = 0; i < queries; ++i) {
    std::vector<CappedQuery> same;
    for (Family* family : families) {
      if (family->search().ScoredTokens()) same.push_back(family->Capped(i));
    }
    if (same.size() > 1) ShareCap(same, most);
  }
}

}  // namespace

bool SearchAgain(const AuditedQuery& query, const KvShape& shape, std::span<const AuditedRun> runs,
                 std::span<const float> other_length, const std::function<bool()>& stop,
                 std::vector<uint32_t>* read) {
  std::deque<Family> families;
  for (const AuditedRun& run : runs) {
    auto family = std::find_if(families.begin(), families.end(),
                               [&](const Family& one) { return one.Takes(run); });
    if (family == families.end()) {
      families.emplace_back(query, shape, other_length, run.use->turn.get());
      family = families.end() - 1;
    }
    family->Add(run);
  }
  std::vector<Family*> left;  // with stages to come
  for (Family& family : families) {
    family.Begin();
    left.push_back(&family);
  }
  while (!left.empty()) {
    for (Family* family : left) {
      for (uint32_t part = 0; part < family->search().parts(); ++part) {
        if (stop()) return false;
        family->search().RunPart(part);
      }
    }
    if (query.budget.k > 0) {
      ShareCaps(left, static_cast<uint32_t>(query.lse.size()), query.budget.k);
    }
    std::erase_if(left, [](Family* family) { return !family->search().Next(); });
  }
  for (const Family& family : families) family.ListRead(read);
  return true;
}

}  // namespace quarry
