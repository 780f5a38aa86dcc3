// Sparse prefill's kernels, their own sources, on the imitation of a card.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "gpu/cuda/sparse_kernels.h"
#include "tests/gpu/cuda/imitated_warp.h"
// After the operations that they use.
#include "gpu/cuda/choosing.cuh"
#include "gpu/cuda/index_rows.cuh"
#include "gpu/cuda/key_scores.cuh"
#include "gpu/cuda/last_queries.cuh"
#include "gpu/cuda/line_lists.cuh"
#include "gpu/cuda/seek_blocks.cuh"
#include "gpu/cuda/sparse_attention.cuh"

namespace quarry::cuda {

// Memory at a multiple of 128 bytes; of a size alone, bytes that are NaNs of every dtype.
class AlignedMemory {
 public:
  explicit AlignedMemory(size_t bytes) : lines_(bytes / sizeof(Line) + 1) {
    std::memset(lines_.data(), 0xff, lines_.size() * sizeof(Line));
  }
  explicit AlignedMemory(std::span<const std::byte> bytes) : AlignedMemory(bytes.size()) {
    std::memcpy(lines_.data(), bytes.data(), bytes.size());
  }
  std::byte* data() { return lines_.data()->bytes; }
  const std::byte* data() const { return lines_.data()->bytes; }
  float* floats() { return reinterpret_cast<float*>(data()); }
  const float* floats() const { return reinterpret_cast<const float*>(data()); }

 private:
  struct alignas(128) Line {
    std::byte bytes[128];
  };
  std::vector<Line> lines_;
};

class ImitatedSparseKernels : public SparseKernels {
 public:
  explicit ImitatedSparseKernels(uint64_t seed) : random_(seed) {}

  absl::Status Attend(const SparseArgs& args) override {
    if (args.column_k != nullptr) {
      const Dim3 grid{2, args.heads, 1};
      Run(grid, kThreads, 0, [&](char*) { CompactColumns(args, kThreads); });
      Run(grid, kThreads, 0, [&](char*) { MaskColumns(args, kThreads); });
    }
    ForElement(args.dtype, args.head_dim, [&](auto element, auto head_dim) {
      using Tile = SparseTile<head_dim()>;
      Run({args.heads * args.row_tiles, 1, 1}, Tile::kThreads, Tile::kSharedBytes,
          [&](char* shared) { AttendRowTile<decltype(element), Tile>(args, shared); });
    });
    return absl::OkStatus();
  }
  absl::Status Score(const ScoreArgs& args) override {
    ForElement(args.dtype, args.head_dim, [&](auto element, auto head_dim) {
      using Tile = ScoreTile<head_dim()>;
      const uint32_t keys = Tile::kSteps * kKeyTile, queries = Tile::kQueries;
      Run({(args.keys + keys - 1) / keys, (args.queries + queries - 1) / queries,
           args.launched_heads},
          Tile::kThreads, Tile::kSharedBytes,
          [&](char* shared) { ScoreKeys<decltype(element), Tile>(args, shared); });
    });
    return absl::OkStatus();
  }
  absl::Status Measure(const ChoiceArgs& args) override {
    Run({args.queries, args.launched_heads, 1}, kThreads, kThreads * sizeof(ScoreSum),
        [&](char* shared) { MeasureScores(args, kThreads, reinterpret_cast<ScoreSum*>(shared)); });
    return absl::OkStatus();
  }
  absl::Status SeekBlocks(const SeekArgs& args) override {
    ForElement(args.dtype, args.head_dim, [&](auto element, auto head_dim) {
      using Tile = SeekTile<head_dim()>;
      Run({RowTilesOf(args.rows), args.launched_heads, 1}, Tile::kThreads, Tile::kSharedBytes,
          [&](char* shared) { cuda::SeekBlocks<decltype(element), Tile>(args, shared); });
    });
    return absl::OkStatus();
  }
  absl::Status ChooseBlocks(const ChoiceArgs& args) override {
    Run({RowTilesOf(args.rows), args.launched_heads, 1}, kThreads, sizeof(BlocksShared),
        [&](char* shared) {
          BlockChooser(args, kThreads, reinterpret_cast<BlocksShared*>(shared)).Run();
        });
    return absl::OkStatus();
  }
  absl::Status MeanKeys(const MeanArgs& args) override {
    ForElement(args.dtype, args.head_dim, [&](auto element, auto) {
      Run({args.blocks + RowTilesOf(args.rows), args.kv_heads, 1}, args.head_dim / 2, 0,
          [&](char*) { cuda::MeanKeys<decltype(element)>(args); });
    });
    return absl::OkStatus();
  }
  absl::Status PoolQueries(const PoolArgs& args) override {
    Run({2 * RowTilesOf(args.rows), args.heads, 1}, args.head_dim, 0,
        [&](char*) { cuda::PoolQueries(args); });
    return absl::OkStatus();
  }

