/* C11, without extensions: what an engine written in C does. */
#include "tests/client/c_session.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "client/quarry.h"

enum { kLayers = 2, kHeads = 4, kKvHeads = 2, kDim = 16, kTokens = 300, kMaxTokens = 600 };
enum { kRow = kKvHeads * kDim };

static char problem[512];

/* Leaves the function with the place and the library's text when `condition` does not hold. */
#define EXPECT(condition)                                                                    \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      snprintf(problem, sizeof(problem), "%s:%d: %s (last error: %s)", __FILE__, __LINE__,   \
               #condition, quarry_last_error());                                             \
      return problem;                                                                        \
    }                                                                                        \
  } while (0)

static float inv_freq[kDim / 2];
static uint32_t ids[kTokens];
static float k[kLayers][kTokens * kRow], v[kLayers][kTokens * kRow];

static quarry_model fill(void) {
  quarry_model model;
  memset(&model, 0, sizeof(model));
  model.struct_bytes = sizeof(model);
  model.name = "c-model";
  model.layers = kLayers;
  model.heads = kHeads;
  model.kv_heads = kKvHeads;
  model.head_dim = kDim;
  model.kv_dtype = QUARRY_FP32;
  memset(model.weights_digest, 0xc1, sizeof(model.weights_digest));
  model.rope_inv_freq = inv_freq;
  model.rope_rotary_dim = kDim;
  model.rope_attention_scale = 1.0f;
  for (int i = 0; i < kDim / 2; ++i) inv_freq[i] = 1.0f / (float)(1 << i);
  uint32_t state = 12345;
  for (int t = 0; t < kTokens; ++t) ids[t] = (uint32_t)(7 * t + 1);
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int i = 0; i < kTokens * kRow; ++i) {
      state = state * 1664525u + 1013904223u;
      k[layer][i] = (float)(state >> 8) / (float)(1 << 24) - 0.5f;
      state = state * 1664525u + 1013904223u;
      v[layer][i] = (float)(state >> 8) / (float)(1 << 24) - 0.5f;
    }
  }
  return model;
}

/* Exact attention of one head over tokens [lo, hi) of a layer, in double. */
static double reference(int layer, int head, const float* q, int lo, int hi, double* o) {
  const int kv = head / (kHeads / kKvHeads);
  double largest = -INFINITY, sum = 0, score[kTokens];
  for (int t = lo; t < hi; ++t) {
    score[t] = 0;
    for (int d = 0; d < kDim; ++d) score[t] += (double)q[d] * k[layer][t * kRow + kv * kDim + d];
    score[t] /= sqrt((double)kDim);
    if (score[t] > largest) largest = score[t];
  }
  for (int d = 0; d < kDim; ++d) o[d] = 0;
  for (int t = lo; t < hi; ++t) {
    const double weight = exp(score[t] - largest);
    sum += weight;
    for (int d = 0; d < kDim; ++d) o[d] += weight * v[layer][t * kRow + kv * kDim + d];
  }
  for (int d = 0; d < kDim; ++d) o[d] /= sum;
  return largest + log(sum);
}

static const char* check_answer(const quarry_answer* answer, const float* q, int layer, int lo,
                                int hi) {
  EXPECT(answer->code == 0);
  EXPECT(answer->covered_lo == (uint32_t)lo && answer->covered_hi == (uint32_t)hi);
  EXPECT(answer->tokens_attended == (uint64_t)(hi - lo) * kHeads);
  for (int head = 0; head < kHeads; ++head) {
    double o[kDim];
    const double lse = reference(layer, head, q + head * kDim, lo, hi, o);
    EXPECT(fabs(answer->lse[head] - lse) < 1e-4);
    for (int d = 0; d < kDim; ++d) EXPECT(fabs(answer->o[head * kDim + d] - o[d]) < 1e-4);
  }
  return NULL;
}

