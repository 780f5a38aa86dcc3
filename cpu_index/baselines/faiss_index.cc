// FAISS: flat, IVF-flat and IVF-PQ fast scan by inner product.
#include <cblas.h>
#include <faiss/IndexFlat.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/IndexIVFPQFastScan.h>
#include <faiss/utils/distances.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cpu_index/baselines/key_copy.h"
#include "cpu_index/baselines/kinds.h"
#include "cpu_index/baselines/library_calls.h"
#include "cpu_index/candidates.h"

namespace quarry {
namespace {

// What holds for the whole process; several threads may build at once.
void SetUpLibraries() {
  static const bool once = [] {
    openblas_set_num_threads(1);
    // Even one query is faster through BLAS: Debian's FAISS is compiled without AVX. 65,536 keys of
    // 128, best 100 of 1, 4 and 8 queries: 3.4, 16, 34 ms without, 1.3, 4.2, 5.0 ms with it.
    faiss::distance_compute_blas_threshold = 1;
    return true;
  }();
  static_cast<void>(once);
}

using Idx = faiss::Index::idx_t;
constexpr uint64_t kLineBytes = 64;

// Keeps OpenMP to the calling thread: a search runs on an executor that has its own threads.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int before_;
};

// The centroids; keeps in mind which clusters this thread's last search was given.
class Centroids final : public faiss::IndexFlatIP {
 public:
  using faiss::IndexFlatIP::IndexFlatIP;
  void search(Idx n, const float* x, Idx k, float* distances, Idx* labels,
              const faiss::SearchParameters* params = nullptr) const override {
    faiss::IndexFlatIP::search(n, x, k, distances, labels, params);
    given_.assign(labels, labels + n * k);
  }
  // The clusters of this thread's last search, each once.
  static std::vector<Idx> Given() {
    std::vector<Idx> lists = given_;
    std::sort(lists.begin(), lists.end());
    lists.erase(std::unique(lists.begin(), lists.end()), lists.end());
    std::erase_if(lists, [](Idx list) { return list < 0; });
    return lists;
  }

 private:
  static thread_local std::vector<Idx> given_;
};
thread_local std::vector<Idx> Centroids::given_;

class FaissIndex final : public BaselineIndex {
 public:
  FaissIndex(BaselineKind kind, TokenRange tokens) : kind_(kind), tokens_(tokens) {}

  std::string_view kind() const override { return BaselineName(kind_); }
  uint64_t memory_bytes() const override { return memory_bytes_; }
  void Build(const KeyCopy& copy, const BaselineOptions& options);
  void Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const override;

 private:
  void ApplySearch() override {
    if (ivf_ != nullptr) ivf_->nprobe = std::clamp<size_t>(search().nprobe, 1, ivf_->nlist);
  }
  void BuildIvf(const KeyCopy& copy, const BaselineOptions& options, uint32_t nlist);
  uint64_t BytesOfSearch(uint64_t results) const;
  uint64_t ListBytes(Idx list) const;

