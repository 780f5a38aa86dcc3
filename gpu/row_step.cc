#include "gpu/row_step.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr size_t kAlignment = 64;  // of the parts of what is told; heads are copied in pieces of 8
constexpr size_t Align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

static_assert(std::is_trivially_copyable_v<RungMessage>);

}  // namespace

RowStep::RowStep(const Model& model, Device& device, LayerMath& math, const KvShape& shape,
                 const Options& options)
    : model_(model), device_(device), math_(math), shape_(shape), options_(options) {}

absl::StatusOr<std::unique_ptr<RowStep>> RowStep::Create(const Model& model, Device& device,
                                                         LayerMath& math, const KvShape& shape,
                                                         const Options& options) {
  std::unique_ptr<RowStep> out(new RowStep(model, device, math, shape, options));
  const ModelConfig& c = model.config();
  const size_t hidden_bytes = size_t{c.hidden} * sizeof(float);
  const uint32_t rows = out->rows(), sequences = options.sequences;
  QUARRY_CHECK(sequences == 1 || options.rows == 1);
  QUARRY_ASSIGN_OR_RETURN(out->x_, device.Allocate(rows * hidden_bytes, "hidden states"));
  QUARRY_ASSIGN_OR_RETURN(out->norm_, device.Allocate(sequences * hidden_bytes, "last states"));
  QUARRY_ASSIGN_OR_RETURN(out->logits_,
                          device.Allocate(sequences * size_t{c.vocab} * sizeof(float), "logits"));
  QUARRY_ASSIGN_OR_RETURN(out->scratch_, math.Allocate(rows, options.answers));
  if (options.answers == LayerMath::Answers::kFar) {
    QUARRY_ASSIGN_OR_RETURN(
        out->outcomes_, device.Allocate(shape.layers * RungOutcomeBytes(rows), "answers' heads"));
  }
  return out;
}

absl::Status RowStep::Run(std::span<const uint32_t> ids, std::span<const Member> members,
                          const RungAttends* rung) {
  QUARRY_RETURN_IF_ERROR(Tell(members, rung));
  QUARRY_RETURN_IF_ERROR(model_.Embed(ids, x_.floats()));
  if (Frame frame = FrameOf(members, rung); frame != frame_) {
    recording_.reset();
    frame_ = std::move(frame);
  } else if (recording_ == nullptr && records()) {
    auto recording = device_.Record([&] { Call(members, rung); });
    if (recording.ok()) {
      recording_ = *std::move(recording);
    } else {
      options_.recording = Recording::kOff;  // what it would have saved is time alone
    }
  }
  if (recording_ == nullptr) {
    Call(members, rung);
  } else {
    device_.Replay(*recording_);
    ++replays_;
  }
  return absl::OkStatus();
}

RowStep::Told RowStep::Layout(const RungAttends* rung) const {
  Told told;
  told.messages = Align(size_t{shape_.layers} * options_.sequences * sizeof(DevicePlace));
  told.heads = told.messages;
  if (rung != nullptr) told.heads += Align(rung->messages().size() * sizeof(RungMessage));
  told.bytes = told.heads + (rung != nullptr ? rung->heads().size() : 0);
  return told;
}

absl::Status RowStep::Tell(std::span<const Member> members, const RungAttends* rung) {
  const Told told = Layout(rung);
  if (told_.bytes() != told.bytes) {  // and so is the frame another one
    told_.Reset();
    QUARRY_ASSIGN_OR_RETURN(told_, device_.Allocate(told.bytes, "places and requests' heads"));
  }
  std::vector<std::byte> bytes(told.bytes);
  std::byte* to = bytes.data();
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    for (const Member& member : members) {
      const DevicePlace place = member.local[l].Place(member.first);
      std::memcpy(to, &place, sizeof(place));
      to += sizeof(place);
    }
  }
  if (rung != nullptr) {
    const std::span<const RungMessage> messages = rung->messages();
    std::memcpy(bytes.data() + told.messages, messages.data(), messages.size_bytes());
    std::ranges::copy(rung->heads(), bytes.begin() + static_cast<ptrdiff_t>(told.heads));
  }
  return device_.Upload(told_.raw(), bytes);
}

