/* The C interface of the Quarry client: one session with a daemon on this machine.
 *
 * Every call returns a quarry_code; 0 is success. The numbers are those of gRPC and Abseil:
 * 3 invalid argument, 4 deadline exceeded, 5 not found (a miss), 8 resource exhausted, 9 failed
 * precondition, 14 unavailable (the daemon has gone or missed the deadline; connect again), 15 data
 * loss. quarry_last_error() has the text of this thread's last failure.
 *
 * A client may be used by several threads at once. Buffers are the caller's and are not kept.
 * Source: proto/SHM.md, proto/IDENTITY.md.
 */
#ifndef QUARRY_CLIENT_QUARRY_H_
#define QUARRY_CLIENT_QUARRY_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QUARRY_ABI_VERSION 3

typedef int quarry_code;
typedef struct quarry_client quarry_client;
typedef struct quarry_block quarry_block;
typedef struct quarry_pending_lease quarry_pending_lease;
typedef struct quarry_attend quarry_attend;

/* Element types: 1 bf16, 2 fp16, 3 fp32. */
typedef enum { QUARRY_BF16 = 1, QUARRY_FP16 = 2, QUARRY_FP32 = 3 } quarry_dtype;
typedef enum {
  QUARRY_UNLIMITED = 0, /* every token of the range */
  QUARRY_FIXED_K = 1,   /* the k of largest score */
  QUARRY_TOP_P = 2,     /* the fewest whose softmax mass reaches `mass`, at most k if k > 0 */
  QUARRY_ERROR = 3,     /* as few as keep the answer's predicted relative error within `error` */
  QUARRY_DIPR = 4,      /* those of score >= the largest less `beta`, at most k if k > 0 */
  QUARRY_SOFTMAX_LIFT = 5 /* k, drawn and weighed so that sums over them are unbiased */
} quarry_budget_kind;

typedef struct {
  size_t struct_bytes; /* sizeof(quarry_model): tells versions of this structure apart */
  const char* name;    /* for people */
  uint32_t layers, heads, kv_heads, head_dim;
  uint32_t kv_dtype;   /* quarry_dtype */
  uint8_t weights_digest[32];
  uint8_t tokenizer_digest[32]; /* all zero: none */
  /* The rotary embedding as applied; its digest is part of every block's identity. */
  const float* rope_inv_freq; /* [rotary_dim / 2] */
  uint32_t rope_rotary_dim;
  float rope_attention_scale;
  int rope_interleaved;
  int rope_regime;                /* 0 not LongRoPE, 1 short, 2 long */
  uint32_t rope_regime_max_tokens;
} quarry_model;

typedef struct {
  size_t struct_bytes;
  uint64_t context;
  uint32_t layer;
  uint32_t token_lo, token_hi;  /* what is attended */
  uint32_t first_head, heads;   /* query heads, whole groups of a KV head */
  uint32_t budget_kind;         /* quarry_budget_kind */
  uint32_t budget_k;
  float budget_mass;
  uint32_t q_dtype;             /* quarry_dtype */
  const void* q;                /* [heads][head_dim], after RoPE */
  int has_token;                /* the new token's K and V are stored first */
  uint32_t token_position;
  const void* k;                /* [heads / group][head_dim] of the context's dtype */
  const void* v;
  float budget_error;           /* (0, 1), of QUARRY_ERROR */
  float budget_beta;            /* nats, >= 0, of QUARRY_DIPR */
  uint32_t budget_seed;         /* of QUARRY_SOFTMAX_LIFT, which draws anew at each token_position */
  int merged;                   /* the answer will be merged with attention over the context's other
                                   tokens up to token_position: QUARRY_ERROR is then of the merge */
} quarry_row;

typedef struct {
  quarry_code code;             /* not 0: the token is void, o and lse are not to be used */
  uint32_t covered_lo, covered_hi;
  uint64_t tokens_attended;     /* summed over the row's heads */
  uint64_t bytes_touched;
  float error_estimate;         /* fixed k, top-p, DIPR: share of softmax mass not attended;
                                   error: predicted relative error of o; SoftmaxLift: predicted
                                   relative standard error of e^lse; largest over the heads */
  uint32_t shifted_tokens;      /* of the range, reused from another position or behind other text
                                   (quarry_open_shifted): not 0, the answer is approximate */
  float* o;                     /* the caller's: [heads][head_dim] */
  float* lse;                   /* the caller's: [heads], natural log; empty set: -infinity */
} quarry_answer;

uint32_t quarry_abi_version(void);
const char* quarry_last_error(void);

/* socket_path NULL: where quarryd serves by default, $XDG_RUNTIME_DIR/quarry/quarryd.sock for an
 * ordinary user who has that directory, else /run/quarry/quarryd.sock. deadline_ms 0: 10 seconds.
 * slot_bytes 0: the daemon's default; it bounds one message. */
quarry_code quarry_connect(const char* socket_path, const char* client_name, uint64_t slot_bytes,
                           uint32_t deadline_ms, quarry_client** out);
void quarry_disconnect(quarry_client* client);

/* tokens: the prompt known so far. *reused_tokens of it are cached and leased: append from there.
 * Only densely computed prefixes are accepted, and what is appended counts as dense. */
quarry_code quarry_open(quarry_client* client, const quarry_model* model, const uint32_t* tokens,
                        size_t token_count, uint32_t max_tokens, uint64_t* context,
                        uint32_t* reused_tokens);
