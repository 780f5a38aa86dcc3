// Products of a few rows with weights as codes. A block's warps share kOutRows rows of the weights
// and take groups of kGroupCodes columns in turn; codes become elements of two bytes in registers,
// exactly, and are multiplied by the tensor cores, activations rounded to the same dtype. A sum
// over a group, or a row, is multiplied by its scale in fp32. The order of all sums is fixed.
//
// Included behind the operations that it uses: warp_ops.cuh, or an imitation of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/cuda/code_args.h"

namespace quarry::cuda {

// One instruction's: 16 rows of weights, 8 of activations.
constexpr uint32_t kOutRows = 16;
constexpr uint32_t kCodeWarps = 8;
constexpr uint32_t kCodeThreads = 32 * kCodeWarps;

// The lanes of a quad hold 32 columns of a group each, for rows lane / 4 and lane / 4 + 8 of the
// weights and row lane / 4 of the activations: columns are summed over, so which lane has which
// does not matter as long as weights and activations agree.
struct Int8Codes {
  static constexpr bool kScaledByGroup = false;
  static constexpr uint32_t kGroupBytes = kGroupCodes;
  static constexpr int kPieces = 2;  // of 16 bytes, of one row and group
  // Where piece i of a quad's lane begins, in bytes, and its columns.
  static __device__ uint32_t PieceAt(uint32_t quad_lane, int i) { return 64 * i + 16 * quad_lane; }
  static constexpr int kColumns = 16;  // of a piece
  static __device__ uint32_t ColumnAt(uint32_t quad_lane, int i) { return PieceAt(quad_lane, i); }
  // Elements 2 pair and 2 pair + 1 of a piece.
  template <typename Element>
  static __device__ uint32_t Pair(const uint4& piece, int pair) {
    const uint32_t word = WordOf(piece, pair / 2);
    return Element::Pack(ByteLess128(word, pair % 2 * 2), ByteLess128(word, pair % 2 * 2 + 1));
  }
};

struct Int4Codes {
  static constexpr bool kScaledByGroup = true;
  static constexpr uint32_t kGroupBytes = kGroupCodes / 2;
  static constexpr int kPieces = 1;
  static __device__ uint32_t PieceAt(uint32_t quad_lane, int) { return 16 * quad_lane; }
  static constexpr int kColumns = 32;
  static __device__ uint32_t ColumnAt(uint32_t quad_lane, int) { return 32 * quad_lane; }
  template <typename Element>
  static __device__ uint32_t Pair(const uint4& piece, int pair) {
    return Element::LessEight(WordOf(piece, pair / 4) >> (4 * (pair % 4)));
  }
};

// The activations of four columns from `column` on, rounded, as two pairs; zeros beyond the row.
template <typename Element>
__device__ void LoadFour(const CodeProductArgs& a, const float* row, uint32_t column,
                         uint32_t pairs[2]) {
  float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
  if (a.vectors) {
    if (column < a.w.in) x = *reinterpret_cast<const float4*>(row + column);
  } else {
    if (column < a.w.in) x.x = row[column];
    if (column + 1 < a.w.in) x.y = row[column + 1];
    if (column + 2 < a.w.in) x.z = row[column + 2];
    if (column + 3 < a.w.in) x.w = row[column + 3];
  }
  pairs[0] = Element::Pack(x.x, x.y);
  pairs[1] = Element::Pack(x.z, x.w);
}

template <typename Codes>
struct GroupCodes {
  uint4 rows[2][Codes::kPieces];
};

// The codes of one group that a lane has; rows of the weights may be the last one twice.
template <typename Codes>
__device__ GroupCodes<Codes> LoadCodes(const std::byte* const rows[2], uint32_t group,
                                       uint32_t quad_lane) {
  GroupCodes<Codes> out;
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < Codes::kPieces; ++i) {
      out.rows[r][i] =
          LoadOnce(rows[r] + group * Codes::kGroupBytes + Codes::PieceAt(quad_lane, i));
    }
  }
  return out;
}

