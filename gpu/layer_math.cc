#include "gpu/layer_math.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Rows of the MLP in work at a time: bounds its activations, large enough for the products.
constexpr uint32_t kMlpRows = 1024;

struct Piece {
  DeviceBuffer LayerScratch::*buffer;
  size_t bytes;
  const char* what;
  bool far = false;  // only with answers from the daemon
};

std::vector<Piece> PiecesOf(const ModelConfig& c, const KvShape& shape, uint32_t max_rows) {
  const size_t rows = max_rows, mlp_rows = std::min(max_rows, kMlpRows);
  const size_t q = rows * c.heads * c.head_dim, kv = rows * c.kv_heads * c.head_dim;
  const size_t element = DTypeBytes(shape.dtype);
  using S = LayerScratch;
  return {{&S::norm, rows * c.hidden * 4, "normed states"},
          {&S::q, q * 4, "queries"},
          {&S::o, q * 4, "attention output"},
          {&S::lse, rows * c.heads * 4, "lse"},
          {&S::k_wide, kv * 4, "keys"},
          {&S::v_wide, kv * 4, "values"},
          {&S::k, kv * element, "rounded keys"},
          {&S::v, kv * element, "rounded values"},
          {&S::gate_up, mlp_rows * 2 * c.intermediate * 4, "MLP gate and up"},
          {&S::activated, mlp_rows * c.intermediate * 4, "MLP activations"},
          {&S::far_o, q * 4, "the daemon's output", true},
          {&S::far_lse, rows * c.heads * 4, "the daemon's lse", true}};
}

// Whether all are one row each, of places one behind the other, that turn alike.
bool TurnTogether(std::span<const TokenRows> tokens) {
  const TokenRows& first = tokens.front();
  for (size_t i = 0; i < tokens.size(); ++i) {
    const TokenRows& t = tokens[i];
    if (t.rows != 1 || first.place == nullptr || t.place != first.place + i) return false;
    if (t.rope == first.rope) continue;
    if (t.rope == nullptr || first.rope == nullptr) return false;
    if (t.rope->inv_freq != first.rope->inv_freq ||
        t.rope->attention_scale != first.rope->attention_scale) {
      return false;
    }
  }
  return true;
}

absl::Status NotFinite(uint32_t id, uint32_t token) {
  return absl::InternalError(
      absl::StrCat("the logit of id ", id, " after token ", token, " is no finite number"));
}

}  // namespace

uint64_t LayerScratchBytes(const ModelConfig& config, const KvShape& shape, uint32_t max_rows) {
  uint64_t bytes = 0;
  for (const Piece& piece : PiecesOf(config, shape, max_rows)) bytes += piece.bytes;
  return bytes;
}

absl::StatusOr<LayerScratch> LayerMath::Allocate(uint32_t max_rows, Answers answers) const {
  LayerScratch s;
  s.max_rows = max_rows;
  for (const Piece& piece : PiecesOf(model_.config(), shape_, max_rows)) {
    if (piece.far && answers != Answers::kFar) continue;
    QUARRY_ASSIGN_OR_RETURN(s.*piece.buffer, device_.Allocate(piece.bytes, piece.what));
  }
  return s;
}

void LayerMath::Project(uint32_t layer, const float* x, std::span<const TokenRows> tokens,
                        LayerScratch* s) {
  const ModelConfig& c = model_.config();
  uint32_t rows = 0;
  for (const TokenRows& t : tokens) rows += t.rows;
  const LayerWeights& w = model_.Layer(layer);
  device_.RmsNorm(x, w.attention_norm, c.norm_eps, s->norm.floats(), rows);
  for (const auto& [weight, out] :
       {std::pair{&w.q, &s->q}, {&w.k, &s->k_wide}, {&w.v, &s->v_wide}}) {
    device_.MatMul(s->norm.floats(), *weight, out->floats(), rows, Device::Output::kOverwrite);
  }
  const bool together = TurnTogether(tokens);
  for (const auto& [turned, heads] : {std::pair{&s->q, c.heads}, {&s->k_wide, c.kv_heads}}) {
    float* vectors = turned->floats();
    for (const TokenRows& t : together ? tokens.first(1) : tokens) {
      const RopeSpec& rope = t.rope != nullptr ? *t.rope : rope_;
      device_.Rope({vectors, t.first, together ? rows : t.rows, heads, c.head_dim, rope.inv_freq,
                    rope.attention_scale, t.place, together});
      vectors += size_t{t.rows} * heads * c.head_dim;
    }
  }
  const size_t elements = size_t{rows} * c.kv_heads * c.head_dim;
  device_.Round(s->k_wide.floats(), shape_.dtype, s->k.raw(), elements);
  device_.Round(s->v_wide.floats(), shape_.dtype, s->v.raw(), elements);
}

