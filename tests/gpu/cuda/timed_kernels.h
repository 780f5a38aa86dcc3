// Sparse prefill's kernels, one at a time, by a path of choice.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <chrono>
#include <vector>

#include "gpu/cuda/cuda_sparse_kernels.h"

namespace quarry {

// Waits for all before each kernel and for the kernel, and adds its time up. Its stream is not the
// device's.
class TimedKernels final : public cuda::SparseKernels {
 public:
  explicit TimedKernels(cuda::AttentionPath path) : kernels_(cudaStreamPerThread, path) {}
  absl::Status Attend(const cuda::SparseArgs& a) override {
    tiles += Tiles(a);
    return Time(&attend, [&] { return kernels_.Attend(a); });
  }
  absl::Status Score(const cuda::ScoreArgs& a) override {
    return Time(&choose, [&] { return kernels_.Score(a); });
  }
  absl::Status Measure(const cuda::ChoiceArgs& a) override {
    return Time(&choose, [&] { return kernels_.Measure(a); });
  }
  absl::Status SeekBlocks(const cuda::SeekArgs& a) override {
    return Time(&choose, [&] { return kernels_.SeekBlocks(a); });
  }
  absl::Status ChooseBlocks(const cuda::ChoiceArgs& a) override {
    return Time(&choose, [&] { return kernels_.ChooseBlocks(a); });
  }
  absl::Status MeanKeys(const cuda::MeanArgs& a) override {
    return Time(&choose, [&] { return kernels_.MeanKeys(a); });
  }
  absl::Status PoolQueries(const cuda::PoolArgs& a) override {
    return Time(&choose, [&] { return kernels_.PoolQueries(a); });
  }
  absl::Status SumLastQueries(const cuda::LastQueryArgs& a) override {
    return Time(&sum, [&] { return kernels_.SumLastQueries(a); });
  }
  absl::Status ChooseLines(const cuda::KeepLinesArgs& a) override {
    return Time(&choose, [&] { return kernels_.ChooseLines(a); });
  }
  absl::Status EmitLines(const cuda::EmitLinesArgs& a) override {
    return Time(&index, [&] { return kernels_.EmitLines(a); });
  }
  absl::Status CountRowTiles(const cuda::IndexArgs& a) override {
    return Time(&index, [&] { return kernels_.CountRowTiles(a); });
  }
  absl::Status OrderItems(const cuda::IndexArgs& a) override {
    return Time(&index, [&] { return kernels_.OrderItems(a); });
  }
  void Reset() { attend = sum = choose = index = tiles = 0; }

  // Seconds of attention, of the last queries' sums, of choosing by them or of key blocks, and of
  // what makes lists of it.
  double attend = 0, sum = 0, choose = 0, index = 0;
  double tiles = 0;  // attended

 private:
  static double Tiles(const cuda::SparseArgs& a) {
    std::vector<uint32_t> each(size_t{a.heads} * a.row_tiles);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(
        cudaMemcpy(each.data(), a.tiles, each.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost),
        cudaSuccess);
    double sum = 0;
    for (const uint32_t n : each) sum += n;
    return sum;
  }
  template <typename F>
  static absl::Status Time(double* seconds, const F& f) {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const auto start = std::chrono::steady_clock::now();
    const absl::Status status = f();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    *seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return status;
  }

  cuda::CudaSparseKernels kernels_;
};

}  // namespace quarry
