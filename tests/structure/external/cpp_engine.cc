// An engine pairs with a daemon in C++. The part between the marks stands in README.md.
#include <cstdio>
#include <vector>

// [README
#include "client/client.h"

// One decode step of layer 0. k and v: [token][kv_head][head_dim] of the prompt.
absl::Status DecodeStep(const std::string& socket, const quarry::ModelSpec& spec,
                        const std::vector<uint32_t>& prompt, const std::vector<float>& k,
                        const std::vector<float>& v, const std::vector<float>& q) {
  auto client = quarry::Client::Connect({.socket_path = socket});
  if (!client.ok()) return client.status();

  auto context = (*client)->Open({.spec = spec, .tokens = prompt, .max_tokens = 4096});
  if (!context.ok()) return context.status();
  // What the daemon has of this prompt, from whatever process, need not be computed again.
  const uint32_t reused = context->reused_tokens, tokens = prompt.size();
  const size_t skip = size_t{reused} * spec.shape.kv_heads * spec.shape.head_dim;
  absl::Status status = (*client)->Append({.context = context->context,
                                           .layer = 0,
                                           .kv_heads = spec.shape.kv_heads,
                                           .range = {reused, tokens},
                                           .k = k.data() + skip,
                                           .v = v.data() + skip});
  if (!status.ok()) return status;

  std::vector<float> o(q.size()), lse(spec.shape.heads);
  quarry::AttendRow row{.context = context->context,
                        .layer = 0,
                        .range = {0, tokens},  // all that you do not attend yourself
                        .heads = spec.shape.heads,
                        .q_dtype = quarry::DType::kFp32,
                        .q = q.data()};
  quarry::AttendAnswer answer{.o = o, .lse = lse};
  (*client)->Arm();  // the daemon spins for this token, so that nobody has to be woken
  status = (*client)->Attend({&row, 1}, {&answer, 1});
  (*client)->Disarm();
  if (!status.ok()) return status;
  return answer.status;  // OK: merge (o, lse) with your window's
}
// README]

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  quarry::ModelSpec spec;
  spec.name = "example";
  spec.shape = {.layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = quarry::DType::kFp32};
  spec.weights.bytes.fill(1);
  spec.rope.rotary_dim = 64;
  spec.rope.inv_freq.assign(32, 0.5f);
  std::vector<uint32_t> prompt(300, 7);
  std::vector<float> kv(prompt.size() * 2 * 64, 0.25f), q(4 * 64, 0.5f);
  absl::Status status = DecodeStep(argv[1], spec, prompt, kv, kv, q);
  std::printf("%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
