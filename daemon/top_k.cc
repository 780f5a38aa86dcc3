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

// Exact scores of tokens whose keys are turned alike, for the query heads of one KV head's group.
void ScorePiece(const TopKQuery& query, uint32_t first_head, TokenRange tokens,
                CoarseScores* scores) {
  const KvShape& s = *query.shape;
  const uint32_t group = s.group();
  const uint32_t block_number = tokens.lo / kBlockTokens;
  const KvSegments segments(s, query.layer, (query.first_head + first_head) / group, tokens,
                            &query.table->blocks[block_number], block_number);
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
  ExactScan().Score(segments.view(), block, scores);
}

}  // namespace

TopKAnswer ExactTopK(const TopKQuery& query) {
  TopKAnswer answer;
  answer.heads.resize(query.heads);
  answer.shifted_tokens = query.table->PlacedTokens(query.range);
  if (query.k == 0) return answer;
  const uint32_t group = query.shape->group();
  CoarseScores scores;
  for (uint32_t h = 0; h < query.heads; h += group) {
    for (uint32_t lo = query.range.lo; lo < query.range.hi;) {
      const auto hi = static_cast<uint32_t>(std::min<uint64_t>(
          {query.range.hi, uint64_t{lo} + query.task_tokens, query.table->NextEdge(lo)}));
      ScorePiece(query, h, {lo, hi}, &scores);
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
