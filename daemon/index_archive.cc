#include "daemon/index_archive.h"

#include <algorithm>

#include <pthread.h>
#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cpu_index/any_index.h"
#include "cpu_index/index_form.h"
#include "daemon/low_priority.h"
#include "proto/byte_digest.h"
#include "proto/identity.h"
#include "proto/status_macros.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/slot_size.h"

namespace quarry {
namespace {

constexpr std::string_view kForm = "run-layer";
constexpr uint32_t kFormVersion = 1;

// Of one group commit.
constexpr uint64_t kBatchBytes = 32ull << 20;
// What cannot be written now is not tried at every look.
constexpr absl::Duration kRetryAfter = absl::Seconds(10);

// Whether a head was learned from anything is in `known`.
struct HeadForm {
  uint32_t known = 0, samples = 0, tokens = 0, zero = 0;
  uint64_t index_bytes = 0;  // that follow; 0: it is scanned
};
struct LayerForm {
  uint32_t kv_heads = 0, samples = 0, tokens = 0, zero = 0;
};

// What it was learned from; renewals are counted anew at each start.
RunIndexes::Learning LearningOf(uint32_t samples, uint32_t tokens) {
  return {.samples = samples, .tokens = tokens};
}

// Bytes where the log takes them from.
struct SectorBytes {
  explicit SectorBytes(uint64_t count) : size(count), buffer(RoundUp(count, kSectorBytes)) {}
  std::span<std::byte> bytes() { return buffer.bytes().first(size); }
  uint64_t size;
  AlignedBuffer buffer;
};

absl::StatusOr<std::vector<std::byte>> FormOf(const RunIndexes& indexes, const KvShape& shape,
                                              uint32_t layer) {
  const RunIndexes::Learning learned = indexes.learned(layer).value_or(RunIndexes::Learning());
  IndexWriter writer(kForm, kFormVersion);
  writer.Put(LayerForm{shape.kv_heads, learned.samples, learned.tokens});
  for (uint32_t h = 0; h < shape.kv_heads; ++h) {
    HeadForm form;
    if (const auto of_head = indexes.learned(layer, h); of_head.has_value()) {
      form = {1, of_head->samples, of_head->tokens};
    }
    std::vector<std::byte> bytes;
    if (const auto index = indexes.Get(layer, h); index != nullptr) {
      QUARRY_ASSIGN_OR_RETURN(bytes, SerializeIndex(*index));
    }
    form.index_bytes = bytes.size();
    writer.Put(form);
    writer.PutAll(std::span<const std::byte>(bytes));
  }
  return std::move(writer).Finish();
}

absl::StatusOr<IndexArchive::Head> ReadHead(
    const RunName& run, std::span<const std::shared_ptr<const ClusterModel>> known,
    IndexReader* reader) {
  HeadForm form;
  QUARRY_RETURN_IF_ERROR(reader->Get(&form));
  IndexArchive::Head head;
  if (form.known != 0) head.learned = LearningOf(form.samples, form.tokens);
  if (form.index_bytes == 0) return head;
  std::vector<std::byte> bytes;
  QUARRY_RETURN_IF_ERROR(reader->GetVector(form.index_bytes, &bytes));
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<KeyIndex> index, DeserializeIndex(bytes, known));
  // Only what the view says of itself is asked for, not what it points to.
  const KvSegment all{nullptr, nullptr, run.tokens};
  KvView view;
  view.segments = {&all, 1};
  view.head_dim = run.shape.head_dim;
  view.dtype = run.shape.dtype;
  if (!index->Fits(view)) {
    return absl::DataLossError(absl::StrCat("an index that does not fit tokens [", run.tokens.lo,
                                            ", ", run.tokens.hi, ")"));
  }
  head.made = MeasureIndex(std::move(index));
  return head;
}

}  // namespace

IndexArchive::IndexArchive(BlockLog* log, RunRegistry* runs, const IndexChoice& choice,
                           const IndexArchiveOptions& options)
    : log_(log), runs_(runs), choice_(choice), options_(options), thread_([this] { Loop(); }) {
  pthread_setname_np(thread_.native_handle(), "quarry-archive");
}

IndexArchive::~IndexArchive() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
  SaveAll(Which::kAll, absl::Now() + options_.end_within);
}

void IndexArchive::Loop() {
  RunBehindDecoding();
  absl::MutexLock lock(&mutex_);
  while (!mutex_.AwaitWithTimeout(absl::Condition(&stopping_), options_.look_every)) {
    mutex_.Unlock();
    SaveAll(Which::kSettled, absl::InfiniteFuture());
    mutex_.Lock();
  }
}

// ---- To the disk.

void IndexArchive::SaveAll(Which which, absl::Time end) {
  absl::flat_hash_map<const RunIndexes*, uint64_t> seen;
  for (const std::shared_ptr<RunIndexes>& indexes : runs_->Registered()) {
    const uint64_t changes = indexes->changes();
    const std::vector<uint32_t> layers = indexes->UnsavedLayers();
    if (layers.empty()) continue;
    const auto before = changes_.find(indexes.get());
    const bool settled = before != changes_.end() && before->second == changes;
    seen.emplace(indexes.get(), changes);
    if (which == Which::kSettled && !settled) continue;
    if (absl::Now() > end) {
      spdlog::warn("the indexes of some runs are not on the disk: their writing took too long");
      break;
    }
    if (const absl::Status saved = Save(*indexes, layers); !saved.ok()) {
      spdlog::warn("indexes of tokens [{}, {}) are not on the disk: {}", indexes->name()->tokens.lo,
                   indexes->name()->tokens.hi, std::string(saved.message()));
      if (which == Which::kAll) break;
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&stopping_), kRetryAfter);
      break;
    }
  }
  changes_ = std::move(seen);
}