/* Tokens of a context whose K and V were computed elsewhere: whole blocks of 256. */
typedef struct {
  uint32_t token_lo, token_hi;
  int32_t shift; /* their position less the one they were computed at; 0: behind other text */
} quarry_shifted_range;
/* Like quarry_open, but what the prompt has beyond the cached prefix may also be reused where it is
 * cached at another position (by a multiple of 256 tokens) or behind other text. That is
 * approximate: deeper layers saw other text. *ranges is how many `shifted` has room for, and then
 * how many there are, in token order; if there are more, the code is 8 and no context is open.
 * Append what lies between and skip these. What is appended behind the first no longer counts as
 * dense. */
quarry_code quarry_open_shifted(quarry_client* client, const quarry_model* model,
                                const uint32_t* tokens, size_t token_count, uint32_t max_tokens,
                                uint64_t* context, uint32_t* reused_tokens,
                                quarry_shifted_range* shifted, size_t* ranges);
/* How many of the tokens quarry_open would reuse now; nothing is leased. */
quarry_code quarry_longest_prefix(quarry_client* client, const quarry_model* model,
                                  const uint32_t* tokens, size_t token_count, uint32_t max_tokens,
                                  uint32_t* reused_tokens);
quarry_code quarry_declare_tokens(quarry_client* client, uint64_t context, const uint32_t* tokens,
                                  size_t token_count);
/* K and V of tokens [token_lo, token_hi) of one layer, all KV heads:
 * [token][kv_head][head_dim] of the context's dtype. */
quarry_code quarry_append(quarry_client* client, uint64_t context, uint32_t layer,
                          uint32_t kv_heads, uint32_t token_lo, uint32_t token_hi, const void* k,
                          const void* v);
/* The same for KV heads [first_kv_head, first_kv_head + kv_heads): one of several processes that
 * append to one context, each its own heads and layers. */
quarry_code quarry_append_heads(quarry_client* client, uint64_t context, uint32_t layer,
                                uint32_t first_kv_head, uint32_t kv_heads, uint32_t token_lo,
                                uint32_t token_hi, const void* k, const void* v);
quarry_code quarry_read(quarry_client* client, uint64_t context, uint32_t layer, uint32_t token_lo,
                        uint32_t token_hi, void* k, void* v, size_t bytes_each);
quarry_code quarry_seal(quarry_client* client, uint64_t context);
quarry_code quarry_fork(quarry_client* client, uint64_t context, uint32_t tokens,
                        uint32_t max_tokens, uint64_t* fork);
quarry_code quarry_close(quarry_client* client, uint64_t context);

/* Tells the daemon that a token is in flight (its poller spins) or no longer. */
void quarry_arm(quarry_client* client, int armed);
/* Answers every row, each with its own code; the call's code is the message's. */
quarry_code quarry_attend_rows(quarry_client* client, const quarry_row* rows, size_t row_count,
                               quarry_answer* answers);
/* The same without waiting; answers are filled by quarry_attend_wait, which also frees it. */
quarry_code quarry_attend_start(quarry_client* client, const quarry_row* rows, size_t row_count,
                                quarry_answer* answers, quarry_attend** out);
int quarry_attend_done(const quarry_attend* attend);
quarry_code quarry_attend_wait(quarry_attend* attend);
/* The k best tokens of one row, by falling score: tokens and scores are [heads][k]; *found is
 * how many there are per head. */
quarry_code quarry_top_k(quarry_client* client, const quarry_row* row, uint32_t k,
                         uint32_t* tokens, float* scores, uint32_t* found);

/* Keeps a context's published blocks until quarry_unpin, or for ttl_ms if that is not 0; the pin
 * outlives this client. */
quarry_code quarry_pin_context(quarry_client* client, const char* name, uint64_t context,
                               uint64_t ttl_ms, uint64_t* pinned_bytes);
quarry_code quarry_unpin(quarry_client* client, const char* name);

/* Opaque blocks under the engine's own keys (1 to 256 bytes). */
quarry_code quarry_put(quarry_client* client, const char* engine_namespace, const void* key,
                       size_t key_bytes, const void* data, size_t data_bytes);
/* Leases the block: its bytes are read where they lie until quarry_block_release. */
quarry_code quarry_lease(quarry_client* client, const char* engine_namespace, const void* key,
                         size_t key_bytes, quarry_block** out);
/* The same without waiting; quarry_lease_wait answers it and frees the request. One that is asked
 * for while the block before it is being copied costs no round trip. */
quarry_code quarry_lease_start(quarry_client* client, const char* engine_namespace,
                               const void* key, size_t key_bytes, quarry_pending_lease** out);
quarry_code quarry_lease_wait(quarry_pending_lease* pending, quarry_block** out);
const void* quarry_block_data(const quarry_block* block, size_t* bytes);
/* Copies the whole block and checks its digest in the same pass: data loss is a miss. */
quarry_code quarry_block_copy(const quarry_block* block, void* out, size_t bytes);
void quarry_block_release(quarry_block* block);
/* Returns when everything of the tenant that was published before is on the daemon's disk and
 * survives its restart. blocks: how many there were, may be null. 4: not so much after timeout_ms;
 * 9: there is no disk; 14: the disk refuses some. */
quarry_code quarry_flush(quarry_client* client, uint32_t timeout_ms, uint64_t* blocks);
quarry_code quarry_exists(quarry_client* client, const char* engine_namespace, const void* key,
                          size_t key_bytes, int* exists);

#ifdef __cplusplus
}
#endif

#endif /* QUARRY_CLIENT_QUARRY_H_ */
