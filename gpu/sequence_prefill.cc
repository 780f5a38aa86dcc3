// Prefill: layer by layer over all new tokens, chunk by chunk within a layer. The hidden states
// of all tokens and the K/V of one layer are on the device, nothing else grows with the context.
// A sparse layer takes two passes: keys and values of all tokens, then attention.
#include <algorithm>
#include <array>
#include <future>
#include <optional>
#include <utility>

#include "gpu/sequence.h"
#include "gpu/sparse/build_index.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Rising. A quarter are the last ones, for what is decoded next asks as they do.
std::vector<uint32_t> SampledPositions(TokenRange prefill, uint32_t count) {
  count = std::min(count, prefill.size());
  const uint32_t last = count / 4, spread = count - last, begin = prefill.hi - last;
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < spread; ++i) {
    out.push_back(prefill.lo + static_cast<uint32_t>(uint64_t{i} * (begin - prefill.lo) / spread));
  }
  for (uint32_t token = begin; token < prefill.hi; ++token) out.push_back(token);
  return out;
}

}  // namespace

// What a prefill's chunks send to the service: while one is computed, the one before it is on its
// way down from the device, and the one before that is appended.
class Sequence::Appender {
 public:
  Appender(KvService* service, Device* device) : service_(service), device_(device) {}
  // Without Finish what was not yet appended is dropped: the prefill has failed.
  ~Appender() { (void)AwaitAppend(); }
  Appender(const Appender&) = delete;
  Appender& operator=(const Appender&) = delete;

  // Memory for chunks of at most so many bytes of K, and samples of q_bytes each.
  absl::Status Reserve(size_t kv_bytes, uint32_t samples, size_t q_bytes) {
    q_bytes_ = q_bytes;
    sample_bytes_ = samples * q_bytes;
    for (Chunk& chunk : chunks_) {
      QUARRY_ASSIGN_OR_RETURN(
          chunk.memory, device_->AllocateHost(sample_bytes_ + 2 * kv_bytes, "K/V on their way"));
    }
    return absl::OkStatus();
  }

  // k and v, [tokens][kv_heads][head_dim] of the device, and the queries of some positions, rising;
  // q is that of the range's first token. They stay as they are until WaitForCopies.
  absl::Status Send(AppendRequest request, size_t kv_bytes, const void* k, const void* v,
                    std::vector<uint32_t> positions, const std::byte* q) {
    QUARRY_RETURN_IF_ERROR(AppendLatest());
    Chunk& chunk = chunks_[next_];  // what it held is appended
    next_ = 1 - next_;
    chunk.positions = std::move(positions);
    std::span<std::byte> samples = chunk.memory.bytes();  // in front, for they are floats
    const std::span<std::byte> to_k = samples.subspan(sample_bytes_, kv_bytes);
    const std::span<std::byte> to_v = samples.subspan(sample_bytes_ + kv_bytes, kv_bytes);
    request.k = to_k.data();
    request.v = to_v.data();
    request.query_samples = reinterpret_cast<const float*>(samples.data());
    request.query_positions = chunk.positions;
    device_->StartDownload(to_k, k);
    copied_ = device_->StartDownload(to_v, v);
    for (size_t i = 0, n = 1; i < chunk.positions.size(); i += n) {  // n of them are neighbours
      const uint32_t first = chunk.positions[i];
      for (n = 1; i + n < chunk.positions.size() && chunk.positions[i + n] == first + n;) ++n;
      copied_ = device_->StartDownload(samples.first(n * q_bytes_),
                                       q + (first - request.range.lo) * q_bytes_);
      samples = samples.subspan(n * q_bytes_);
    }
    latest_ = std::move(request);
    return absl::OkStatus();
  }
  // Operations called from here on may write what was sent.
  void WaitForCopies() {
    if (latest_.has_value()) device_->WaitForDownload(copied_);
  }
  absl::Status Finish() {
    const absl::Status latest = AppendLatest();
    const absl::Status appended = AwaitAppend();
    return latest.ok() ? appended : latest;
  }

 private:
  struct Chunk {
    HostBuffer memory;  // samples, K, V
    std::vector<uint32_t> positions;
  };

  absl::Status AwaitAppend() { return pending_.valid() ? pending_.get() : absl::OkStatus(); }
  absl::Status AppendLatest() {
    if (!latest_.has_value()) return absl::OkStatus();
    const AppendRequest request = *std::exchange(latest_, std::nullopt);
    QUARRY_RETURN_IF_ERROR(device_->FinishDownload(copied_));
    QUARRY_RETURN_IF_ERROR(AwaitAppend());
    pending_ = std::async(std::launch::async,
                          [service = service_, request] { return service->Append(request); });
    return absl::OkStatus();
  }

  KvService* const service_;
  Device* const device_;
  size_t q_bytes_ = 0, sample_bytes_ = 0;  // of a position's queries, of a chunk's at most
  std::array<Chunk, 2> chunks_;
  size_t next_ = 0;
  std::optional<AppendRequest> latest_;  // on its way down
  Device::DownloadTicket copied_ = 0;    // when it is here
  std::future<absl::Status> pending_;
};