absl::Status IndexArchive::Save(RunIndexes& indexes, std::span<const uint32_t> layers) {
  struct Saving {
    uint32_t layer;
    uint64_t changes;
    BlockKey key;
    SectorBytes form;
  };
  const std::shared_ptr<const RunName> name = indexes.name();
  for (size_t at = 0; at < layers.size();) {
    std::vector<Saving> batch;
    for (uint64_t bytes = 0; at < layers.size() && bytes < kBatchBytes; ++at) {
      const uint32_t layer = layers[at];
      const uint64_t changes = indexes.changes(layer);  // first: what is read may only be newer
      const absl::StatusOr<std::vector<std::byte>> form = [&] {
        const OfferingProcessor offering;
        return FormOf(indexes, name->shape, layer);
      }();
      if (!form.ok() && !absl::IsUnimplemented(form.status())) return form.status();
      BlockKey key = KeyOf(*name, layer);
      if (!form.ok() || !log_->CheckSize(name->tenant, key, form->size()).ok()) {
        indexes.SetSaved(layer, changes);  // never, as it is: it is built anew
        continue;
      }
      Saving& saving =
          batch.emplace_back(Saving{layer, changes, std::move(key), SectorBytes(form->size())});
      std::ranges::copy(*form, saving.form.bytes().begin());
      bytes += form->size();
    }
    std::vector<BlockToLog> blocks;
    for (Saving& saving : batch) {
      const std::span<const std::byte> bytes = saving.form.bytes();
      blocks.push_back({name->tenant, &saving.key, DigestOf(bytes), bytes,
                        [this, &indexes] { return runs_->Knows(indexes); }});
    }
    const std::vector<absl::Status> written = log_->Append(blocks);
    for (size_t i = 0; i < batch.size(); ++i) {
      if (absl::IsCancelled(written[i])) return absl::OkStatus();  // purged meanwhile
      QUARRY_RETURN_IF_ERROR(written[i]);
      indexes.SetSaved(batch[i].layer, batch[i].changes);
      saved_layers_.fetch_add(1, std::memory_order_relaxed);
      saved_bytes_.fetch_add(batch[i].form.size, std::memory_order_relaxed);
    }
  }
  return absl::OkStatus();
}

// ---- From the disk.

BlockKey IndexArchive::KeyOf(const RunName& run, uint32_t layer) const {
  BlockKey key;
  key.full_key = absl::StrCat(
      "run-index:", run.last_block.Hex(), ":", run.tokens.lo, ":", run.tokens.hi, ":",
      run.shape.layers, ":", run.shape.heads, ":", run.shape.kv_heads, ":", run.shape.head_dim, ":",
      static_cast<int>(run.shape.dtype), ":", layer, ":", static_cast<int>(choice_.kind), ":",
      static_cast<int>(choice_.codes), ":", choice_.min_run_tokens);
  key.id = RunIndexIdOf(run.tenant, key.full_key);
  key.parent = run.last_block;
  key.name_space = IndexNamespaceOf(run.name_space);
  return key;
}

std::optional<uint64_t> IndexArchive::Find(const RunName& run, uint32_t layer) const {
  const auto found = log_->Find(run.tenant, KeyOf(run, layer).id);
  if (!found.has_value()) return std::nullopt;
  return found->bytes;
}

absl::StatusOr<IndexArchive::Layer> IndexArchive::Load(const RunName& run, uint32_t layer,
                                                       const KnownModels& known) {
  const auto load = [&]() -> absl::StatusOr<Layer> {
    const BlockKey key = KeyOf(run, layer);
    const auto found = log_->Find(run.tenant, key.id);
    if (!found.has_value()) return absl::NotFoundError("it is not on the disk");
    SectorBytes form_bytes(found->bytes);
    QUARRY_RETURN_IF_ERROR(log_->Read(run.tenant, key, form_bytes.bytes()).status());
    QUARRY_ASSIGN_OR_RETURN(IndexReader reader,
                            IndexReader::Open(kForm, kFormVersion, form_bytes.bytes()));
    LayerForm form;
    QUARRY_RETURN_IF_ERROR(reader.Get(&form));
    if (form.kv_heads != run.shape.kv_heads) {
      return absl::DataLossError(
          absl::StrCat("indexes of ", form.kv_heads, " KV heads, not of ", run.shape.kv_heads));
    }
    Layer out{LearningOf(form.samples, form.tokens), {}};
    for (uint32_t h = 0; h < form.kv_heads; ++h) {
      QUARRY_ASSIGN_OR_RETURN(Head head, ReadHead(run, known[h], &reader));
      out.heads.push_back(std::move(head));
    }
    QUARRY_RETURN_IF_ERROR(reader.Finish());
    return out;
  };
  absl::StatusOr<Layer> loaded = load();
  ++(loaded.ok() ? loaded_layers_ : failed_loads_);
  if (!loaded.ok() && !absl::IsNotFound(loaded.status())) {
    spdlog::warn("indexes of tokens [{}, {}) layer={} are built anew: {}", run.tokens.lo,
                 run.tokens.hi, layer, std::string(loaded.status().message()));
  }
  return loaded;
}

IndexArchiveStats IndexArchive::stats() const {
  return {saved_layers_.load(std::memory_order_relaxed),
          saved_bytes_.load(std::memory_order_relaxed),
          loaded_layers_.load(std::memory_order_relaxed),
          failed_loads_.load(std::memory_order_relaxed)};
}

}  // namespace quarry
