// hnswlib's graph, by inner product.
#include <atomic>
#include <fstream>
#include <list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <hnswlib/hnswlib.h>
#include <hnswlib/hnswalg.h>

#include "absl/strings/str_cat.h"
#include "cpu_index/baselines/inner_product.h"
#include "cpu_index/baselines/key_copy.h"
#include "cpu_index/baselines/kinds.h"
#include "cpu_index/baselines/library_calls.h"
#include "cpu_index/candidates.h"
#include "cpu_index/simd.h"

namespace quarry {
namespace {

baselines::InnerProduct ChooseInnerProduct() {
  const absl::StatusOr<SimdLevel> level = ChooseSimdLevel();
  if (!level.ok() || *level == SimdLevel::kScalar) return baselines::InnerProductScalar;
  return *level == SimdLevel::kAvx2 ? baselines::InnerProductAvx2 : baselines::InnerProductAvx512;
}

// The keys that this thread's search compared, in the order they were met. Recording them takes
// some 5% of a search, with memory that is kept from one to the next.
thread_local std::vector<const void*> met_keys;
thread_local bool recording = false;

// The distance is minus the product: one minus it, as in hnswlib's own, would round more.
class ProductSpace final : public hnswlib::SpaceInterface<float> {
 public:
  explicit ProductSpace(size_t head_dim) : parameters_{head_dim, ChooseInnerProduct()} {}
  size_t get_data_size() override { return parameters_.head_dim * sizeof(float); }
  hnswlib::DISTFUNC<float> get_dist_func() override { return Distance; }
  void* get_dist_func_param() override { return &parameters_; }

 private:
  struct Parameters {
    size_t head_dim;
    baselines::InnerProduct product;
  };
  static float Distance(const void* a, const void* b, const void* parameters) {
    const auto& p = *static_cast<const Parameters*>(parameters);
    if (recording) met_keys.push_back(b);
    return -p.product(static_cast<const float*>(a), static_cast<const float*>(b), p.head_dim);
  }
  Parameters parameters_;
};

class HnswIndex final : public BaselineIndex {
 public:
  HnswIndex(TokenRange tokens, uint32_t head_dim) : tokens_(tokens), space_(head_dim) {}

  std::string_view kind() const override { return BaselineName(BaselineKind::kHnsw); }
  uint64_t memory_bytes() const override;
  void Build(const KeyCopy& copy, const BaselineOptions& options);
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override;

 private:
  void ApplySearch() override { graph_->setEf(search().ef_search); }
  uint64_t BytesOfSearch(long hops) const;

  const TokenRange tokens_;
  std::vector<float> mean_;
  mutable ProductSpace space_;  // the graph keeps a pointer into it
  std::unique_ptr<hnswlib::HierarchicalNSW<float>> graph_;
};

// On one thread: with several, the order in which keys are added would show in the graph.
void HnswIndex::Build(const KeyCopy& copy, const BaselineOptions& options) {
  mean_ = copy.mean;
  graph_ = std::make_unique<hnswlib::HierarchicalNSW<float>>(
      &space_, copy.tokens, options.hnsw_m, options.ef_construction, options.seed);
  for (uint32_t t = 0; t < copy.tokens; ++t) {
    graph_->addPoint(copy.keys.data() + size_t{t} * copy.head_dim, t);
  }
}

uint64_t HnswIndex::memory_bytes() const {
  uint64_t bytes = tokens_.size() * graph_->size_data_per_element_;
  for (uint32_t t = 0; t < tokens_.size(); ++t) {
    bytes += static_cast<uint64_t>(graph_->element_levels_[t]) * graph_->size_links_per_element_;
  }
  return bytes;
}

constexpr uint64_t kLineBytes = 64;

// Bytes of the lines that [at, at + bytes) lies in.
uint64_t LinesOf(uint64_t at, uint64_t bytes) {
  return ((at + bytes - 1) / kLineBytes - at / kLineBytes + 1) * kLineBytes;
}

// Keys that several queries met count once; links count as often as they were followed, together
// with those that another thread followed meanwhile, for hnswlib counts them in one place.
uint64_t HnswIndex::BytesOfSearch(long hops) const {
  std::vector<uint64_t> seen(tokens_.size() / 64 + 1);
  uint64_t bytes = 0;
  // Keys lie in the middle of what the library holds for a token, so rounding does not matter.
  const double tokens_per_byte = 1.0 / static_cast<double>(graph_->size_data_per_element_);
  for (const void* key : met_keys) {
    // As if the library's memory began with a line.
    const auto offset =
        static_cast<uint64_t>(static_cast<const char*>(key) - graph_->data_level0_memory_);
    const auto id = static_cast<size_t>(static_cast<double>(offset) * tokens_per_byte);
    const uint64_t bit = uint64_t{1} << id % 64;
    if ((seen[id / 64] & bit) == 0) bytes += LinesOf(offset, space_.get_data_size());
    seen[id / 64] |= bit;
  }
  const uint64_t lines = (graph_->size_links_level0_ + kLineBytes - 1) / kLineBytes;
  return bytes + static_cast<uint64_t>(hops) * lines * kLineBytes;
}

void HnswIndex::Score(const KvView& /*run*/, const QueryBlock& queries, CoarseScores* out) const {
  std::vector<std::vector<Candidate>> found(queries.queries);
  const uint32_t k = TokensToAsk(tokens_, queries, search().candidates);
  const long hops = graph_->metric_hops;
  if (k > 0) {
    const std::vector<float> mean_scores = MeanScores(queries, mean_);
    met_keys.clear();
    recording = true;
    MustNotThrow(kind(), [&] {
      for (uint32_t i = 0; i < queries.queries; ++i) {
        auto best = graph_->searchKnn(queries.q + size_t{i} * queries.head_dim, k);
        for (; !best.empty(); best.pop()) {
          found[i].push_back({tokens_.lo + static_cast<uint32_t>(best.top().second),
                              (mean_scores[i] - best.top().first) * queries.scale});
        }
      }
    });
    recording = false;
  }
  ListCandidates(tokens_, queries.ranges, found, out);
  if (k > 0) out->bytes = BytesOfSearch(graph_->metric_hops - hops);
}

}  // namespace

absl::StatusOr<std::unique_ptr<BaselineIndex>> BuildHnsw(const KvView& run,
                                                         const BaselineOptions& options) {
  if (options.hnsw_m < 2) {
    return absl::InvalidArgumentError(absl::StrCat("hnsw: hnsw_m ", options.hnsw_m, " is below 2"));
  }
  auto index = std::make_unique<HnswIndex>(run.tokens(), run.head_dim);
  const absl::Status status = StatusOfCall("hnsw", [&] {
    index->Build(KeyCopy(run), options);
    index->set_search({});
  });
  if (!status.ok()) return status;
  return index;
}

}  // namespace quarry
