#include "daemon/run_indexer.h"

#include <pthread.h>

#include <algorithm>
#include <deque>
#include <list>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/time/time.h"
#include "cpu_index/any_index.h"
#include "daemon/kv_segments.h"
#include "daemon/low_priority.h"
#include "daemon/steady_clock.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// How often those look for room that wait for it: nobody tells when a run goes out of use.
constexpr uint64_t kRoomPollNs = 200'000'000;

// Of a job, in place of a KV head.
constexpr uint32_t kFromDisk = ~0u;

}  // namespace

// One run of a job.
struct RunIndexer::Part {
  explicit Part(const Run& of) : first_token(of.tokens().lo), indexes(of.indexes()) {}
  const uint32_t first_token;
  const std::shared_ptr<RunIndexes> indexes;
  std::atomic<uint32_t> built{0};  // heads, or known to have none
};

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
    Waiting waiting{layer, shape, samples, {others.begin(), others.end()}};
    waiting.tried_room = indexer->UnreservedRoom();
    for (const auto& part : parts) waiting.runs.push_back(part.indexes);
    indexer->Wait(std::move(waiting));
  }
  uint32_t heads() const { return shape.kv_heads; }

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
  bool waited = false;  // for room, before
  RunIndexes::Learning learning;
  uint32_t next = 0;     // under the indexer's mutex, as the next two
  bool on_disk = false;  // some of it may be, and is to be looked for before any head is built
  bool loading = false;  // by a thread, which has the parts for itself
  std::atomic<bool> warned{false};
  std::atomic<bool> full{false};  // a head found no room
};

struct RunIndexer::Building {
  std::vector<std::shared_ptr<const Run>> runs;
  std::vector<Part*> parts;  // of these runs
  // Of the head, where other runs have had theirs for longer; null: none has.
  std::shared_ptr<const KeyIndex> like;
  RunIndexes::Learning learning;
  // What the indexes of the first runs are expected to take, as many as there is room for; those
  // that were made before `made` take it already. Under the indexer's mutex.
  std::vector<uint64_t> bytes;
  size_t made = 0;
};

RunIndexer::RunIndexer(const IndexOptions& options, RunRegistry* runs, IndexArchive* archive)
    : options_(options),
      runs_(runs),
      archive_(archive),
      room_(options.max_bytes, runs),
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
  const Hurry hurry;
  for (std::thread& thread : threads_) thread.join();
}

std::shared_ptr<QuerySamples> RunIndexer::MakeSamples(const KvShape& shape) const {
  return std::make_shared<QuerySamples>(shape, options_.query_samples, sample_memory_);
}

void RunIndexer::LetGo(absl::Duration longest) {
  const Hurry hurry;
  absl::MutexLock lock(&mutex_);
  const auto gone = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return releasing_ == 0 && !AnyHeldAlone();
  };
  ++letting_go_;
  mutex_.AwaitWithTimeout(absl::Condition(&gone), longest);
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

uint64_t RunIndexer::ReservedBytes() const {
  uint64_t reserved = 0;
  for (const Building* building : building_) {
    const auto& bytes = building->bytes;
    reserved = std::accumulate(bytes.begin() + static_cast<ptrdiff_t>(building->made), bytes.end(),
                               reserved);
  }
  return reserved;
}

uint64_t RunIndexer::UnreservedRoom() const {
  const uint64_t room = room_.All();
  absl::MutexLock lock(&mutex_);
  return room - std::min(room, ReservedBytes());
}