/* The same query at each layer in one message, started and awaited. */
static const char* attend(quarry_client* client, uint64_t context) {
  float q[kHeads * kDim], o[kLayers][kHeads * kDim], lse[kLayers][kHeads];
  quarry_row rows[kLayers];
  quarry_answer answers[kLayers];
  memset(rows, 0, sizeof(rows));
  memset(answers, 0, sizeof(answers));
  for (int i = 0; i < kHeads * kDim; ++i) q[i] = (float)(i % 11) / 5.0f - 1.0f;
  for (int layer = 0; layer < kLayers; ++layer) {
    rows[layer].struct_bytes = sizeof(quarry_row);
    rows[layer].context = context;
    rows[layer].layer = (uint32_t)layer;
    rows[layer].token_lo = 3;
    rows[layer].token_hi = kTokens;
    rows[layer].heads = kHeads;
    rows[layer].q_dtype = QUARRY_FP32;
    rows[layer].q = q;
    answers[layer].o = o[layer];
    answers[layer].lse = lse[layer];
  }
  quarry_attend* started;
  quarry_arm(client, 1);
  EXPECT(quarry_attend_start(client, rows, kLayers, answers, &started) == 0);
  EXPECT(quarry_attend_wait(started) == 0);
  quarry_arm(client, 0);
  for (int layer = 0; layer < kLayers; ++layer) {
    const char* wrong = check_answer(&answers[layer], q, layer, 3, kTokens);
    if (wrong != NULL) return wrong;
  }

  uint32_t tokens[kHeads * 5], found = 0;
  float scores[kHeads * 5];
  EXPECT(quarry_top_k(client, &rows[0], 5, tokens, scores, &found) == 0);
  EXPECT(found == 5);
  for (int i = 1; i < 5; ++i) EXPECT(scores[i] <= scores[i - 1]);
  EXPECT(tokens[0] >= 3 && tokens[0] < kTokens);

  /* A row that is wrong does not spoil the others. */
  rows[1].token_hi = kTokens + 1;
  EXPECT(quarry_attend_rows(client, rows, kLayers, answers) == 0);
  EXPECT(answers[0].code == 0);
  EXPECT(answers[1].code == 3);
  return NULL;
}

static const char* append_all(quarry_client* client, uint64_t context) {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    EXPECT(quarry_append(client, context, layer, kKvHeads, 0, 100, k[layer], v[layer]) == 0);
    /* The rest head by head, as two processes of a tensor-parallel engine do. */
    for (uint32_t head = 0; head < kKvHeads; ++head) {
      static float part_k[(kTokens - 100) * kDim], part_v[(kTokens - 100) * kDim];
      for (int t = 100; t < kTokens; ++t) {
        memcpy(part_k + (t - 100) * kDim, k[layer] + t * kRow + head * kDim, kDim * sizeof(float));
        memcpy(part_v + (t - 100) * kDim, v[layer] + t * kRow + head * kDim, kDim * sizeof(float));
      }
      EXPECT(quarry_append_heads(client, context, layer, head, 1, 100, kTokens, part_k, part_v) ==
             0);
    }
  }
  return NULL;
}

const char* c_opens_appends_attends_and_reads(const char* socket) {
  const quarry_model model = fill();
  quarry_client* client;
  EXPECT(quarry_abi_version() == QUARRY_ABI_VERSION);
  EXPECT(quarry_connect(socket, "c-session", 0, 20000, &client) == 0);
  uint64_t context, fork, pinned;
  uint32_t reused = 77;
  EXPECT(quarry_longest_prefix(client, &model, ids, kTokens, kMaxTokens, &reused) == 0);
  EXPECT(reused == 0);
  EXPECT(quarry_open(client, &model, ids, kTokens, kMaxTokens, &context, &reused) == 0);
  EXPECT(reused == 0);
  const char* wrong = append_all(client, context);
  if (wrong != NULL) return wrong;
  wrong = attend(client, context);
  if (wrong != NULL) return wrong;

  static float got_k[20 * kRow], got_v[20 * kRow];
  EXPECT(quarry_read(client, context, 1, 90, 110, got_k, got_v, sizeof(got_k)) == 0);
  EXPECT(memcmp(got_k, k[1] + 90 * kRow, sizeof(got_k)) == 0);
  EXPECT(memcmp(got_v, v[1] + 90 * kRow, sizeof(got_v)) == 0);

  EXPECT(quarry_fork(client, context, kTokens, kMaxTokens, &fork) == 0);
  EXPECT(fork != context);
  wrong = attend(client, fork);
  if (wrong != NULL) return wrong;
  EXPECT(quarry_close(client, fork) == 0);

  EXPECT(quarry_seal(client, context) == 0);
  EXPECT(quarry_longest_prefix(client, &model, ids, kTokens, kMaxTokens, &reused) == 0);
  EXPECT(reused == 256);
  EXPECT(quarry_pin_context(client, "c-pin", context, 0, &pinned) == 0);
  EXPECT(pinned == 256ull * kLayers * 2 * kRow * sizeof(float));
  EXPECT(quarry_unpin(client, "c-pin") == 0);
  EXPECT(quarry_close(client, context) == 0);
  EXPECT(quarry_open(client, &model, ids, kTokens, kMaxTokens, &context, &reused) == 0);
  EXPECT(reused == 256);
  quarry_disconnect(client);
  return NULL;
}

