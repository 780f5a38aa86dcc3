// A layer's K, V and queries with the structure that prefills of trained models show, made from a
// seed. Each row is made on its own from (seed, head, token), so that queries of a million tokens
// need not be kept and any row can be had again.
//
// Keys have all of it, for the heads of a group share them; what a query head seeks makes its kind.
// Half of the dimensions are a position, in pairs that turn with it: 5 of 8 pairs by the harmonics
// of a period of some 12,000 tokens, in weights that leave one peak, the others by periods of 128
// to 8,192 tokens. The other half is content: a mark of 4 sinks, two marks of heavy tokens (1.2% of
// all, of varying weight), and the topic of the stretch of 384 tokens that a token lies in. Sinks
// are nothing else, and heavy tokens have no position: those at a slash would outweigh everything.
// - lines: sinks, heavy tokens and distances of whole periods: vertical columns and slashes. Which
//   of the marks weighs more drifts with the row.
// - local: sinks and the tokens just before
// - blocks: all tokens of one topic, another one for each stretch of rows
// - diffuse: nothing but sinks; scores have a standard deviation of about 1
// Noise is on everything. Gains are such that what a head seeks has some 99.7% of a last row's
// mass whatever the length; the rest of it lies evenly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gpu/sparse/build_index.h"
#include "gpu/thread_team.h"
#include "proto/types.h"

namespace quarry::perf {

struct LayerShape {
  std::string_view name;
  uint32_t heads = 0, kv_heads = 0, head_dim = 0;
};
// llama-3-8b, phi-3-mini, and one for tests.
std::span<const LayerShape> LayerShapes();

enum class MadeHead { kLines, kLocal, kBlocks, kDiffuse };
std::string_view MadeHeadName(MadeHead kind);

// The query heads' kinds of the layers that are measured: all of one kind, by its name, or "mixed":
// of 8 heads 5 lines, and one of each other kind. Empty for another name.
std::vector<std::string> LayerKinds();
std::vector<MadeHead> MadeHeads(std::string_view kinds, uint32_t heads);

class MadeLayer {
 public:
  struct Options {
    LayerShape shape;
    DType dtype = DType::kBf16;
    uint32_t tokens = 0;
    uint32_t seed = 1;
  };
  // Makes K and V: 2 * kv_heads * tokens * head_dim elements.
  MadeLayer(const Options& options, ThreadTeam* team);
  MadeLayer(const MadeLayer&) = delete;
  MadeLayer& operator=(const MadeLayer&) = delete;

  const Options& options() const { return options_; }
  const LayerKv& kv() const { return kv_; }

  // q: [tokens.size()][heads][head_dim], rounded to the dtype, as attention rounds them: so its
  // sums can be compared with exact ones. kinds: [heads].
  void Queries(std::span<const MadeHead> kinds, std::span<const uint32_t> tokens, float* q,
               ThreadTeam* team) const;
  void Queries(std::span<const MadeHead> kinds, TokenRange rows, float* q, ThreadTeam* team) const;

 private:
  // How a query head weighs what there is: lengths of its parts.
  struct Gains {
    float comb = 0, near = 0, heavy = 0, sink = 0, topic = 0, noise = 0, phase = 0;
  };

  uint64_t Hash(uint32_t stream, uint32_t head, uint32_t token) const;
  // head_dim normal numbers.
  const float* Noise(uint32_t stream, uint32_t head, uint32_t token) const;
  uint32_t TopicOf(uint32_t stream, uint32_t head, uint32_t token) const;
  void Rotation(uint32_t kv_head, uint32_t token, float* out) const;
  void MakeKeyAndValue(uint32_t kv_head, uint32_t token, float* k, float* v) const;
  void MakeQueries(std::span<const Gains> gains, uint32_t token, float* q) const;
  Gains GainsOf(MadeHead kind, uint32_t head) const;
  void Round(const float* from, std::byte* to, size_t elements) const;

  const Options options_;
  const uint32_t pairs_, comb_pairs_, topics_;
  std::vector<float> noise_;
  std::vector<float> pair_weight_;          // [pairs], its root
  std::vector<std::vector<double>> turns_;  // [kv_heads][pairs], per token
  std::unique_ptr<std::byte[]> k_, v_;
  LayerKv kv_;
};

}  // namespace quarry::perf
