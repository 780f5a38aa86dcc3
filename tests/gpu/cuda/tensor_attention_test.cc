// The tensor kernel's own source, run on an imitation of a card, against a double reference: which
// lane has what, what is masked, where parts and splits begin and end, what is copied when.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/cuda/imitated_warp.h"
// After the operations that it uses.
#include "gpu/cuda/placed_attention.cuh"
#include "gpu/cuda/tensor_attention.cuh"
#include "proto/types.h"
#include "tests/support/seed.h"

namespace quarry::cuda {
namespace {

struct Case {
  uint32_t heads, kv_heads, first_token, rows, window;
  std::vector<TokenRange> held;
  uint32_t splits = 1;
};

class TensorAttentionTest : public ::testing::Test {
 protected:
  using Values = std::vector<float>;
  struct alignas(16) Chunk {
    std::byte bytes[16];
  };
  template <size_t kBytes>
  struct alignas(128) Shared {
    char bytes[kBytes];
  };
  // K or V of a part at a multiple of 16 bytes, NaNs around it.
  struct Side {
    Values values;  // [kv_head][token][head_dim]
    std::vector<Chunk> memory;
    const std::byte* at;
  };

  Values Random(size_t n, float size) {
    std::normal_distribution<float> normal(0.0f, size);
    Values out(n);
    for (float& x : out) x = normal(random_);
    return out;
  }

  Side MakeSide(DType dtype, size_t heads, size_t head_elements, size_t stride) {
    Side side;
    const size_t skip = 1 + random_() % 9;
    side.memory.resize(skip + heads * stride / 16 + 1);
    std::memset(side.memory.data(), 0xff, side.memory.size() * 16);
    std::byte* const at = side.memory[skip].bytes;
    side.at = at;
    side.values = Random(heads * head_elements, 1.5f);
    for (size_t i = 0; i < side.values.size(); ++i) {
      std::byte* const head = at + i / head_elements * stride;
      StoreFromFloat(head, i % head_elements, dtype, side.values[i]);
      side.values[i] = LoadAsFloat(head, i % head_elements, dtype);
    }
    return side;
  }