  const BaselineKind kind_;
  const TokenRange tokens_;
  std::vector<float> mean_;
  std::unique_ptr<Centroids> centroids_;  // outlives index_
  std::unique_ptr<faiss::Index> index_;
  faiss::IndexIVF* ivf_ = nullptr;  // index_, if it is one
  uint64_t memory_bytes_ = 0;
};

void FaissIndex::Build(const KeyCopy& copy, const BaselineOptions& options) {
  mean_ = copy.mean;
  if (kind_ == BaselineKind::kFaissFlat) {
    index_ = std::make_unique<faiss::IndexFlatIP>(copy.head_dim);
    index_->add(copy.tokens, copy.keys.data());
    memory_bytes_ = copy.keys.size() * sizeof(float);
    return;
  }
  const auto by_root = static_cast<uint32_t>(4 * std::sqrt(static_cast<double>(copy.tokens)));
  BuildIvf(copy, options, std::clamp(options.nlist > 0 ? options.nlist : by_root, 1u, copy.tokens));
}

void FaissIndex::BuildIvf(const KeyCopy& copy, const BaselineOptions& options, uint32_t nlist) {
  const uint32_t d = copy.head_dim;
  centroids_ = std::make_unique<Centroids>(d);
  if (kind_ == BaselineKind::kFaissIvfFlat) {
    auto index = std::make_unique<faiss::IndexIVFFlat>(centroids_.get(), d, nlist,
                                                       faiss::METRIC_INNER_PRODUCT);
    ivf_ = index.get();
    index_ = std::move(index);
  } else {
    const uint32_t pq_m = options.pq_m > 0 ? options.pq_m : d / 2;
    auto index = std::make_unique<faiss::IndexIVFPQFastScan>(centroids_.get(), d, nlist, pq_m, 4,
                                                             faiss::METRIC_INNER_PRODUCT);
    index->pq.cp.seed = static_cast<int>(options.seed);
    ivf_ = index.get();
    index_ = std::move(index);
  }
  ivf_->cp.seed = static_cast<int>(options.seed);
  ivf_->cp.min_points_per_centroid = 1;  // few keys are no mistake here
  ivf_->train(copy.tokens, copy.keys.data());
  ivf_->add(copy.tokens, copy.keys.data());
  memory_bytes_ = uint64_t{nlist} * d * sizeof(float) + uint64_t{copy.tokens} * sizeof(Idx);
  for (uint32_t list = 0; list < nlist; ++list) {
    const uint64_t ids = ivf_->invlists->list_size(list) * sizeof(Idx);
    memory_bytes_ += ListBytes(list) - (kind_ == BaselineKind::kFaissIvfFlat ? ids : 0);
  }
}

// What a search of the list reads: codes, and the ids that lie beside whole keys.
uint64_t FaissIndex::ListBytes(Idx list) const {
  const uint64_t size = ivf_->invlists->list_size(list);
  if (kind_ == BaselineKind::kFaissIvfFlat) return size * (ivf_->code_size + sizeof(Idx));
  constexpr uint64_t kPacked = 32;  // codes that are stored and scanned together
  return (size + kPacked - 1) / kPacked * kPacked * ivf_->code_size;
}

uint64_t FaissIndex::BytesOfSearch(uint64_t results) const {
  if (ivf_ == nullptr) return memory_bytes_;
  uint64_t bytes = ivf_->nlist * ivf_->d * sizeof(float), ids = 0;
  for (Idx list : Centroids::Given()) {
    bytes += ListBytes(list);
    ids += ivf_->invlists->list_size(list) * sizeof(Idx);
  }
  // The fast scan looks up the ids of what it returns, a line each unless that is all of them.
  return bytes + (kind_ == BaselineKind::kFaissIvfPq ? std::min(results * kLineBytes, ids) : 0);
}

void FaissIndex::Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const {
  std::vector<std::vector<Candidate>> found(queries.queries);
  const uint32_t k = TokensToAsk(tokens_, queries, search().candidates);
  uint64_t results = 0;
  if (k > 0) {
    std::vector<float> products(size_t{k} * queries.queries);
    std::vector<Idx> labels(products.size());
    MustNotThrow(kind(), [&] {
      const OneThread one_thread;
      index_->search(queries.queries, queries.q, k, products.data(), labels.data());
    });
    const std::vector<float> mean_scores = MeanScores(queries, mean_);
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] < 0) continue;
      ++results;
      found[i / k].push_back({tokens_.lo + static_cast<uint32_t>(labels[i]),
                              (products[i] + mean_scores[i / k]) * queries.scale});
    }
  }
  ListCandidates(tokens_, queries.ranges, found, out);
  if (k > 0) out->bytes = BytesOfSearch(results);
  if (kind_ == BaselineKind::kFaissIvfPq) RescoreCandidates(run, queries, out);
}

}  // namespace

absl::StatusOr<std::unique_ptr<BaselineIndex>> BuildFaiss(BaselineKind kind, const KvView& run,
                                                          const BaselineOptions& options) {
  if (kind == BaselineKind::kFaissIvfPq && options.pq_m > 0 && run.head_dim % options.pq_m != 0) {
    return absl::InvalidArgumentError(absl::StrCat("faiss-ivf-pq: pq_m ", options.pq_m,
                                                   " does not divide head_dim ", run.head_dim));
  }
  constexpr uint32_t kFewest = 16;  // values that a 4-bit code tells apart
  if (kind == BaselineKind::kFaissIvfPq && run.tokens().size() < kFewest) {
    return absl::InvalidArgumentError(absl::StrCat("faiss-ivf-pq: a run of ", run.tokens().size(),
                                                   " tokens, of which 4-bit codes need ", kFewest));
  }
  SetUpLibraries();
  auto index = std::make_unique<FaissIndex>(kind, run.tokens());
  const absl::Status status = StatusOfCall(BaselineName(kind), [&] {
    const OneThread one_thread;
    index->Build(KeyCopy(run), options);
    index->set_search({});
  });
  if (!status.ok()) return status;
  return index;
}

}  // namespace quarry
