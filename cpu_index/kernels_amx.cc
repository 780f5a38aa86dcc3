// AMX tiles for bf16 and fp16 keys and values; all else as AVX-512.
#include "cpu_index/attend_amx.h"
#include "cpu_index/coded_avx512.h"
#include "cpu_index/codes_avx512.h"
#include "cpu_index/rows_avx512.h"

namespace quarry::kernels {
namespace {

// Up to this many queries the vector kernels are faster than tiles where keys have to be staged.
// One query over bf16 at head_dim 48: 0.93 of the read bandwidth against 0.78 with tiles. fp16 is
// split into two parts: at eight queries, 0.58 against 0.52; at twelve, 0.44 against 0.49.
constexpr uint32_t kVectorQueriesBf16 = 1;
constexpr uint32_t kVectorQueriesFp16 = 8;

bool UsesTiles(const AttendRun& a) {
  if (a.dtype == kFp32) return false;
  if (a.dtype == kFp16) return a.queries > kVectorQueriesFp16;
  return a.queries > kVectorQueriesBf16 || a.head_dim % kChunkDims == 0;
}

size_t AttendScratchBytes(const AttendRun& a) {
  return UsesTiles(a) ? TileScratchBytes(a) : AttendScratch<Vector>::Bytes(a);
}

void AttendAmx(const AttendRun& a) {
  if (!UsesTiles(a)) return Attend<Vector, ScoreAvx512>(a);
  if (a.dtype == kBf16) return AttendWithTiles<kBf16>(a);
  AttendWithTiles<kFp16>(a);
}

constexpr uint32_t kStoreWork = 4;  // units of work per 16 tokens

// Scores [64 tokens][16 queries] of tokens from `first` on, scaled, into the rows of a.out.
void StoreTile(const ScoreTile& a, const float* scores, uint32_t first_token, uint32_t first_query,
               Fetcher* fetcher) {
  const __m512 scale = _mm512_set1_ps(a.scale);
  const uint32_t queries = a.queries - first_query < 16 ? a.queries - first_query : 16;
  for (uint32_t t = first_token; t < a.tokens && t < first_token + kTileTokens; t += 16) {
    __m512i rows[16], columns[16];
    for (uint32_t i = 0; i < 16; ++i) {
      rows[i] = _mm512_load_si512(scores + (t - first_token + i) * 16);
    }
    fetcher->Step<kStoreWork>();
    Transpose16(rows, columns);
    const uint32_t tokens = a.tokens - t < 16 ? a.tokens - t : 16;
    const __mmask16 mask = static_cast<__mmask16>((1u << tokens) - 1);
    for (uint32_t i = 0; i < queries; ++i) {
      const __m512 z = _mm512_mul_ps(_mm512_castsi512_ps(columns[i]), scale);
      _mm512_mask_storeu_ps(a.out + (first_query + i) * a.ld_out + t, mask, Vector::Clamp(z));
    }
  }
}

// Always tiles for bf16 keys, however few the queries, and never for others: a score must not
// depend on what else is in the batch, as budgets compare scores of different batches. One query
// loses little (0.85 against 0.88 of the read bandwidth), eight gain (0.84 against 0.57); fp16 keys
// gain nothing before sixteen.
void ScoreAmx(const ScoreTile& a) {
  if (a.dtype != kBf16) return ScoreAvx512(a);
  alignas(64) char queries[kMaxQueryParts * kMaxChunks * kTileBytes];
  alignas(64) char staging[kMaxChunks * 4 * kTileBytes];
  alignas(64) float scores[kTileTokens * kBlockQueries];
  const uint32_t q_parts = a.q_bf16 != nullptr ? 1 : kMaxQueryParts;
  const uint16_t* k = static_cast<const uint16_t*>(a.k);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (uint32_t q0 = 0; q0 < a.queries; q0 += kBlockQueries) {
    PackQueries(a.q, a.queries, a.head_dim, q_parts, q0, queries);
    for (uint32_t t0 = 0; t0 < a.tokens; t0 += kTileTokens) {
      const uint32_t tokens = a.tokens - t0 < kTileTokens ? a.tokens - t0 : kTileTokens;
      const uint16_t* at = k + size_t{t0} * a.head_dim;
      const void* next = t0 + tokens < a.tokens ? at + size_t{tokens} * a.head_dim : a.next;
      // One stream, as halves.
      const size_t half = next == nullptr || q0 > 0 ? 0 : size_t{kTileTokens} * a.head_dim;
      Fetcher fetcher(next, static_cast<const char*>(next) + half, half / 64,
                      ChunksOf(a.head_dim) * kScoreWork + kTileTokens / 16 * kStoreWork);
      ScoreTokens(ChunksOf(a.head_dim), q_parts,
                  KeysOf<kBf16, kTileTokens / 16>(at, a.head_dim, tokens, staging), queries, scores,
                  &fetcher);
      StoreTile(a, scores, t0, q0, &fetcher);
    }
  }
  _tile_release();
}

}  // namespace

const Table& AmxTable() {
  static constexpr Table kTable = {
      .name = "amx",
      .attend_scratch_bytes = AttendScratchBytes,
      .attend = AttendAmx,
      .attend_coded_scratch_bytes = CodedScratchBytesAvx512,
      .attend_coded = AttendCodedAvx512,
      .score = ScoreAmx,
      .accumulate = Accumulate<Vector>,
      .max = Max<Vector>,
      .exp_sum = ExpSum<Vector>,
      .scale = Scale<Vector>,
      .sum_codes = SumCodesAvx512,
      .score_nodes = ScoreNodesAvx512,
      .score_codes = ScoreCodesAvx512,
      .find_codes = FindCodesAvx512,
      .select = SelectAvx512,
      .exp_groups = ExpGroups<Vector>,
      .histogram = HistogramAvx512,
      .score_key_rows = ScoreKeyRowsAvx512,
      .add_value_rows = AddValueRowsAvx512,
      .measure_rows = MeasureRowsAvx512,
      .quantise = QuantiseAvx512,
  };
  return kTable;
}

}  // namespace quarry::kernels