RowStep::Frame RowStep::FrameOf(std::span<const Member> members, const RungAttends* rung) const {
  Frame frame;
  // Copies of weights go on beside operations, which a recording cannot wait for.
  frame.weight_moves = model_.weight_moves();
  for (const Member& member : members) {
    for (const LocalKv& kv : member.local) {
      std::vector<DeviceKv> parts = kv.PlacedParts();
      parts.back().tokens = {};
      frame.kv.push_back(std::move(parts));
    }
  }
  if (rung == nullptr) return frame;
  frame.layout = rung->layout();
  for (const RungMessage& message : rung->messages()) {
    frame.slot = message.slot;  // they go through one slot
    frame.answered_bits.push_back(message.answered_bit);
  }
  return frame;
}

void RowStep::Call(std::span<const Member> members, const RungAttends* rung) {
  float* const x = x_.floats();
  for (uint32_t l = 0; l < shape_.layers; ++l) {
    std::vector<TokenRows> tokens;
    for (size_t m = 0; m < members.size(); ++m) {
      tokens.push_back({members[m].first, options_.rows, members[m].rope, PlaceOf(l, m)});
    }
    math_.Project(l, x, tokens, &scratch_);
    if (rung == nullptr) {
      AttendLocal(l, members);
    } else {
      const DeviceRing ring = RingOf(l, *rung);
      device_.Ring(ring);
      AttendLocal(l, members);  // while the daemon works
      device_.TakeAnswer(ring);
    }
    math_.Finish(l, x, rows(), &scratch_);
  }
  // With several sequences, all rows are last ones.
  const size_t skipped = rows() - options_.sequences;
  math_.Head(x + skipped * model_.config().hidden, options_.sequences, norm_.floats(),
             logits_.floats());
}

void RowStep::AttendLocal(uint32_t layer, std::span<const Member> members) {
  const size_t kv_bytes = shape_.kv_heads * shape_.vector_bytes();  // of a row
  std::vector<DeviceKvStore> stores;
  std::vector<std::vector<DeviceKv>> parts;
  std::vector<DeviceAttention> attentions;
  for (size_t m = 0; m < members.size(); ++m) {
    const auto& [first, rope, local] = members[m];
    const auto at = static_cast<uint32_t>(m) * options_.rows;
    stores.push_back(local[layer].StoreOf(first, options_.rows, scratch_.k.raw() + at * kv_bytes,
                                          scratch_.v.raw() + at * kv_bytes));
    stores.back().place = PlaceOf(layer, m);
    parts.push_back(local[layer].PlacedParts());
    attentions.push_back(math_.Attention(first, options_.rows, parts.back(), scratch_, at));
    attentions.back().place = PlaceOf(layer, m);
  }
  device_.StoreKvEach(stores);
  device_.AttendEach(attentions);
}

DeviceRing RowStep::RingOf(uint32_t layer, const RungAttends& rung) const {
  const size_t outcome_bytes = RungOutcomeBytes(rows());
  const Told told = Layout(&rung);
  DeviceRing ring;
  ring.layout = rung.layout();
  ring.message = rung.messages()[layer];
  ring.at = reinterpret_cast<const RungMessage*>(told_.raw() + told.messages) + layer;
  ring.head = told_.raw() + told.heads + layer * ring.layout.head_bytes;
  ring.q = scratch_.q.floats();
  ring.k = scratch_.k.raw();
  ring.v = scratch_.v.raw();
  ring.o = scratch_.o.floats();
  ring.lse = scratch_.lse.floats();
  ring.far_lse = scratch_.far_lse.floats();
  ring.outcome = outcomes_.raw() + layer * outcome_bytes;
  if (layer > 0) {
    ring.before = outcomes_.raw() + (layer - 1) * outcome_bytes;
    ring.before_generation = rung.messages()[layer - 1].generation;
  }
  return ring;
}

absl::StatusOr<std::vector<std::byte>> RowStep::Outcomes() {
  std::vector<std::byte> out(outcomes_.bytes());
  QUARRY_RETURN_IF_ERROR(device_.Download(out, outcomes_.raw()));
  return out;
}

absl::StatusOr<std::vector<Prediction>> RowStep::Predict(std::span<const uint32_t> last,
                                                         std::span<const TokenDraw> draws) {
  return math_.Predict(logits_.floats(), last, draws);
}

}  // namespace quarry
