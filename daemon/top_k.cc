#include "daemon/top_k.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_index/key_index.h"
#include "daemon/kv_segments.h"

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

// Of the tokens from `lo` on that are scanned at a time: all with keys that are turned alike.
uint32_t EndOfPiece(const TopKQuery& query, uint32_t lo) {
  auto hi =
      static_cast<uint32_t>(std::min<uint64_t>(query.range.hi, uint64_t{lo} + query.task_tokens));
  for (const PlacedStretch& stretch : query.table->placed) {
    for (const uint32_t edge : {stretch.tokens.lo, stretch.tokens.hi}) {
      if (edge > lo) hi = std::min(hi, edge);
    }
  }
  return hi;
}

}  // namespace

TopKAnswer ExactTopK(const TopKQuery& query) {
  TopKAnswer answer;
  answer.heads.resize(query.heads);
  if (query.k == 0) return answer;
  const KvShape& s = *query.shape;
  const uint32_t group = s.group();
  CoarseScores scores;
  std::vector<float> turned;
  for (uint32_t h = 0; h < query.heads; h += group) {
    for (uint32_t lo = query.range.lo; lo < query.range.hi;) {
      const uint32_t hi = EndOfPiece(query, lo);
      const KvSegments segments(s, query.layer, (query.first_head + h) / group, {lo, hi},
                                &query.table->blocks[lo / kBlockTokens], lo / kBlockTokens);
      const std::vector<TokenRange> ranges(group, TokenRange{lo, hi});
      QueryBlock block;
      block.q = query.q + size_t{h} * s.head_dim;
      block.q_dtype = query.q_dtype;
      block.queries = group;
      block.head_dim = s.head_dim;
      if (const Rotation* turn = query.table->TurnAt(lo); turn != nullptr) {
        turned.assign(block.q, block.q + size_t{group} * s.head_dim);
        turn->TurnQueries(turned.data(), group, s.head_dim);
        block.q = turned.data();
        block.q_dtype = DType::kFp32;
      }
      block.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
      block.ranges = ranges;
      ExactScan().Score(segments.view(), block, &scores);
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
  return answer;
}

void GatherTopK(const TopKQuery& query, TopKAnswer* answer) {
  const KvShape& s = *query.shape;
  const size_t vector_bytes = s.vector_bytes();
  answer->k.resize(query.heads);
  answer->v.resize(query.heads);
  for (uint32_t h = 0; h < query.heads; ++h) {
    const uint32_t kv_head = (query.first_head + h) / s.group();
    for (const TopKEntry& entry : answer->heads[h]) {
      const std::byte* const data = query.table->blocks[entry.token / kBlockTokens]->data() +
                                    (entry.token % kBlockTokens) * vector_bytes;
      const auto append = [&](KvPart part, std::string* out) {
        out->append(
            reinterpret_cast<const char*>(data + s.strip_offset(query.layer, part, kv_head)),
            vector_bytes);
      };
      append(KvPart::kKey, &answer->k[h]);
      if (const Rotation* turn = query.table->TurnAt(entry.token); turn != nullptr) {
        char* const key = answer->k[h].data() + answer->k[h].size() - vector_bytes;
        turn->TurnStoredKeys(key, 1, s.head_dim, s.dtype);
      }
      append(KvPart::kValue, &answer->v[h]);
    }
  }
}

}  // namespace quarry