void LayerMath::Finish(uint32_t layer, float* x, uint32_t rows, LayerScratch* s) {
  const ModelConfig& c = model_.config();
  const LayerWeights& w = model_.Layer(layer);
  device_.MatMul(s->o.floats(), w.o, x, rows, Device::Output::kAccumulate);
  device_.RmsNorm(x, w.mlp_norm, c.norm_eps, s->norm.floats(), rows);
  for (uint32_t r = 0; r < rows; r += kMlpRows) {
    const uint32_t n = std::min(kMlpRows, rows - r);
    device_.MatMul(s->norm.floats() + size_t{r} * c.hidden, w.gate_up, s->gate_up.floats(), n,
                   Device::Output::kOverwrite);
    device_.SwiGlu(s->gate_up.floats(), s->activated.floats(), n, c.intermediate);
    device_.MatMul(s->activated.floats(), w.down, x + size_t{r} * c.hidden, n,
                   Device::Output::kAccumulate);
  }
}

// The head's tiles one behind the other, of each all rows.
void LayerMath::Head(const float* x, uint32_t rows, float* norm, float* logits) {
  device_.RmsNorm(x, model_.final_norm(), model_.config().norm_eps, norm, rows);
  for (size_t t = 0; t < model_.head_tiles(); ++t) {
    const HeadTile& tile = model_.Head(t);
    device_.MatMul(norm, tile.weight, logits + rows * tile.first, rows, Device::Output::kOverwrite);
  }
  model_.UseNone();
}

absl::StatusOr<std::vector<Prediction>> LayerMath::ReadLogits(DeviceLogits logits,
                                                              std::span<const uint32_t> tokens) {
  std::vector<float> here(size_t{logits.rows} * logits.vocab);
  QUARRY_RETURN_IF_ERROR(device_.Download(std::as_writable_bytes(std::span(here)), logits.logits));
  logits.logits = here.data();
  std::vector<Prediction> out(logits.rows);
  for (uint32_t r = 0; r < logits.rows; ++r) {
    out[r].logits = RowOf(logits, r);
    const uint32_t unfit = FirstUnfit(out[r].logits);
    if (unfit != kEveryToken) return NotFinite(unfit, tokens[r]);
  }
  return out;
}

absl::StatusOr<std::vector<Prediction>> LayerMath::Predict(const float* logits,
                                                           std::span<const uint32_t> tokens,
                                                           std::span<const TokenDraw> draws) {
  const DeviceLogits of_device{logits, static_cast<uint32_t>(tokens.size()), model_.config().vocab,
                               model_.head_tile_rows()};
  if (draws.empty()) return ReadLogits(of_device, tokens);
  QUARRY_CHECK(draws.size() == tokens.size());
  std::vector<ChosenToken> chosen(tokens.size());
  const auto bytes = std::as_writable_bytes(std::span(chosen));
  QUARRY_ASSIGN_OR_RETURN(const DeviceBuffer memory,
                          device_.Allocate(bytes.size(), "chosen tokens"));
  device_.Choose(of_device, draws, reinterpret_cast<ChosenToken*>(memory.raw()));
  QUARRY_RETURN_IF_ERROR(device_.Download(bytes, memory.raw()));
  std::vector<Prediction> out(tokens.size());
  for (size_t r = 0; r < tokens.size(); ++r) {
    if (chosen[r].unfit != kEveryToken) return NotFinite(chosen[r].unfit, tokens[r]);
    out[r].token = chosen[r].id;
  }
  return out;
}

absl::StatusOr<std::vector<Prediction>> LayerMath::PredictFrom(const float* x,
                                                               std::span<const uint32_t> tokens,
                                                               std::span<const TokenDraw> draws) {
  const ModelConfig& c = model_.config();
  const size_t rows = tokens.size();
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer norm, device_.Allocate(rows * c.hidden * 4, "last states"));
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer logits, device_.Allocate(rows * c.vocab * 4, "logits"));
  Head(x, static_cast<uint32_t>(rows), norm.floats(), logits.floats());
  return Predict(logits.floats(), tokens, draws);
}

DeviceAttention LayerMath::Attention(uint32_t first, uint32_t rows, std::span<const DeviceKv> parts,
                                     const LayerScratch& s, uint32_t at) const {
  const size_t heads = size_t{at} * shape_.heads;
  DeviceAttention a;
  a.parts = parts;
  a.dtype = shape_.dtype;
  a.heads = shape_.heads;
  a.kv_heads = shape_.kv_heads;
  a.head_dim = shape_.head_dim;
  a.first_token = first;
  a.rows = rows;
  a.window = model_.config().sliding_window;
  a.q = s.q.floats() + heads * shape_.head_dim;
  a.o = s.o.floats() + heads * shape_.head_dim;
  a.lse = s.lse.floats() + heads;
  return a;
}

}  // namespace quarry