// Forks share samples, and jobs end in any order: what waits already goes on waiting.
void RunIndexer::Wait(Waiting waiting) {
  absl::MutexLock lock(&mutex_);
  if (stopping_) return;
  if (waiting.turn == 0) waiting.turn = ++turns_;
  const auto [there, first] =
      waiting_.try_emplace(std::pair(waiting.samples.get(), waiting.layer), waiting);
  if (first) return;
  there->second.turn = std::min(there->second.turn, waiting.turn);
  there->second.tried_room = std::min(there->second.tried_room, waiting.tried_room);
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
  std::vector<Waiting> all;
  for (auto& [key, waiting] : waiting_) all.push_back(std::move(waiting));
  waiting_.clear();
  ++releasing_;
  mutex_.Unlock();
  std::sort(all.begin(), all.end(),
            [](const Waiting& a, const Waiting& b) { return a.turn < b.turn; });
  uint64_t left = UnreservedRoom();
  for (const Waiting& waiting : all) {
    std::vector<RunUse> uses;
    for (const std::weak_ptr<RunIndexes>& indexes : waiting.runs) {
      const std::shared_ptr<RunIndexes> there = indexes.lock();
      std::shared_ptr<const Run> run = there == nullptr ? nullptr : there->run();
      if (run != nullptr) uses.push_back({run, run->tokens()});
    }
    std::sort(uses.begin(), uses.end(),
              [](const RunUse& a, const RunUse& b) { return a.tokens.lo < b.tokens.lo; });
    const auto has_room = [&](uint64_t bytes) {
      if (bytes > left || left <= waiting.tried_room) return false;
      left -= bytes;
      return true;
    };
    Consider(waiting.layer, uses, waiting.shape, waiting.samples, has_room, &waiting);
  }
  mutex_.Lock();
  --releasing_;
}

void RunIndexer::Consider(uint32_t layer, std::span<const RunUse> runs, const KvShape& shape,
                          const std::shared_ptr<const QuerySamples>& samples) {
  if (!enabled()) return;
  const auto has_room = [&](uint64_t bytes) {
    uint64_t tried_room = 0;
    {
      absl::MutexLock lock(&mutex_);
      const auto waiting = waiting_.find(std::pair(samples.get(), layer));
      if (waiting != waiting_.end()) tried_room = waiting->second.tried_room;
    }
    const uint64_t wanted = std::max(bytes, tried_room + 1);
    return room_.UpTo(wanted) == wanted;
  };
  Consider(layer, runs, shape, samples, has_room, nullptr);
}

void RunIndexer::Consider(uint32_t layer, std::span<const RunUse> runs, const KvShape& shape,
                          const std::shared_ptr<const QuerySamples>& samples,
                          absl::FunctionRef<bool(uint64_t)> has_room, const Waiting* before) {
  RunIndexes::Learning learning;
  learning.renewal = samples->renewal();  // first: what is looked at later may only be newer
  learning.samples = samples->LeastKept(layer);
  for (const RunUse& use : runs) learning.tokens += use.run->tokens().size();
  const bool first = std::all_of(runs.begin(), runs.end(), [&](const RunUse& use) {
    return use.run->indexes()->empty(layer);
  });
  std::optional<uint64_t> least;
  for (const RunUse& use : runs) {
    if (!use.run->indexes()->IsDue(layer, learning)) continue;
    const uint64_t bytes = room_.BytesFor(layer, shape, *use.run, first);
    least = std::min(least.value_or(bytes), bytes);
  }
  if (!least.has_value()) return;
  if (!has_room(*least)) {
    Waiting waiting{layer, shape, samples, {}};
    if (before != nullptr) {
      waiting.turn = before->turn;
      waiting.tried_room = before->tried_room;
    }
    for (const RunUse& use : runs) waiting.runs.push_back(use.run->indexes());
    return Wait(std::move(waiting));
  }
  auto job = std::make_shared<Job>(layer, shape, samples, this);
  job->learning = learning;
  job->waited = before != nullptr;
  for (const RunUse& use : runs) {
    const std::shared_ptr<RunIndexes>& indexes = use.run->indexes();
    const RunIndexes::Due due = indexes->Begin(layer, job->learning, &counts_);
    if (due == RunIndexes::Due::kNo) {
      job->others.push_back(indexes);
      continue;
    }
    job->again |= due == RunIndexes::Due::kAgain;
    job->on_disk |= due == RunIndexes::Due::kFirst && archive_ != nullptr;
    job->parts.emplace_back(*use.run);
  }
  if (job->parts.empty()) return;
  absl::MutexLock lock(&mutex_);
  if (!stopping_) queue_.push_back(std::move(job));
}

