#include "daemon/run_indexer.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <list>
#include <string>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/time/clock.h"
#include "daemon/kv_segments.h"
#include "daemon/low_priority.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// How often those look for room that wait for it: nobody tells when a run goes out of use.
constexpr absl::Duration kRoomPoll = absl::Milliseconds(200);

}  // namespace

// All heads of one layer of some runs. Ends what RunIndexes::Begin began.
struct RunIndexer::Job {
  Job(uint32_t of_layer, const KvShape& of_shape, std::shared_ptr<const QuerySamples> of_samples,
      RunIndexer* by)
      : layer(of_layer), shape(of_shape), samples(std::move(of_samples)), indexer(by) {}
  ~Job() {
    for (const auto& part : parts) {
      part.indexes->End(layer, learning, part.built == heads(), &indexer->counts_);
    }
    if (!full) return;
    Waiting waiting{layer, shape, samples, bytes, {others.begin(), others.end()}};
    for (const auto& part : parts) waiting.runs.push_back(part.indexes);
    indexer->Wait(std::move(waiting));
  }
  uint32_t heads() const { return shape.kv_heads; }

  struct Part {
    explicit Part(const Run& of) : first_token(of.tokens().lo), indexes(of.indexes()) {}
    const uint32_t first_token;
    const std::shared_ptr<RunIndexes> indexes;
    std::atomic<uint32_t> built{0};  // heads, or known to have none
  };

  const uint32_t layer;
  const KvShape shape;
  const std::shared_ptr<const QuerySamples> samples;
  RunIndexer* const indexer;
  std::list<Part> parts;  // in token order
  // Of a run whose indexes have learned what these are to be made with; null: they learn themselves.
  std::shared_ptr<RunIndexes> neighbour;
  // Of the context's other runs, that may have learned by the time that this job begins.
  std::vector<std::shared_ptr<RunIndexes>> others;
  bool again = false;  // unless others know as much
  RunIndexes::Learning learning;
  uint32_t next = 0;  // under the indexer's mutex
  std::atomic<bool> warned{false};
  std::atomic<bool> full{false};  // a head found no room
  std::atomic<uint64_t> bytes{0};  // of such a head's index; or less, where that is not known
};

struct RunIndexer::Building {
  std::vector<std::shared_ptr<const Run>> runs;
  std::vector<Job::Part*> parts;  // of these runs
  // Of the head, where other runs have had theirs for longer; null: none has.
  std::shared_ptr<const KeyIndex> like;
  uint64_t bytes = 0;  // what there has to be room for
};

RunIndexer::RunIndexer(const IndexOptions& options, RunRegistry* runs)
    : options_(options),
      runs_(runs),
      memory_(std::make_shared<IndexMemory>(options.max_bytes)),
      sample_memory_(std::make_shared<SampleMemory>(options.max_sample_bytes)) {
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

std::shared_ptr<QuerySamples> RunIndexer::MakeSamples(const KvShape& shape) const {
  return std::make_shared<QuerySamples>(shape, options_.query_samples, sample_memory_);
}

void RunIndexer::LetGo() {
  absl::MutexLock lock(&mutex_);
  const auto gone = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return releasing_ == 0 && !AnyHeldAlone();
  };
  ++letting_go_;
  mutex_.Await(absl::Condition(&gone));
  --letting_go_;
}

bool RunIndexer::AnyHeldAlone() const {
  std::vector<const Run*> held;
  for (const Building* building : building_) {
    for (const auto& run : building->runs) held.push_back(run.get());
  }
  for (const Building* building : building_) {
    for (const auto& run : building->runs) {
      if (run.use_count() == std::count(held.begin(), held.end(), run.get())) return true;
    }
  }
  return false;
}

bool RunIndexer::HasRoom(uint64_t bytes) const {
  const uint64_t free = memory_->free();
  return bytes <= free || bytes - free <= runs_->idle_bytes();
}

uint64_t RunIndexer::GuessBytes(const KvShape& shape, const Run& run) const {
  if (std::isinf(bytes_per_element_)) return 0;
  return static_cast<uint64_t>(bytes_per_element_ * run.tokens().size() * shape.head_dim);
}

