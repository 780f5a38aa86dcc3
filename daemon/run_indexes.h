// RunIndexes: the indexes of one run, which come while it is searched.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "cpu_index/key_index.h"
#include "proto/types.h"

namespace quarry {

class Run;

// Runs, however many of their layers.
struct RunCounts {
  std::atomic<uint64_t> busy{0};       // of which some layer is to be indexed, or is being indexed
  std::atomic<uint64_t> relearned{0};  // indexed anew, as often as the layer that was most often
};

// What tells a run from all others, once its blocks are published.
struct RunName {
  std::string tenant;
  BlockId last_block;
  NamespaceDigest name_space;  // of all its blocks
  TokenRange tokens;
  KvShape shape;
};

// Each layer is learned by itself, for a prefill may bring one after another.
// Holds no block: it outlives the run's contexts in the registry, and serves the next context with
// the same tokens. Thread-safe; its lock is held for the copy of a pointer only.
class RunIndexes {
 public:
  explicit RunIndexes(const KvShape& shape)
      : kv_heads_(shape.kv_heads),
        heads_(size_t{shape.layers} * shape.kv_heads),
        layers_(shape.layers) {}

  // What indexes were learned from.
  struct Learning {
    uint32_t samples = 0;  // positions whose queries were known
    uint32_t tokens = 0;   // of the runs that were learned from together
    uint64_t renewal = 0;  // QuerySamples::renewal, of these samples
    // It is worth learning again: several times more is known now, or samples were renewed since.
    bool OutdatedBy(const Learning& now) const;
    // No more than `other` of anything.
    void Limit(const Learning& other);
  };

  // Null: none yet, the run is scanned. Whoever searches an index keeps it, so that another may take
  // its place at any time.
  std::shared_ptr<const KeyIndex> Get(uint32_t layer, uint32_t kv_head) const {
    absl::ReaderMutexLock lock(&mutex_);
    return heads_[At(layer, kv_head)].index;
  }
  // Null: the head is scanned. bytes: that end with the index at least. learned: none: it is to be
  // learned in any case.
  void Set(uint32_t layer, uint32_t kv_head, std::shared_ptr<const KeyIndex> index,
           uint64_t bytes = 0, std::optional<Learning> learned = std::nullopt) {
    Head head{std::move(index), bytes, learned};
    absl::MutexLock lock(&mutex_);
    std::swap(heads_[At(layer, kv_head)], head);  // the old one ends outside the lock
    bytes_ += bytes;
    bytes_ -= head.bytes;
  }
  // Of all that are set.
  uint64_t bytes() const {
    absl::ReaderMutexLock lock(&mutex_);
    return bytes_;
  }

  bool empty() const;
  bool empty(uint32_t layer) const {
    absl::ReaderMutexLock lock(&mutex_);
    return IsEmpty(layer);
  }

  // The run that has these indexes now; null: no context uses it.
  std::shared_ptr<const Run> run() const {
    absl::ReaderMutexLock lock(&mutex_);
    return run_.lock();
  }
  // The same, but nobody comes to hold the run for it.
  bool used() const {
    absl::ReaderMutexLock lock(&mutex_);
    return !run_.expired();
  }
  void SetRun(const std::shared_ptr<const Run>& run) {
    absl::MutexLock lock(&mutex_);
    run_ = run;
  }

  // Whether all heads of a layer are to be indexed now, if that much can be learned from: for the
  // first time, or again since what was learned is outdated. The caller who is told so is the one
  // who does it, until End. counts: of the one indexer of all runs.
  enum class Due { kNo, kFirst, kAgain };
  Due Begin(uint32_t layer, const Learning& now, RunCounts* counts);
  bool IsDue(uint32_t layer, const Learning& now) const {
    absl::ReaderMutexLock lock(&mutex_);
    return layers_[layer].IsDue(now);
  }
  // learned: what all heads were learned from, but for those that say that they were from less. Not
  // all heads: it was given up, and the layer is due as if Begin had not been called.
  void End(uint32_t layer, Learning learned, bool all_heads, RunCounts* counts);
  // None: never indexed.
  std::optional<Learning> learned(uint32_t layer) const {
    absl::ReaderMutexLock lock(&mutex_);
    return layers_[layer].learned;
  }
  // The same of one head, whether it has an index or is scanned.
  std::optional<Learning> learned(uint32_t layer, uint32_t kv_head) const {
    absl::ReaderMutexLock lock(&mutex_);
    return heads_[At(layer, kv_head)].learned;
  }
  // What an index of the layer took for which there was no room, until all heads have theirs; 0:
  // none.
  uint64_t refused_bytes(uint32_t layer) const {
    absl::ReaderMutexLock lock(&mutex_);
    return layers_[layer].refused_bytes;
  }
  void SetRefusedBytes(uint32_t layer, uint64_t bytes) {
    absl::MutexLock lock(&mutex_);
    layers_[layer].refused_bytes = bytes;
  }
  bool all_learned() const;  // of all layers

  // Null until the registry knows the run, and of runs whose blocks are of several namespaces.
  std::shared_ptr<const RunName> name() const {
    absl::ReaderMutexLock lock(&mutex_);
    return name_;
  }
  void SetName(RunName name) {
    auto named = std::make_shared<const RunName>(std::move(name));
    absl::MutexLock lock(&mutex_);
    if (name_ == nullptr) name_ = std::move(named);
  }
  // How often a layer was learned, and all of them.
  uint64_t changes(uint32_t layer) const {
    absl::ReaderMutexLock lock(&mutex_);
    return layers_[layer].changes;
  }
  uint64_t changes() const;
  // Layers that have changed since they were written to the disk; none while any is being learned,
  // or without a name.
  std::vector<uint32_t> UnsavedLayers() const;
  // The layer is on the disk as it was after so many changes.
  void SetSaved(uint32_t layer, uint64_t changes) {
    absl::MutexLock lock(&mutex_);
    layers_[layer].saved = changes;
  }

 private:
  struct Head {
    std::shared_ptr<const KeyIndex> index;
    uint64_t bytes = 0;
    std::optional<Learning> learned;
  };
  struct Layer {
    bool busy = false;
    uint32_t again = 0;  // times indexed anew
    std::optional<Learning> learned;
    uint64_t refused_bytes = 0;
    uint64_t changes = 0, saved = 0;
    bool IsDue(const Learning& now) const {
      return !busy && (!learned.has_value() || learned->OutdatedBy(now));
    }
  };
  bool IsEmpty(uint32_t layer) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  size_t At(uint32_t layer, uint32_t kv_head) const { return size_t{layer} * kv_heads_ + kv_head; }

  const uint32_t kv_heads_;
  mutable absl::Mutex mutex_;
  std::vector<Head> heads_ ABSL_GUARDED_BY(mutex_);
  uint64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Layer> layers_ ABSL_GUARDED_BY(mutex_);
  std::weak_ptr<const Run> run_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<const RunName> name_ ABSL_GUARDED_BY(mutex_);
  uint32_t busy_layers_ ABSL_GUARDED_BY(mutex_) = 0;
  uint32_t most_again_ ABSL_GUARDED_BY(mutex_) = 0;  // of the layers
};

}  // namespace quarry