/* A document of one block behind a text of one block, then by itself: 256 tokens earlier. */
const char* c_reuses_at_another_position(const char* socket) {
  enum { kBlock = 256, kFirst = 2 * kBlock + 1 };
  quarry_model model = fill();
  memset(model.weights_digest, 0xc2, sizeof(model.weights_digest));
  quarry_client* client;
  EXPECT(quarry_connect(socket, "c-shifted", 0, 20000, &client) == 0);
  uint32_t first_ids[kFirst], reused = 77;
  uint64_t context;
  for (uint32_t t = 0; t < kFirst; ++t) {
    first_ids[t] = t < kBlock || t == 2 * kBlock ? 100000 + t : ids[t - kBlock];
  }
  EXPECT(quarry_open(client, &model, first_ids, kFirst, kMaxTokens, &context, &reused) == 0);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    EXPECT(quarry_append(client, context, layer, kKvHeads, 0, kBlock, k[layer], v[layer]) == 0);
    EXPECT(quarry_append(client, context, layer, kKvHeads, kBlock, kFirst, k[layer], v[layer]) ==
           0);
  }
  EXPECT(quarry_seal(client, context) == 0);

  quarry_shifted_range ranges[4];
  size_t count = 0;
  EXPECT(quarry_open_shifted(client, &model, ids, kTokens, kMaxTokens, &context, &reused, ranges,
                             &count) == 8); /* no room for the one */
  EXPECT(count == 1);
  count = 4;
  EXPECT(quarry_open_shifted(client, &model, ids, kTokens, kMaxTokens, &context, &reused, ranges,
                             &count) == 0);
  EXPECT(reused == 0 && count == 1);
  EXPECT(ranges[0].token_lo == 0 && ranges[0].token_hi == kBlock && ranges[0].shift == -kBlock);

  float q[kHeads * kDim], back[kHeads * kDim], o[kHeads * kDim], lse[kHeads];
  for (int i = 0; i < kHeads * kDim; ++i) q[i] = (float)(i % 7) / 3.0f - 1.0f;
  for (int head = 0; head < kHeads; ++head) {
    for (int i = 0; i < kDim / 2; ++i) {
      const double angle = (double)inv_freq[i] * kBlock;
      const double a = q[head * kDim + i], b = q[head * kDim + kDim / 2 + i];
      back[head * kDim + i] = (float)(a * cos(angle) - b * sin(angle));
      back[head * kDim + kDim / 2 + i] = (float)(b * cos(angle) + a * sin(angle));
    }
  }
  quarry_row row;
  quarry_answer answer;
  memset(&row, 0, sizeof(row));
  memset(&answer, 0, sizeof(answer));
  row.struct_bytes = sizeof(row);
  row.context = context;
  row.token_hi = kBlock;
  row.heads = kHeads;
  row.q_dtype = QUARRY_FP32;
  row.q = q;
  answer.o = o;
  answer.lse = lse;
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 0);
  EXPECT(answer.shifted_tokens == kBlock);
  const char* wrong = check_answer(&answer, back, 0, 0, kBlock);
  quarry_disconnect(client);
  return wrong;
}

