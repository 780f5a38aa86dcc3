#include "daemon/run_indexer.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "daemon/kv_segments.h"

namespace quarry {
namespace {

constexpr int kNice = 10;  // yields to decode when cores are short

}  // namespace

// One run's heads. Ends what RunIndexes::Begin began.
struct RunIndexer::Job {
  Job(const std::shared_ptr<const Run>& of, const KvShape& of_shape,
      std::shared_ptr<const QuerySamples> queries)
      : run(of), indexes(of->indexes()), shape(of_shape), samples(std::move(queries)) {}
  ~Job() { indexes->End(built == heads()); }
  uint32_t heads() const { return shape.layers * shape.kv_heads; }

  const std::weak_ptr<const Run> run;
  const std::shared_ptr<RunIndexes> indexes;
  const KvShape shape;
  const std::shared_ptr<const QuerySamples> samples;
  uint32_t next = 0;               // under the indexer's mutex
  std::atomic<uint32_t> built{0};  // or known to have none
  std::atomic<bool> warned{false};
};

RunIndexer::RunIndexer(const IndexOptions& options, RunRegistry* runs)
    : options_(options), runs_(runs) {
  if (!enabled()) return;
  for (uint32_t i = 0; i < options.threads; ++i) {
    threads_.emplace_back([this] { Loop(); });
    pthread_setname_np(threads_.back().native_handle(), "quarry-index");
  }
}

RunIndexer::~RunIndexer() {
  std::deque<std::shared_ptr<Job>> left;  // ends outside the lock
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    left.swap(queue_);
  }
  for (std::thread& thread : threads_) thread.join();
}

void RunIndexer::Consider(const std::shared_ptr<const Run>& run, const KvShape& shape,
                          const std::shared_ptr<const QuerySamples>& samples, RunIndexes::Why why) {
  if (!enabled()) return;
  const RunIndexes::Due due = run->indexes()->Begin(samples->LeastKept(), why);
  if (due == RunIndexes::Due::kNo) return;
  if (due == RunIndexes::Due::kAgain) relearned_.fetch_add(1, std::memory_order_relaxed);
  auto job = std::make_shared<Job>(run, shape, samples);
  absl::MutexLock lock(&mutex_);
  if (!stopping_) queue_.push_back(std::move(job));
}

std::shared_ptr<RunIndexer::Job> RunIndexer::NextHead(uint32_t* head) {
  absl::MutexLock lock(&mutex_);
  const auto due = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return stopping_ || !queue_.empty();
  };
  mutex_.Await(absl::Condition(&due));
  if (stopping_) return nullptr;
  std::shared_ptr<Job> job = queue_.front();
  *head = job->next++;
  if (job->next == job->heads()) queue_.pop_front();
  return job;
}

void RunIndexer::Loop() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
  uint32_t head = 0;
  while (const std::shared_ptr<Job> job = NextHead(&head)) BuildHead(*job, head);
}

void RunIndexer::BuildHead(Job& job, uint32_t head) {
  const std::shared_ptr<const Run> run = job.run.lock();
  if (run == nullptr) return;  // no context wants it any more
  const auto start = std::chrono::steady_clock::now();
  const uint32_t layer = head / job.shape.kv_heads, kv_head = head % job.shape.kv_heads;
  const KvSegments segments(job.shape, layer, kv_head, run->tokens(), run->blocks().data(),
                            run->tokens().lo / kBlockTokens);
  absl::StatusOr<MadeIndex> made =
      MakeIndex(options_.choice, segments.view(), job.samples->Scaled(layer, kv_head));
  absl::Status status = made.status();
  if (status.ok()) status = MakeRoom(made->bytes);
  if (!status.ok()) {
    failed_.fetch_add(1, std::memory_order_relaxed);
    // The other heads of the run will say the same.
    if (!job.warned.exchange(true)) spdlog::warn("run not indexed tokens=[{}, {}) layer={} kv_head={} error=\"{}\"",
                 run->tokens().lo, run->tokens().hi, layer, kv_head,
                 std::string(status.message()));
  } else if (made->index != nullptr) {
    job.indexes->Set(layer, kv_head, Account(*std::move(made)));
    built_.fetch_add(1, std::memory_order_relaxed);
  }
  build_micros_.fetch_add(static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                              std::chrono::steady_clock::now() - start)
                                                    .count()),
                          std::memory_order_relaxed);
  job.built.fetch_add(1);
}

// Several threads may pass the bound by one index each.
absl::Status RunIndexer::MakeRoom(uint64_t bytes) {
  while (bytes_->load() + bytes > options_.max_bytes) {
    if (runs_->DropIdle()) continue;
    return absl::ResourceExhaustedError(
        absl::StrCat("indexes of ", bytes_->load(), " bytes and this one of ", bytes,
                     " pass index.max_bytes ", options_.max_bytes));
  }
  return absl::OkStatus();
}

std::shared_ptr<const KeyIndex> RunIndexer::Account(MadeIndex made) {
  bytes_->fetch_add(made.bytes);
  return {made.index.release(), [total = bytes_, bytes = made.bytes](const KeyIndex* index) {
            delete index;
            total->fetch_sub(bytes);
          }};
}

IndexStats RunIndexer::stats() const {
  IndexStats stats;
  {
    absl::MutexLock lock(&mutex_);
    stats.queued_runs = queue_.size();
  }
  stats.built = built_.load(std::memory_order_relaxed);
  stats.relearned = relearned_.load(std::memory_order_relaxed);
  stats.failed = failed_.load(std::memory_order_relaxed);
  stats.build_micros = build_micros_.load(std::memory_order_relaxed);
  stats.bytes = bytes_->load(std::memory_order_relaxed);
  return stats;
}

}  // namespace quarry
