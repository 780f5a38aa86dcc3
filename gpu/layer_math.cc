#include "gpu/layer_math.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
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

void LayerMath::Project(uint32_t layer, const float* x, uint32_t first, uint32_t rows,
                        LayerScratch* s, const DevicePlace* place) {
  const ModelConfig& c = model_.config();
  const LayerWeights& w = model_.Layer(layer);
  device_.RmsNorm(x, w.attention_norm, c.norm_eps, s->norm.floats(), rows);
  for (const auto& [weight, out] :
       {std::pair{&w.q, &s->q}, {&w.k, &s->k_wide}, {&w.v, &s->v_wide}}) {
    device_.MatMul(s->norm.floats(), *weight, out->floats(), rows, Device::Output::kOverwrite);
  }
  for (const auto& [turned, heads] : {std::pair{&s->q, c.heads}, {&s->k_wide, c.kv_heads}}) {
    device_.Rope({turned->floats(), first, rows, heads, c.head_dim, rope_.inv_freq,
                  rope_.attention_scale, place});
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

void LayerMath::Head(const float* x, float* norm, float* logits) {
  device_.RmsNorm(x, model_.final_norm(), model_.config().norm_eps, norm, 1);
  for (size_t t = 0; t < model_.head_tiles(); ++t) {
    const HeadTile& tile = model_.Head(t);
    device_.MatMul(norm, tile.weight, logits + tile.first, 1, Device::Output::kOverwrite);
  }
}

absl::StatusOr<std::vector<float>> LayerMath::ReadLogits(const float* logits, uint32_t token) {
  std::vector<float> out(model_.config().vocab);
  QUARRY_RETURN_IF_ERROR(device_.Download(std::as_writable_bytes(std::span(out)), logits));
  for (size_t id = 0; id < out.size(); ++id) {
    if (!std::isfinite(out[id])) {
      return absl::InternalError(
          absl::StrCat("the logit of id ", id, " after token ", token, " is ", out[id]));
    }
  }
  return out;
}

absl::StatusOr<std::vector<float>> LayerMath::Logits(const float* x, uint32_t token) {
  const ModelConfig& c = model_.config();
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer norm, device_.Allocate(size_t{c.hidden} * 4, "last state"));
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer logits, device_.Allocate(size_t{c.vocab} * 4, "logits"));
  Head(x, norm.floats(), logits.floats());
  return ReadLogits(logits.floats(), token);
}

DeviceAttention LayerMath::Attention(uint32_t first, uint32_t rows, std::span<const DeviceKv> parts,
                                     const LayerScratch& s) const {
  DeviceAttention a;
  a.parts = parts;
  a.dtype = shape_.dtype;
  a.heads = shape_.heads;
  a.kv_heads = shape_.kv_heads;
  a.head_dim = shape_.head_dim;
  a.first_token = first;
  a.rows = rows;
  a.window = model_.config().sliding_window;
  a.q = s.q.floats();
  a.o = s.o.floats();
  a.lse = s.lse.floats();
  return a;
}

}  // namespace quarry