const char* c_puts_and_leases(const char* socket) {
  quarry_client* client;
  EXPECT(quarry_connect(socket, NULL, 0, 20000, &client) == 0);
  static unsigned char data[100000], copy[100000];
  for (size_t i = 0; i < sizeof(data); ++i) data[i] = (unsigned char)(i * 31 >> 3);
  static const unsigned char key[] = {0, 1, 0, 255}; /* any bytes, also NUL */
  int exists = 7;
  EXPECT(quarry_exists(client, "c/ns", key, sizeof(key), &exists) == 0 && exists == 0);
  EXPECT(quarry_put(client, "c/ns", key, sizeof(key), data, sizeof(data)) == 0);
  EXPECT(quarry_exists(client, "c/ns", key, sizeof(key), &exists) == 0 && exists == 1);
  EXPECT(quarry_flush(client, 1000, NULL) == 9); /* without a disk */
  EXPECT(quarry_exists(client, "c/ns", key, 1, &exists) == 0 && exists == 0);
  quarry_block* block;
  EXPECT(quarry_lease(client, "c/ns", key, sizeof(key), &block) == 0);
  size_t bytes = 0;
  const void* mapped = quarry_block_data(block, &bytes);
  EXPECT(bytes == sizeof(data) && memcmp(mapped, data, bytes) == 0);
  EXPECT(quarry_block_copy(block, copy, sizeof(copy)) == 0);
  EXPECT(memcmp(copy, data, sizeof(copy)) == 0);
  EXPECT(quarry_block_copy(block, copy, sizeof(copy) - 1) == 3);
  quarry_disconnect(client); /* the block outlives it */
  EXPECT(memcmp(mapped, data, bytes) == 0);
  quarry_block_release(block);
  return NULL;
}

const char* c_gets_codes_and_texts_for_errors(const char* socket) {
  quarry_model model = fill();
  quarry_client* client;
  EXPECT(quarry_connect("/nonexistent/quarryd.sock", NULL, 0, 0, &client) == 14);
  EXPECT(strstr(quarry_last_error(), "/nonexistent/quarryd.sock") != NULL);
  EXPECT(quarry_connect(socket, NULL, 0, 20000, &client) == 0);
  uint64_t context = 0;
  uint32_t reused;
  quarry_block* block;
  EXPECT(quarry_lease(client, "c/none", "k", 1, &block) == 5);
  EXPECT(quarry_close(client, 12345) == 5);
  EXPECT(strstr(quarry_last_error(), "12345") != NULL);
  EXPECT(quarry_unpin(client, "no such pin") == 5);

  model.struct_bytes = 8; /* another version's structure */
  EXPECT(quarry_open(client, &model, ids, kTokens, kMaxTokens, &context, &reused) == 3);
  EXPECT(strstr(quarry_last_error(), "struct_bytes") != NULL);
  model = fill();
  model.kv_dtype = 258; /* fp16 in its low byte */
  EXPECT(quarry_open(client, &model, ids, kTokens, kMaxTokens, &context, &reused) == 3);
  EXPECT(strstr(quarry_last_error(), "kv_dtype is 258") != NULL);
  model = fill();
  model.rope_rotary_dim = kDim - 1;
  EXPECT(quarry_open(client, &model, ids, kTokens, kMaxTokens, &context, &reused) == 3);
  EXPECT(quarry_open(client, NULL, ids, kTokens, kMaxTokens, &context, &reused) == 3);

  model = fill();
  EXPECT(quarry_open(client, &model, ids, kTokens, kMaxTokens, &context, &reused) == 0);
  float q[kHeads * kDim] = {0}, o[kHeads * kDim], lse[kHeads];
  quarry_row row;
  memset(&row, 0, sizeof(row));
  row.struct_bytes = sizeof(row);
  row.context = context;
  row.heads = kHeads;
  row.q_dtype = QUARRY_FP32;
  row.q = q;
  quarry_answer answer;
  memset(&answer, 0, sizeof(answer));
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 3); /* no room for o and lse */
  answer.o = o;
  answer.lse = lse;
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 0 && answer.code == 0);
  EXPECT(lse[0] == -INFINITY && o[0] == 0); /* nothing attended */
  row.budget_kind = 256; /* unlimited in its low byte */
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 3);
  EXPECT(strstr(quarry_last_error(), "budget_kind is 256") != NULL);
  row.budget_kind = QUARRY_DIPR;
  row.budget_beta = -2;
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 3);
  EXPECT(strstr(quarry_last_error(), "beta of -2 is not at least 0") != NULL);
  row.budget_kind = QUARRY_SOFTMAX_LIFT;
  row.budget_k = 0;
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 3);
  EXPECT(strstr(quarry_last_error(), "k is 0") != NULL);
  row.budget_kind = QUARRY_UNLIMITED;
  row.q_dtype = (quarry_dtype)0;
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 3);
  row.q_dtype = QUARRY_FP32;
  row.context = 12345;
  EXPECT(quarry_attend_rows(client, &row, 1, &answer) == 5);
  quarry_disconnect(client);
  return NULL;
}