  struct Attended {
    Values q;  // as the kernel rounds them
    Values o, lse;
  };
  // By a launch of so many members that are like `c`; args has their parts, and places if any.
  template <typename T, DType kDType, int kHeadDim, int kRowTiles>
  Attended Launch(const Case& c, uint32_t members, AttentionArgs args) {
    using Tile = TensorTile<kHeadDim, kRowTiles>;
    args.heads = c.heads;
    args.group = c.heads / c.kv_heads;
    args.head_dim = kHeadDim;
    args.rows = c.rows;
    args.first_token = c.first_token;
    args.window = c.window;
    args.splits = c.splits;
    args.members = members;
    args.vector_bytes = size_t{kHeadDim} * DTypeBytes(kDType);
    args.scale_log2 = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(kHeadDim));
    const size_t vectors = size_t{members} * c.rows * c.heads;
    Attended out{Random(vectors * kHeadDim, 2.0f), Values(c.splits * vectors * kHeadDim, NAN),
                 Values(c.splits * vectors, NAN)};
    std::vector<float4> aligned_q(out.q.size() / 4);
    std::memcpy(aligned_q.data(), out.q.data(), out.q.size() * sizeof(float));
    args.q = &aligned_q.data()->x;
    for (float& x : out.q) {
      std::byte stored[2];
      StoreFromFloat(stored, 0, kDType, x);
      x = LoadAsFloat(stored, 0, kDType);
    }
    args.o = out.o.data();
    args.lse = out.lse.data();
    gridDim = {(c.rows * args.group + Tile::kQueries - 1) / Tile::kQueries, c.kv_heads,
               members * c.splits};
    const auto shared = std::make_unique<Shared<Tile::kSharedBytes>>();
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
          std::memset(shared->bytes, 0xff, Tile::kSharedBytes);
          ImitatedBlock block(Tile::kThreads, random_());
          block.Run([&] {
            AttendTile<T, Tile>(args.place != nullptr ? Placed(args) : args, shared->bytes);
          });
        }
      }
    }
    return out;
  }

  // K and V of tokens, and where they are told to be.
  AttentionPart MakePart(DType dtype, const Case& c, uint32_t head_dim, TokenRange tokens,
                         std::vector<Side>* keys, std::vector<Side>* values) {
    const size_t elements = size_t{tokens.size()} * head_dim;
    const size_t stride = elements * 2 + 16 * (random_() % 5);
    keys->push_back(MakeSide(dtype, c.kv_heads, elements, stride));
    values->push_back(MakeSide(dtype, c.kv_heads, elements, stride));
    return {keys->back().at, values->back().at, stride, tokens.lo, tokens.hi};
  }

  template <typename T, DType kDType, int kHeadDim, int kRowTiles>
  void Run(const Case& c) {
    AttentionArgs args = {};
    std::vector<Side> keys, values;
    for (const TokenRange& range : c.held) {
      args.parts[args.part_count++] = MakePart(kDType, c, kHeadDim, range, &keys, &values);
    }
    const Attended got = Launch<T, kDType, kHeadDim, kRowTiles>(c, 1, args);
    Compare(c, kHeadDim, Limit(kDType), got.q, keys, values, got.o, got.lse);
  }

  static double Limit(DType dtype) { return dtype == DType::kBf16 ? 1e-2 : 1.5e-3; }

  static void Compare(const Case& c, uint32_t head_dim, double limit, const Values& q,
                      const std::vector<Side>& keys, const std::vector<Side>& values,
                      const Values& o, const Values& lse) {
    const size_t vectors = size_t{c.rows} * c.heads;
    for (size_t i = 0; i < vectors; ++i) {
      const auto row = static_cast<uint32_t>(i / c.heads);
      const size_t kv_head = i % c.heads / (c.heads / c.kv_heads);
      const uint32_t hi = c.first_token + row + 1;
      const TokenRange visible{c.window != 0 && hi > c.window ? hi - c.window : 0, hi};
      double sum = 0;
      std::vector<double> want(head_dim, 0.0), got(head_dim, 0.0);
      for (size_t p = 0; p < c.held.size(); ++p) {
        const TokenRange seen = Intersect(c.held[p], visible);
        for (uint32_t t = seen.lo; t < seen.hi; ++t) {
          const size_t at = (kv_head * c.held[p].size() + t - c.held[p].lo) * head_dim;
          double z = 0;
          for (uint32_t d = 0; d < head_dim; ++d) {
            z += double{q[i * head_dim + d]} * keys[p].values[at + d];
          }
          const double weight = std::exp(z / std::sqrt(double{1} * head_dim));
          sum += weight;
          for (uint32_t d = 0; d < head_dim; ++d) want[d] += weight * values[p].values[at + d];
        }
      }
      // The splits' partials together.
      double got_sum = 0;
      for (uint32_t s = 0; s < c.splits; ++s) {
        const size_t at = s * vectors + i;
        ASSERT_FALSE(std::isnan(lse[at])) << "vector " << i << " split " << s;
        const double weight = std::exp(double{lse[at]});
        got_sum += weight;
        for (uint32_t d = 0; d < head_dim; ++d) {
          ASSERT_TRUE(std::isfinite(lse[at]) || o[at * head_dim + d] == 0.0f);
          got[d] += weight * o[at * head_dim + d];
        }
      }
      if (sum == 0) {
        ASSERT_EQ(got_sum, 0) << "vector " << i;
        continue;
      }
      ASSERT_NEAR(std::log(got_sum), std::log(sum), 1e-4) << "vector " << i;
      double error = 0, size = 0;
      for (uint32_t d = 0; d < head_dim; ++d) {
        error += std::pow(got[d] / got_sum - want[d] / sum, 2);
        size += std::pow(want[d] / sum, 2);
      }
      ASSERT_LE(std::sqrt(error / size), limit) << "vector " << i;
    }
  }

  // Cases alike but for their places and what is held, done by one launch: the last range held is
  // of the growing part, whose memory begins some tokens before it.
  template <typename T, DType kDType, int kHeadDim, int kRowTiles>
  void RunTogether(const std::vector<Case>& cases) {
    AttentionArgs args = {};
    args.part_count = kPlacedParts;
    std::vector<std::vector<Side>> keys(cases.size()), values(cases.size());
    std::vector<DevicePlace> places;
    for (size_t m = 0; m < cases.size(); ++m) {
      const Case& c = cases[m];
      AttentionPart* to = args.parts + (m + 1) * kPlacedParts - c.held.size();
      for (const TokenRange& range : c.held) {
        *to++ = MakePart(kDType, c, kHeadDim, range, &keys[m], &values[m]);
      }
      // Nobody looks at what is said here of the growing part's tokens.
      AttentionPart& last = *(to - 1);
      const auto slot = static_cast<uint32_t>(random_() % 5);
      const size_t before = slot * size_t{kHeadDim} * DTypeBytes(kDType);
      last.k -= before;
      last.v -= before;
      last.hi = last.lo;
      places.push_back({c.first_token, last.lo, slot});
    }
    args.place = places.data();
    const Case& first = cases.front();
    const auto members = static_cast<uint32_t>(cases.size());
    const Attended got = Launch<T, kDType, kHeadDim, kRowTiles>(first, members, args);
    const size_t vectors = size_t{first.rows} * first.heads;
    const auto take = [](const Values& from, size_t at, size_t n, Values* to) {
      const auto begin = from.begin() + static_cast<ptrdiff_t>(at);
      to->insert(to->end(), begin, begin + static_cast<ptrdiff_t>(n));
    };
    for (size_t m = 0; m < cases.size(); ++m) {
      SCOPED_TRACE("member " + std::to_string(m));
      Attended own;
      take(got.q, m * vectors * kHeadDim, vectors * kHeadDim, &own.q);
      for (size_t s = 0; s < first.splits; ++s) {
        const size_t at = (s * members + m) * vectors;
        take(got.o, at * kHeadDim, vectors * kHeadDim, &own.o);
        take(got.lse, at, vectors, &own.lse);
      }
      Compare(cases[m], kHeadDim, Limit(kDType), own.q, keys[m], values[m], own.o, own.lse);
    }
  }

  template <int kHeadDim, int kRowTiles>
  void RunBoth(const Case& c) {
    SCOPED_TRACE("head_dim " + std::to_string(kHeadDim) + ", " + std::to_string(kRowTiles) +
                 " row tiles, rows [" + std::to_string(c.first_token) + ", +" +
                 std::to_string(c.rows) + "), " + std::to_string(c.splits) + " splits");
    Run<Bf16, DType::kBf16, kHeadDim, kRowTiles>(c);
    Run<Fp16, DType::kFp16, kHeadDim, kRowTiles>(c);
  }
  void RunAll(const Case& c) {
    RunBoth<64, 1>(c);
    RunBoth<64, 2>(c);
    RunBoth<96, 1>(c);
    RunBoth<96, 2>(c);
    RunBoth<128, 1>(c);
    RunBoth<128, 2>(c);
  }

  std::mt19937_64 random_{Seed()};
};