absl::StatusOr<Prediction> Sequence::Prefill(std::span<const uint32_t> tokens, Draw draw) {
  const auto rows = static_cast<uint32_t>(tokens.size());
  model_.UseNone();  // of a pass that failed
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer x, Embed(tokens));
  QUARRY_ASSIGN_OR_RETURN(LayerScratch scratch,
                          math_.Allocate(std::min(rows, std::max(1u, options_.prefill_rows)),
                                         LayerMath::Answers::kNone));
  TokenSpan buffer(&device_, shape_);
  if (service_ != nullptr) QUARRY_RETURN_IF_ERROR(buffer.Reserve(tokens_ + rows));
  Appender appender(service_, &device_);
  if (service_ != nullptr) {
    const size_t row_bytes = shape_.kv_heads * shape_.vector_bytes();
    QUARRY_RETURN_IF_ERROR(appender.Reserve(scratch.max_rows * row_bytes,
                                            std::min(rows, options_.query_samples),
                                            size_t{shape_.heads} * shape_.head_dim * 4));
  }
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    QUARRY_RETURN_IF_ERROR(PrefillLayer(l, x.floats(), rows, &scratch, &buffer, &appender));
  }
  QUARRY_RETURN_IF_ERROR(appender.Finish());
  tokens_ += rows;
  window_loaded_ = true;
  const uint32_t last = tokens_ - 1;
  QUARRY_ASSIGN_OR_RETURN(
      std::vector<Prediction> predictions,
      math_.PredictFrom(x.floats() + size_t{rows - 1} * model_.config().hidden, {&last, 1}, draw));
  return std::move(predictions.front());
}

absl::Status Sequence::PrefillLayer(uint32_t layer, float* x, uint32_t rows, LayerScratch* scratch,
                                    TokenSpan* buffer, Appender* appender) {
  const TokenRange prefill{tokens_, tokens_ + rows};
  LocalKv& local = local_[layer];
  if (service_ != nullptr) {
    // What is before the new tokens, all of it, be it in the window or not.
    buffer->Clear();
    appender->WaitForCopies();
    QUARRY_RETURN_IF_ERROR(LoadTokens(layer, {0, tokens_}, scratch, buffer, nullptr));
  }
  const bool sparse = IsSparse(layer);
  for (uint32_t lo = prefill.lo; lo < prefill.hi;) {
    const TokenRange chunk{lo, std::min(lo + scratch->max_rows, prefill.hi)};
    float* states = x + size_t{lo - prefill.lo} * model_.config().hidden;
    appender->WaitForCopies();
    math_.Project(layer, states, lo, chunk.size(), scratch);
    QUARRY_RETURN_IF_ERROR(Record(layer, lo, chunk.size(), scratch->q.floats()));
    QUARRY_RETURN_IF_ERROR(StoreChunk(layer, chunk, prefill, *scratch, buffer, appender));
    lo = chunk.hi;
    if (sparse) continue;  // which needs the keys of all chunks and the last queries first
    const std::vector<DeviceKv> parts =
        service_ != nullptr ? std::vector<DeviceKv>{buffer->View()} : local.Parts();
    const DeviceAttention attention = math_.Attention(chunk.lo, chunk.size(), parts, *scratch);
    device_.Attend(attention);
    if (tokens_ > 0 && rows <= options_.max_attend_rows) CountReach(attention);
    math_.Finish(layer, states, chunk.size(), scratch);
  }
  if (sparse) {
    appender->WaitForCopies();
    QUARRY_RETURN_IF_ERROR(AttendLayerSparsely(layer, x, prefill, scratch, *buffer));
  }
  return service_ != nullptr ? local.Assign(*buffer, prefill.hi) : absl::OkStatus();
}

absl::Status Sequence::StoreChunk(uint32_t layer, TokenRange chunk, TokenRange prefill,
                                  const LayerScratch& scratch, TokenSpan* buffer,
                                  Appender* appender) {
  if (service_ == nullptr) {
    return local_[layer].Append(chunk.lo, chunk.size(), scratch.k.raw(), scratch.v.raw());
  }
  QUARRY_RETURN_IF_ERROR(buffer->Append(chunk.lo, chunk.size(), scratch.k.raw(), scratch.v.raw()));
  return SendChunk(layer, chunk, prefill, scratch, appender);
}

bool Sequence::IsSparse(uint32_t layer) const {
  if (options_.patterns == nullptr) return false;
  for (uint32_t h = 0; h < shape_.heads; ++h) {
    if (!IsDense(options_.patterns->At(layer, h).pattern)) return true;
  }
  return false;
}

