#include "daemon/top_k.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu_index/key_index.h"
#include "daemon/kv_segments.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Better entries first: higher score, then earlier token.
bool Better(const TopKEntry& a, const TopKEntry& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

// Keeps the k best entries as a heap whose front is the worst of them.
void Offer(const TopKEntry& entry, uint32_t k, std::vector<TopKEntry>* heap) {
  if (heap->size() < k) {
    heap->push_back(entry);
    std::push_heap(heap->begin(), heap->end(), Better);
  } else if (Better(entry, heap->front())) {
    std::pop_heap(heap->begin(), heap->end(), Better);
    heap->back() = entry;
    std::push_heap(heap->begin(), heap->end(), Better);
  }
}

// Exact scores of tokens whose keys are turned alike, for the query heads of one KV head's group.
absl::Status ScorePiece(const TopKQuery& query, uint32_t first_head, TokenRange tokens,
                        CoarseScores* scores) {
  const KvShape& s = *query.shape;
  const uint32_t group = s.group();
  const uint32_t block_number = tokens.lo / kBlockTokens;
  KvSegments segments(s, query.layer, (query.first_head + first_head) / group, tokens,
                      &query.table->blocks[block_number], block_number);
  const KvView* const rows = segments.Whole();
  if (rows == nullptr) return segments.status();
  const std::vector<TokenRange> ranges(group, tokens);
  QueryBlock block;
  block.q = query.q + size_t{first_head} * s.head_dim;
  block.q_dtype = query.q_dtype;
  block.queries = group;
  block.head_dim = s.head_dim;
  block.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  block.ranges = ranges;
  std::vector<float> turned;
  if (const Rotation* turn = query.table->TurnAt(tokens.lo); turn != nullptr) {
    turned.assign(block.q, block.q + size_t{group} * s.head_dim);
    turn->TurnQueries(turned.data(), group, s.head_dim);
    block.q = turned.data();
    block.q_dtype = DType::kFp32;
  }
  ExactScan().Score(*rows, block, scores);
  return absl::OkStatus();
}

// Adds K and V of the entries of a head to the answer.
absl::Status GatherHead(const TopKQuery& query, uint32_t head, TopKAnswer* answer) {
  const KvShape& s = *query.shape;
  const std::vector<TopKEntry>& entries = answer->heads[head];
  if (entries.empty()) return absl::OkStatus();
  const size_t vector_bytes = s.vector_bytes();
  const uint32_t kv_head = (query.first_head + head) / s.group();
  const uint32_t first_block = query.range.lo / kBlockTokens;
  KvSegments segments(s, query.layer, kv_head, query.range, &query.table->blocks[first_block],
                      first_block);
  std::vector<uint32_t> tokens;
  for (const TopKEntry& entry : entries) tokens.push_back(entry.token);
  std::sort(tokens.begin(), tokens.end());
  std::vector<std::byte> k(tokens.size() * vector_bytes), v(k.size());
  if (!segments.Fetch(tokens, k.data(), v.data())) return segments.status();
  for (const TopKEntry& entry : entries) {
    const size_t row = static_cast<size_t>(
        std::lower_bound(tokens.begin(), tokens.end(), entry.token) - tokens.begin());
    std::byte* const key = k.data() + row * vector_bytes;
    if (const Rotation* turn = query.table->TurnAt(entry.token); turn != nullptr) {
      turn->TurnStoredKeys(key, 1, s.head_dim, s.dtype);
    }
    answer->k[head].append(reinterpret_cast<const char*>(key), vector_bytes);
    answer->v[head].append(reinterpret_cast<const char*>(v.data() + row * vector_bytes),
                           vector_bytes);
  }
  return absl::OkStatus();
}

}  // namespace

TopKAnswer ExactTopK(const TopKQuery& query, bool gather) {
  TopKAnswer answer;
  answer.heads.resize(query.heads);
  answer.shifted_tokens = query.table->PlacedTokens(query.range);
  if (gather) {
    answer.k.resize(query.heads);
    answer.v.resize(query.heads);
  }
  if (query.k == 0) return answer;
  const uint32_t group = query.shape->group();
  CoarseScores scores;
  for (uint32_t h = 0; h < query.heads; h += group) {
    for (uint32_t lo = query.range.lo; lo < query.range.hi;) {
      const auto hi = static_cast<uint32_t>(std::min<uint64_t>(
          {query.range.hi, uint64_t{lo} + query.task_tokens, query.table->NextEdge(lo)}));
      answer.status = ScorePiece(query, h, {lo, hi}, &scores);
      if (!answer.status.ok()) return answer;
      for (uint32_t g = 0; g < group; ++g) {
        const float* const row = scores.score.data() + size_t{g} * scores.nodes;
        for (uint32_t t = 0; t < hi - lo; ++t) {
          Offer({lo + t, row[t]}, query.k, &answer.heads[h + g]);
        }
      }
      lo = hi;
    }
  }
  for (auto& entries : answer.heads) std::sort_heap(entries.begin(), entries.end(), Better);
  for (uint32_t h = 0; gather && h < query.heads && answer.status.ok(); ++h) {
    answer.status = GatherHead(query, h, &answer);
  }
  return answer;
}

}  // namespace quarry