  absl::Status SumLastQueries(const LastQueryArgs& args) override {
    ForElement(args.dtype, args.head_dim, [&](auto element, auto head_dim) {
      using T = decltype(element);
      using Tile = LastTile<head_dim()>;
      const Dim3 grid{StretchesOf(args.tokens), args.line_count / kLinesTogether, 1};
      Run(grid, Tile::kThreads, Tile::kMeasureBytes,
          [&](char* shared) { MeasureLastQueries<T, Tile>(args, shared); });
      constexpr uint32_t kJoining = 2 * kLastQueries;
      Run({args.line_count, 1, 1}, kJoining, kJoining * sizeof(ScoreSum),
          [&](char* shared) { JoinMeasures(args, kJoining, reinterpret_cast<ScoreSum*>(shared)); });
      Run(grid, Tile::kThreads, Tile::kSumBytes,
          [&](char* shared) { cuda::SumLastQueries<T, Tile>(args, shared); });
    });
    return absl::OkStatus();
  }
  absl::Status ChooseLines(const KeepLinesArgs& args) override {
    const uint32_t lines = args.tried.line_count;
    Run({std::max(args.tried.tries, 2u), lines, 1}, kTeam, sizeof(LineShared),
        [&](char* shared) { TryLines(args.tried, kTeam, reinterpret_cast<LineShared*>(shared)); });
    Run({lines, 1, 1}, kTeam, sizeof(LineShared),
        [&](char* shared) { KeepLines(args, kTeam, reinterpret_cast<LineShared*>(shared)); });
    return absl::OkStatus();
  }
  absl::Status EmitLines(const EmitLinesArgs& args) override {
    Run({args.line_count, 1, 1}, kThreads, 0, [&](char*) { cuda::EmitLines(args, kThreads); });
    return absl::OkStatus();
  }
  absl::Status CountRowTiles(const IndexArgs& args) override {
    Run({2, args.heads, 1}, kThreads, 0, [&](char*) { cuda::CountRowTiles(args, kThreads); });
    return absl::OkStatus();
  }
  absl::Status OrderItems(const IndexArgs& args) override {
    Run({1, 1, 1}, kTeam, sizeof(OrderShared), [&](char* shared) {
      cuda::OrderItems(args, kTeam, reinterpret_cast<OrderShared*>(shared));
    });
    return absl::OkStatus();
  }

 private:
  // A warp, and some of them where they work together.
  static constexpr uint32_t kThreads = 32, kTeam = 96;

  // f(element type, head_dim as a constant).
  template <typename F>
  static void ForElement(DType dtype, uint32_t head_dim, const F& f) {
    const auto with = [&](auto element) {
      if (head_dim == 64) {
        f(element, std::integral_constant<int, 64>());
      } else if (head_dim == 96) {
        f(element, std::integral_constant<int, 96>());
      } else {
        QUARRY_CHECK(head_dim == 128);
        f(element, std::integral_constant<int, 128>());
      }
    };
    QUARRY_CHECK(dtype != DType::kFp32);
    if (dtype == DType::kBf16) {
      with(Bf16());
    } else {
      with(Fp16());
    }
  }

  // body(shared memory) on every thread of every block; shared memory begins as NaNs.
  template <typename F>
  void Run(Dim3 grid, uint32_t threads, size_t shared_bytes, const F& body) {
    gridDim = grid;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          AlignedMemory shared(shared_bytes);
          ImitatedBlock block(static_cast<int>(threads), random_());
          block.Run([&] { body(reinterpret_cast<char*>(shared.data())); });
        }
      }
    }
  }

  std::mt19937_64 random_;
};

}  // namespace quarry::cuda