// The second pass over a layer: the hidden states are still those before it, and queries are made
// from them once more rather than kept, for they would be the largest thing in memory.
absl::Status Sequence::AttendLayerSparsely(uint32_t layer, float* x, TokenRange prefill,
                                           LayerScratch* scratch, const TokenSpan& buffer) {
  const size_t hidden = model_.config().hidden, width = size_t{shape_.heads} * shape_.head_dim;
  const std::vector<DeviceKv> parts =
      service_ != nullptr ? std::vector<DeviceKv>{buffer.View()} : local_[layer].Parts();
  const bool projected = prefill.size() <= scratch->max_rows;  // by the first pass, all at once
  const uint32_t last = std::min(kLastQueries, prefill.size()), first_last = prefill.hi - last;
  if (!projected) {
    math_.Project(layer, x + (first_last - prefill.lo) * hidden, first_last, last, scratch);
  }
  DeviceAttention last_queries = math_.Attention(first_last, last, parts, *scratch);
  if (projected) last_queries.q += (first_last - prefill.lo) * width;
  const std::span<const HeadPattern> patterns =
      std::span(options_.patterns->patterns).subspan(size_t{layer} * shape_.heads, shape_.heads);
  QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<SparsePlan> plan,
                          device_.PlanSparse(patterns, prefill, last_queries));
  const uint32_t step = projected ? prefill.size() : scratch->max_rows / kRowTile * kRowTile;
  for (uint32_t lo = prefill.lo; lo < prefill.hi;) {
    const uint32_t rows = std::min(step, prefill.hi - lo);
    float* states = x + (lo - prefill.lo) * hidden;
    if (!projected) math_.Project(layer, states, lo, rows, scratch);
    QUARRY_RETURN_IF_ERROR(device_.AttendSparse(*plan, math_.Attention(lo, rows, parts, *scratch)));
    math_.Finish(layer, states, rows, scratch);
    lo += rows;
  }
  return absl::OkStatus();
}

// K and V of a chunk, with its share of the prefill's query samples, go to the service.
absl::Status Sequence::SendChunk(uint32_t layer, TokenRange range, TokenRange prefill,
                                 const LayerScratch& scratch, Appender* appender) {
  const size_t bytes = size_t{range.size()} * shape_.kv_heads * shape_.vector_bytes();
  std::vector<uint32_t> positions;
  for (const uint32_t token : SampledPositions(prefill, options_.query_samples)) {
    if (token >= range.lo && token < range.hi) positions.push_back(token);
  }
  cost_.bytes_moved += 2 * bytes + positions.size() * shape_.heads * shape_.head_dim * 4;
  AppendRequest append;
  append.context = context_;
  append.layer = layer;
  append.kv_heads = shape_.kv_heads;
  append.range = range;
  return appender->Send(append, bytes, scratch.k.raw(), scratch.v.raw(), std::move(positions),
                        scratch.q.raw());
}

// Reads tokens back from the service, a scratch's worth at a time, into one of the two.
absl::Status Sequence::LoadTokens(uint32_t layer, TokenRange range, LayerScratch* staging,
                                  TokenSpan* to_span, LocalKv* to_window) {
  const size_t token_bytes = shape_.kv_heads * shape_.vector_bytes();
  std::vector<std::byte> k, v;
  for (uint32_t lo = range.lo; lo < range.hi;) {
    const TokenRange piece{lo, std::min(lo + staging->max_rows, range.hi)};
    k.resize(piece.size() * token_bytes);
    v.resize(k.size());
    QUARRY_RETURN_IF_ERROR(service_->Read(context_, layer, piece, k, v));
    cost_.bytes_moved += k.size() + v.size();
    QUARRY_RETURN_IF_ERROR(device_.Upload(staging->k.raw(), k));
    QUARRY_RETURN_IF_ERROR(device_.Upload(staging->v.raw(), v));
    QUARRY_RETURN_IF_ERROR(
        to_span != nullptr
            ? to_span->Append(lo, piece.size(), staging->k.raw(), staging->v.raw())
            : to_window->Append(lo, piece.size(), staging->k.raw(), staging->v.raw()));
    lo = piece.hi;
  }
  return absl::OkStatus();
}

absl::Status Sequence::LoadWindow() {
  if (window_loaded_) return absl::OkStatus();
  const auto [first, last] = options_.window.Kept(tokens_);
  const uint32_t rows = std::max({1u, first.size(), last.size()});
  QUARRY_ASSIGN_OR_RETURN(LayerScratch staging,
                          math_.Allocate(std::min(rows, std::max(1u, options_.prefill_rows)),
                                         LayerMath::Answers::kNone));
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    // Memory of the host is slow to come by.
    if (options_.local_kv == KvMemory::kHost) {
      QUARRY_RETURN_IF_ERROR(local_[l].Reserve(max_tokens_));
    }
    for (const TokenRange& range : {first, last}) {
      QUARRY_RETURN_IF_ERROR(LoadTokens(l, range, &staging, nullptr, &local_[l]));
    }
  }
  window_loaded_ = true;
  return absl::OkStatus();
}

}  // namespace quarry