// Forks share samples, and jobs end in any order: what waits already goes on waiting.
void RunIndexer::Wait(Waiting waiting) {
  absl::MutexLock lock(&mutex_);
  if (stopping_) return;
  const auto [there, first] =
      waiting_.try_emplace(std::pair(waiting.samples.get(), waiting.layer), waiting);
  if (first) return;
  there->second.bytes = std::min(there->second.bytes, waiting.bytes);
  std::vector<std::weak_ptr<RunIndexes>>& runs = there->second.runs;
  runs.insert(runs.end(), waiting.runs.begin(), waiting.runs.end());
  const std::owner_less<> before;
  std::sort(runs.begin(), runs.end(), before);
  const auto same = [&](const auto& a, const auto& b) { return !before(a, b) && !before(b, a); };
  runs.erase(std::unique(runs.begin(), runs.end(), same), runs.end());
}

// Lets go of the mutex meanwhile.
void RunIndexer::ConsiderWaiting() {
  absl::erase_if(waiting_, [](const auto& one) {
    return std::all_of(one.second.runs.begin(), one.second.runs.end(), [](const auto& indexes) {
      const std::shared_ptr<RunIndexes> there = indexes.lock();
      return there == nullptr || !there->used();
    });
  });
  if (letting_go_ > 0) return;
  ++releasing_;
  mutex_.Unlock();
  const uint64_t room = memory_->free() + runs_->idle_bytes();
  std::vector<Waiting> due;
  {
    absl::MutexLock lock(&mutex_);
    absl::erase_if(waiting_, [&](auto& one) {
      if (one.second.bytes > room) return false;
      due.push_back(std::move(one.second));
      return true;
    });
  }
  for (const Waiting& waiting : due) {
    std::vector<RunUse> uses;
    for (const std::weak_ptr<RunIndexes>& indexes : waiting.runs) {
      const std::shared_ptr<RunIndexes> there = indexes.lock();
      std::shared_ptr<const Run> run = there == nullptr ? nullptr : there->run();
      if (run != nullptr) uses.push_back({run, run->tokens()});
    }
    std::sort(uses.begin(), uses.end(),
              [](const RunUse& a, const RunUse& b) { return a.tokens.lo < b.tokens.lo; });
    Consider(waiting.layer, uses, waiting.shape, waiting.samples, waiting.bytes);
  }
  mutex_.Lock();
  --releasing_;
}

void RunIndexer::Consider(uint32_t layer, std::span<const RunUse> runs, const KvShape& shape,
                          const std::shared_ptr<const QuerySamples>& samples) {
  if (!enabled() || runs.empty()) return;
  uint64_t bytes = 0;
  {
    absl::MutexLock lock(&mutex_);
    const auto waiting = waiting_.find(std::pair(samples.get(), layer));
    bytes =
        waiting != waiting_.end() ? waiting->second.bytes : GuessBytes(shape, *runs.front().run);
  }
  Consider(layer, runs, shape, samples, bytes);
}

void RunIndexer::Consider(uint32_t layer, std::span<const RunUse> runs, const KvShape& shape,
                          const std::shared_ptr<const QuerySamples>& samples, uint64_t bytes) {
  RunIndexes::Learning learning;
  learning.renewal = samples->renewal();  // first: what is looked at later may only be newer
  learning.samples = samples->LeastKept(layer);
  for (const RunUse& use : runs) learning.tokens += use.run->tokens().size();
  if (!HasRoom(bytes)) {
    Waiting waiting{layer, shape, samples, bytes, {}};
    bool due = false;
    for (const RunUse& use : runs) {
      due |= use.run->indexes()->IsDue(layer, learning);
      waiting.runs.push_back(use.run->indexes());
    }
    if (due) Wait(std::move(waiting));
    return;
  }
  auto job = std::make_shared<Job>(layer, shape, samples, this);
  job->bytes = bytes;
  job->learning = learning;
  for (const RunUse& use : runs) {
    const std::shared_ptr<RunIndexes>& indexes = use.run->indexes();
    const RunIndexes::Due due = indexes->Begin(layer, job->learning, &counts_);
    if (due == RunIndexes::Due::kNo) {
      job->others.push_back(indexes);
      continue;
    }
    job->again |= due == RunIndexes::Due::kAgain;
    job->parts.emplace_back(*use.run);
  }
  if (job->parts.empty()) return;
  absl::MutexLock lock(&mutex_);
  if (!stopping_) queue_.push_back(std::move(job));
}