std::shared_ptr<RunIndexer::Job> RunIndexer::NextHead(uint32_t* head) {
  absl::MutexLock lock(&mutex_);
  const auto due = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return stopping_ || (letting_go_ == 0 && std::ranges::any_of(queue_, [](const auto& job) {
                           return !job->loading;
                         }));
  };
  const auto any = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return due() || !waiting_.empty(); };
  for (;;) {
    mutex_.Await(absl::Condition(&any));
    const uint64_t now = SteadyNowNs();
    if (!stopping_ && !waiting_.empty() && now >= look_at_ns_) {
      look_at_ns_ = now + kRoomPollNs;  // not by others meanwhile
      ConsiderWaiting();
      look_at_ns_ = SteadyNowNs() + kRoomPollNs;
    } else if (due()) {
      break;
    } else {
      mutex_.AwaitWithTimeout(absl::Condition(&due), absl::Nanoseconds(look_at_ns_ - now));
    }
  }
  return stopping_ ? nullptr : NextOf(head);
}

// What is on the disk is there sooner than what is built, and what is built learns from it.
std::shared_ptr<RunIndexer::Job> RunIndexer::NextOf(uint32_t* head) {
  for (const std::shared_ptr<Job>& job : queue_) {
    if (!job->on_disk) continue;
    job->on_disk = false;
    job->loading = true;
    *head = kFromDisk;
    return job;
  }
  const auto next = std::ranges::find_if(queue_, [](const auto& job) { return !job->loading; });
  std::shared_ptr<Job> job = *next;
  if (job->next == 0) Prepare(job.get());
  *head = job->next++;
  if (job->next == job->heads()) std::erase(queue_, job);
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
}

void RunIndexer::TakeLater(Job* job) {
  for (auto later = queue_.begin(); later != queue_.end();) {
    Job& other = **later;
    if (&other == job || other.loading || other.next > 0 || other.samples != job->samples ||
        other.layer != job->layer || other.again) {
      ++later;
      continue;
    }
    job->parts.splice(job->parts.end(), other.parts);
    job->learning.tokens = std::max(job->learning.tokens, other.learning.tokens);
    job->learning.samples = std::max(job->learning.samples, other.learning.samples);
    later = queue_.erase(later);
  }
  job->parts.sort([](const Part& a, const Part& b) { return a.first_token < b.first_token; });
}

void RunIndexer::Loop() {
  RunBehindDecoding();
  uint32_t head = 0;
  while (const std::shared_ptr<Job> job = NextHead(&head)) {
    if (head == kFromDisk) {
      LoadParts(job);
    } else {
      BuildHead(*job, head);
    }
  }
}

void RunIndexer::LoadParts(const std::shared_ptr<Job>& job) {
  for (auto part = job->parts.begin(); part != job->parts.end();) {
    if (!LoadPart(*job, *part)) {
      ++part;
      continue;
    }
    job->others.push_back(part->indexes);  // those behind it share its models, or learn like it
    part = job->parts.erase(part);
  }
  absl::MutexLock lock(&mutex_);
  job->loading = false;
  if (job->parts.empty()) std::erase(queue_, job);
}

bool RunIndexer::LoadPart(Job& job, Part& part) {
  const std::shared_ptr<const RunName> name = part.indexes->name();
  if (name == nullptr || part.indexes->learned(job.layer).has_value()) return false;
  const std::optional<uint64_t> bytes = archive_->Find(*name, job.layer);
  if (!bytes.has_value()) return false;
  Building building;
  building.bytes = {*bytes};
  {
    absl::MutexLock lock(&mutex_);
    std::shared_ptr<const Run> run = part.indexes->run();
    const uint64_t wanted = ReservedBytes() + *bytes;
    if (run == nullptr || stopping_ || room_.UpTo(wanted) < wanted) return false;
    building.runs = {std::move(run)};
    building_.push_back(&building);
  }
  const bool loaded = KeepStored(job, *name, part, *building.runs.front());
  Release(&building);
  return loaded;
}