// sums += the group's product; as an instruction spreads them over the lanes.
template <typename Element, typename Codes>
__device__ void MultiplyGroup(const CodeProductArgs& a, const GroupCodes<Codes>& codes,
                              const float* x, uint32_t group, uint32_t quad_lane, float sums[4]) {
#pragma unroll
  for (int i = 0; i < Codes::kPieces; ++i) {
    const uint32_t column = group * kGroupCodes + Codes::ColumnAt(quad_lane, i);
#pragma unroll
    for (int c = 0; c < Codes::kColumns / 4; ++c) {
      uint32_t activations[2] = {0, 0};
      if (x != nullptr) LoadFour<Element>(a, x, column + 4 * c, activations);
      const uint32_t weights[4] = {Codes::template Pair<Element>(codes.rows[0][i], 2 * c),
                                   Codes::template Pair<Element>(codes.rows[1][i], 2 * c),
                                   Codes::template Pair<Element>(codes.rows[0][i], 2 * c + 1),
                                   Codes::template Pair<Element>(codes.rows[1][i], 2 * c + 1)};
      Element::Multiply(sums, weights, activations[0], activations[1]);
    }
  }
}

// Block blockIdx.x has rows [kOutRows * blockIdx.x, ..) of the weights.
template <typename Element, typename Codes>
__device__ void MultiplyCodes(const CodeProductArgs& a, float (*shared)[32][4]) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t row = lane / 4, quad_lane = lane % 4;
  const uint32_t first = kOutRows * blockIdx.x;
  const uint32_t out_rows[2] = {min(first + row, a.w.out - 1), min(first + row + 8, a.w.out - 1)};
  const size_t row_bytes = size_t{a.w.groups} * Codes::kGroupBytes;
  const std::byte* const codes[2] = {a.w.codes + out_rows[0] * row_bytes,
                                     a.w.codes + out_rows[1] * row_bytes};
  const float* const x = row < a.rows ? a.x + size_t{row} * a.w.in : nullptr;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  // The next group's codes are on their way while one is multiplied.
  GroupCodes<Codes> next = {};
  if (warp < a.w.groups) next = LoadCodes<Codes>(codes, warp, quad_lane);
  for (uint32_t group = warp; group < a.w.groups; group += kCodeWarps) {
    const GroupCodes<Codes> now = next;
    if (group + kCodeWarps < a.w.groups) {
      next = LoadCodes<Codes>(codes, group + kCodeWarps, quad_lane);
    }
    if constexpr (Codes::kScaledByGroup) {
      float of_group[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      MultiplyGroup<Element, Codes>(a, now, x, group, quad_lane, of_group);
      for (int i = 0; i < 4; ++i) {
        const size_t at = size_t{out_rows[i / 2]} * a.w.groups + group;
        sums[i] += Bf16AsFloat(a.w.scales[at]) * of_group[i];
      }
    } else {
      MultiplyGroup<Element, Codes>(a, now, x, group, quad_lane, sums);
    }
  }
  for (int i = 0; i < 4; ++i) shared[warp][lane][i] = sums[i];
  __syncthreads();
  // Thread t has row t % 16 of the weights and t / 16 of the activations.
  const uint32_t of = threadIdx.x % kOutRows, of_x = threadIdx.x / kOutRows;
  if (of_x >= a.rows || first + of >= a.w.out) return;
  const uint32_t from_lane = of % 8 * 4 + of_x / 2, from = of / 8 * 2 + of_x % 2;
  float sum = 0.0f;
  for (uint32_t w = 0; w < kCodeWarps; ++w) sum += shared[w][from_lane][from];
  if constexpr (!Codes::kScaledByGroup) sum *= Bf16AsFloat(a.w.scales[first + of]);
  float* const y = a.y + size_t{of_x} * a.w.out + first + of;
  *y = a.adds ? *y + sum : sum;
}

}  // namespace quarry::cuda