TEST_F(TensorAttentionTest, OneTokenAndOneTile) {
  RunAll({1, 1, 0, 1, 0, {{0, 1}}});
  RunAll({1, 1, 63, 1, 0, {{0, 64}}});
}

TEST_F(TensorAttentionTest, APrefillInGroups) {
  RunAll({8, 2, 0, 70, 0, {{0, 70}}});
  RunBoth<128, 2>({3, 1, 0, 101, 0, {{0, 101}}});
  RunBoth<96, 1>({2, 2, 0, 130, 0, {{0, 130}}});
}

TEST_F(TensorAttentionTest, OffsetsWindowsAndGaps) {
  RunAll({4, 1, 200, 37, 0, {{0, 70}, {131, 237}}});
  RunAll({4, 2, 300, 33, 90, {{0, 16}, {215, 333}}});
  RunAll({2, 1, 90, 33, 20, {{0, 16}, {95, 123}}});  // the first rows see nothing
  RunAll({2, 2, 10, 3, 0, {}});
  RunAll({2, 1, 0, 5, 0, {{7, 7}, {9, 9}}});
}

TEST_F(TensorAttentionTest, DecodesInSplits) {
  for (const uint32_t splits : {2u, 3u, 7u, 40u}) {  // more splits than tiles: some are empty
    RunBoth<128, 1>({8, 2, 999, 1, 0, {{0, 128}, {500, 1000}}, splits});
    RunBoth<64, 1>({7, 1, 400, 2, 0, {{0, 402}}, splits});
    RunBoth<96, 1>({4, 4, 400, 3, 0, {{0, 3}, {5, 6}, {100, 403}}, splits});
  }
}

TEST_F(TensorAttentionTest, ManySmallParts) {
  Case c{4, 1, 0, 40, 0, {}, 2};
  uint32_t token = 0;
  for (uint32_t p = 0; p < kMaxAttentionParts; ++p) {
    token += static_cast<uint32_t>(random_() % 6);
    c.held.push_back({token, token + static_cast<uint32_t>(random_() % 10)});
    token = c.held.back().hi;
  }
  c.first_token = token - 40;
  RunBoth<64, 2>(c);
  RunBoth<128, 1>(c);
}

// Members with and without a first part, of other lengths; some splits of the short ones are empty.
TEST_F(TensorAttentionTest, SequencesOfABatchAreAttendedAtOnce) {
  for (const uint32_t splits : {1u, 2u, 5u}) {
    for (const uint32_t window : {0u, 150u}) {
      const std::vector<Case> cases = {{8, 2, 300, 1, window, {{40, 301}}, splits},
                                       {8, 2, 75, 1, window, {{0, 16}, {60, 76}}, splits},
                                       {8, 2, 700, 1, window, {{0, 100}, {188, 701}}, splits},
                                       {8, 2, 0, 1, window, {{0, 1}}, splits}};
      RunTogether<Bf16, DType::kBf16, 128, 1>(cases);
      RunTogether<Fp16, DType::kFp16, 64, 1>(cases);
    }
  }
  // Rows that fill several tiles of queries.
  const std::vector<Case> several = {{24, 1, 97, 6, 0, {{0, 20}, {33, 103}}, 2},
                                     {24, 1, 194, 6, 0, {{100, 200}}, 2}};
  RunTogether<Bf16, DType::kBf16, 96, 1>(several);
  RunTogether<Bf16, DType::kBf16, 96, 2>(several);
}

}  // namespace
}  // namespace quarry::cuda