bool RunIndexer::KeepStored(const Job& job, const RunName& name, Part& part, const Run& run) {
  IndexArchive::KnownModels known(job.heads());
  for (const auto& other : job.others) {
    for (uint32_t h = 0; h < job.heads(); ++h) {
      const auto index = other->Get(job.layer, h);
      auto model = index == nullptr ? nullptr : ModelOf(*index);
      if (model != nullptr) known[h].push_back(std::move(model));
    }
  }
  absl::StatusOr<IndexArchive::Layer> layer = archive_->Load(name, job.layer, known);
  if (!layer.ok()) return false;
  for (uint32_t h = 0; h < job.heads(); ++h) {
    IndexArchive::Head& head = layer->heads[h];
    std::shared_ptr<const KeyIndex> index;
    if (head.made.index != nullptr) {
      absl::StatusOr<std::shared_ptr<const KeyIndex>> kept =
          room_.Keep(job.layer, job.shape, run, &head.made);
      // Heads that are there already stay, and the others are built when there is room.
      if (!kept.ok()) return false;
      index = *std::move(kept);
    }
    part.indexes->Set(job.layer, h, std::move(index), head.made.bytes, head.learned);
  }
  part.indexes->End(job.layer, layer->learned, /*all_heads=*/true, &counts_);
  part.indexes->SetSaved(job.layer, part.indexes->changes(job.layer));
  return true;
}