std::shared_ptr<RunIndexer::Job> RunIndexer::NextHead(uint32_t* head) {
  absl::MutexLock lock(&mutex_);
  const auto due = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return stopping_ || (!queue_.empty() && letting_go_ == 0);
  };
  const auto any = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return due() || !waiting_.empty(); };
  for (;;) {
    mutex_.Await(absl::Condition(&any));
    if (!stopping_ && !waiting_.empty() && absl::Now() >= look_at_) {
      look_at_ = absl::Now() + kRoomPoll;
      ConsiderWaiting();
    } else if (due()) {
      break;
    } else {
      mutex_.AwaitWithDeadline(absl::Condition(&due), look_at_);
    }
  }
  if (stopping_) return nullptr;
  std::shared_ptr<Job> job = queue_.front();
  if (job->next == 0) Prepare(job.get());
  *head = job->next++;
  if (job->next == job->heads()) queue_.pop_front();
  return job;
}

// Runs that follow one another out of a prefill become due one by one, faster than they are indexed.
void RunIndexer::Prepare(Job* job) {
  if (!job->again) TakeLater(job);
  for (const std::shared_ptr<RunIndexes>& other : job->others) {
    if (other->empty(job->layer)) continue;
    const std::optional<RunIndexes::Learning> learned = other->learned(job->layer);
    // Where runs are learned again, another may have been before, by a fork that shares it.
    if (job->again && (!learned.has_value() || learned->OutdatedBy(job->learning))) continue;
    job->neighbour = other;
    job->learning = learned.value_or(job->learning);
  }
  for (const Job::Part& part : job->parts) {
    const std::optional<RunIndexes::Learning> before = part.indexes->partly_learned(job->layer);
    if (before.has_value())
      job->learning.Limit(*before);  // its heads stay, and others are like them
  }
}

void RunIndexer::TakeLater(Job* job) {
  for (auto later = queue_.begin() + 1; later != queue_.end();) {
    Job& other = **later;
    if (other.samples != job->samples || other.layer != job->layer || other.again) {
      ++later;
      continue;
    }
    job->parts.splice(job->parts.end(), other.parts);
    job->learning.tokens = std::max(job->learning.tokens, other.learning.tokens);
    job->learning.samples = std::max(job->learning.samples, other.learning.samples);
    later = queue_.erase(later);
  }
  job->parts.sort(
      [](const Job::Part& a, const Job::Part& b) { return a.first_token < b.first_token; });
}

void RunIndexer::Loop() {
  RunBehindDecoding();
  uint32_t head = 0;
  while (const std::shared_ptr<Job> job = NextHead(&head)) BuildHead(*job, head);
}

absl::StatusOr<std::vector<MadeIndex>> RunIndexer::MakeHead(const Job& job, uint32_t kv_head,
                                                            const KeyIndex* like,
                                                            std::span<const KvView> views) const {
  const std::vector<float> queries = job.samples->Scaled(job.layer, kv_head);
  IndexChoice choice = options_.choice;
  choice.group = job.shape.group();
  if (like == nullptr) return MakeIndexes(choice, views, queries);
  std::vector<MadeIndex> made;
  for (const KvView& view : views) {
    QUARRY_ASSIGN_OR_RETURN(MadeIndex one,
                            MakeIndexLike(*like, choice, view, queries));
    made.push_back(std::move(one));
  }
  return made;
}

void RunIndexer::Hold(Job& job, uint32_t kv_head, Building* building) {
  absl::MutexLock lock(&mutex_);
  for (Job::Part& part : job.parts) {
    // Where there was no room for the layer's other heads.
    if (std::shared_ptr<const KeyIndex> has = part.indexes->Get(job.layer, kv_head);
        !job.again && has != nullptr) {
      if (building->like == nullptr) building->like = std::move(has);
      part.built.fetch_add(1);
      continue;
    }
    std::shared_ptr<const Run> run = part.indexes->run();
    if (run == nullptr) continue;
    building->runs.push_back(std::move(run));
    building->parts.push_back(&part);
  }
  if (job.neighbour != nullptr) {
    if (auto index = job.neighbour->Get(job.layer, kv_head)) building->like = std::move(index);
  }
  if (!building->runs.empty()) {
    building->bytes = std::max(job.bytes.load(), GuessBytes(job.shape, *building->runs.front()));
  }
  building_.push_back(building);
}