void RunIndexer::Hold(Job& job, uint32_t kv_head, Building* building) {
  absl::MutexLock lock(&mutex_);
  building->learning = job.learning;
  for (Part& part : job.parts) {
    // Where there was no room for the layer's other heads, this one may have been made before.
    const auto learned = part.indexes->learned(job.layer, kv_head);
    if (learned.has_value() && !learned->OutdatedBy(job.learning)) {
      if (auto has = part.indexes->Get(job.layer, kv_head); has != nullptr) {
        building->like = std::move(has);
        building->learning.Limit(*learned);
      }
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
  for (const auto& run : building->runs) {
    const bool first = building->like == nullptr && building->bytes.empty();
    building->bytes.push_back(room_.BytesFor(job.layer, job.shape, *run, first));
  }
  const uint64_t reserved = ReservedBytes();
  uint64_t all = std::accumulate(building->bytes.begin(), building->bytes.end(), reserved);
  const uint64_t room = room_.UpTo(all);
  while (!building->bytes.empty() && all > room) {
    all -= building->bytes.back();
    building->bytes.pop_back();
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
  bool full = building.bytes.size() < building.runs.size();
  // Of no runs if nobody wants them any more, or they are indexed.
  if (!building.bytes.empty() && !job.full.load()) {
    const uint64_t start_ns = SteadyNowNs();
    const absl::Status status = BuildHeld(job, kv_head, &building);
    build_micros_.fetch_add((SteadyNowNs() - start_ns) / 1000, std::memory_order_relaxed);
    full |= absl::IsResourceExhausted(status);
    if (!status.ok()) GiveUp(status, kv_head, building, &job);
  }
  if (full && !job.full.exchange(true) && !job.waited) {
    failed_.fetch_add(1, std::memory_order_relaxed);
    if (!job.warned.exchange(true)) {
      spdlog::info("runs wait for room in index.max_bytes tokens=[{}, {}) layer={}",
                   building.runs[building.made]->tokens().lo, building.runs.back()->tokens().hi,
                   job.layer);
    }
  }
  Release(&building);
}

void RunIndexer::GiveUp(const absl::Status& status, uint32_t kv_head, const Building& building,
                        Job* job) {
  if (!job->warned.exchange(true)) {  // the other heads of the layer will say the same
    const Run& run = *building.runs[building.made];
    spdlog::warn("run not indexed tokens=[{}, {}) layer={} kv_head={} error=\"{}\"",
                 run.tokens().lo, run.tokens().hi, job->layer, kv_head,
                 std::string(status.message()));
  }
  if (absl::IsResourceExhausted(status)) return;  // until there is room
  failed_.fetch_add(1, std::memory_order_relaxed);
  for (size_t r = building.made; r < building.bytes.size(); ++r) {
    building.parts[r]->indexes->Set(job->layer, kv_head, nullptr, 0, building.learning);
    building.parts[r]->built.fetch_add(1);
  }
}

absl::Status RunIndexer::BuildHeld(const Job& job, uint32_t kv_head, Building* building) {
  std::deque<KvSegments> segments;
  std::vector<KvView> views;
  for (size_t r = 0; r < building->bytes.size(); ++r) {
    const Run& run = *building->runs[r];
    segments.emplace_back(job.shape, job.layer, kv_head, run.tokens(), run.blocks().data(),
                          run.tokens().lo / kBlockTokens);
    const KvView* const rows = segments.back().Whole();
    if (rows == nullptr) return segments.back().status();
    views.push_back(*rows);
  }
  const OfferingProcessor offering;
  const std::vector<float> queries = job.samples->Scaled(job.layer, kv_head);
  IndexChoice choice = options_.choice;
  choice.group = job.shape.group();
  if (building->like == nullptr) {
    QUARRY_ASSIGN_OR_RETURN(std::vector<MadeIndex> made, MakeIndexes(choice, views, queries));
    for (MadeIndex& one : made) QUARRY_RETURN_IF_ERROR(Keep(job, kv_head, &one, building));
    return absl::OkStatus();
  }
  for (const KvView& view : views) {
    QUARRY_ASSIGN_OR_RETURN(MadeIndex one, MakeIndexLike(*building->like, choice, view, queries));
    QUARRY_RETURN_IF_ERROR(Keep(job, kv_head, &one, building));
  }
  return absl::OkStatus();
}

absl::Status RunIndexer::Keep(const Job& job, uint32_t kv_head, MadeIndex* made,
                              Building* building) {
  const Run& run = *building->runs[building->made];
  std::shared_ptr<const KeyIndex> index;
  if (made->index != nullptr) {
    QUARRY_ASSIGN_OR_RETURN(index, room_.Keep(job.layer, job.shape, run, made));
    built_.fetch_add(1, std::memory_order_relaxed);
  }
  run.indexes()->Set(job.layer, kv_head, std::move(index), made->bytes, building->learning);
  building->parts[building->made]->built.fetch_add(1);
  absl::MutexLock lock(&mutex_);
  ++building->made;
  return absl::OkStatus();
}

IndexStats RunIndexer::stats() const {
  IndexStats stats;
  stats.queued_runs = counts_.busy.load(std::memory_order_acquire);
  stats.indexed_runs = runs_->indexed();
  stats.built = built_.load(std::memory_order_relaxed);
  stats.relearned = counts_.relearned.load(std::memory_order_relaxed);
  stats.failed = failed_.load(std::memory_order_relaxed);
  stats.build_micros = build_micros_.load(std::memory_order_relaxed);
  stats.bytes = room_.used();
  stats.sample_bytes = sample_memory_->used();
  if (archive_ != nullptr) {
    const IndexArchiveStats archived = archive_->stats();
    stats.saved_layers = archived.saved_layers;
    stats.saved_bytes = archived.saved_bytes;
    stats.loaded_layers = archived.loaded_layers;
    stats.failed_loads = archived.failed_loads;
  }
  absl::MutexLock lock(&mutex_);
  stats.waiting_layers = waiting_.size();
  return stats;
}

}  // namespace quarry