void RunIndexer::Release(Building* building) {
  {
    absl::MutexLock lock(&mutex_);
    std::erase(building_, building);
    ++releasing_;
  }
  building->runs.clear();  // which may free blocks
  absl::MutexLock lock(&mutex_);
  --releasing_;
}

void RunIndexer::BuildHead(Job& job, uint32_t kv_head) {
  Building building;
  Hold(job, kv_head, &building);
  if (building.runs.empty()) {
    // Nobody wants them any more, or they are indexed.
  } else if (job.full.load() || !HasRoom(building.bytes)) {
    if (!job.full.exchange(true)) job.bytes.store(building.bytes);
    failed_.fetch_add(1, std::memory_order_relaxed);
  } else {
    BuildHeld(job, kv_head, building);
  }
  Release(&building);
}

void RunIndexer::NoteBytes(const KvShape& shape, const Run& run, uint64_t bytes) {
  const uint64_t elements = uint64_t{run.tokens().size()} * shape.head_dim;
  absl::MutexLock lock(&mutex_);
  bytes_per_element_ =
      std::min(bytes_per_element_, static_cast<double>(bytes) / static_cast<double>(elements));
}

void RunIndexer::BuildHeld(Job& job, uint32_t kv_head, const Building& building) {
  const std::vector<std::shared_ptr<const Run>>& runs = building.runs;
  std::deque<KvSegments> segments;
  std::vector<KvView> views;
  for (const auto& run : runs) {
    segments.emplace_back(job.shape, job.layer, kv_head, run->tokens(), run->blocks().data(),
                          run->tokens().lo / kBlockTokens);
    views.push_back(segments.back().view());
  }
  const OfferingProcessor offering;
  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<std::vector<MadeIndex>> made = MakeHead(job, kv_head, building.like.get(), views);
  absl::Status status = made.status();
  for (size_t r = 0; status.ok() && r < runs.size(); ++r) {
    MadeIndex& one = (*made)[r];
    if (one.index == nullptr) continue;
    NoteBytes(job.shape, *runs[r], one.bytes);
    absl::StatusOr<std::shared_ptr<const KeyIndex>> kept = Keep(&one);
    if (!kept.ok()) {
      status = kept.status();
      job.full.store(true);
      job.bytes.store(memory_->BytesOf(one));
      break;
    }
    building.parts[r]->indexes->Set(job.layer, kv_head, *std::move(kept), one.bytes);
    built_.fetch_add(1, std::memory_order_relaxed);
  }
  if (!status.ok()) {
    failed_.fetch_add(1, std::memory_order_relaxed);
    // The other heads of the layer will say the same.
    if (!job.warned.exchange(true)) {
      spdlog::warn("runs not indexed tokens=[{}, {}) layer={} kv_head={} error=\"{}\"",
                   runs.front()->tokens().lo, runs.back()->tokens().hi, job.layer, kv_head,
                   std::string(status.message()));
    }
  }
  build_micros_.fetch_add(static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                              std::chrono::steady_clock::now() - start)
                                                    .count()),
                          std::memory_order_relaxed);
  // Of a layer for which there was no room, nothing was learned.
  if (absl::IsResourceExhausted(status)) return;
  for (Job::Part* part : building.parts) part->built.fetch_add(1);
}

absl::StatusOr<std::shared_ptr<const KeyIndex>> RunIndexer::Keep(MadeIndex* made) {
  for (;;) {
    absl::StatusOr<std::shared_ptr<const KeyIndex>> kept = memory_->Keep(made);
    if (kept.ok()) return kept;
    const uint64_t bytes = memory_->BytesOf(*made), free = memory_->free();
    if (bytes > free && !runs_->DropIdle(bytes - free)) return kept;
  }
}

IndexStats RunIndexer::stats() const {
  IndexStats stats;
  stats.queued_runs = counts_.busy.load(std::memory_order_acquire);
  stats.indexed_runs = runs_->indexed();
  stats.built = built_.load(std::memory_order_relaxed);
  stats.relearned = counts_.relearned.load(std::memory_order_relaxed);
  stats.failed = failed_.load(std::memory_order_relaxed);
  stats.build_micros = build_micros_.load(std::memory_order_relaxed);
  stats.bytes = memory_->used();
  stats.sample_bytes = sample_memory_->used();
  return stats;
}

}  // namespace quarry
