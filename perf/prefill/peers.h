// Times of others' dense attention, as perf/prefill_peers.py --json prints them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "perf/prefill/made_layer.h"

namespace quarry::perf {

struct Peer {
  std::string backend, dtype;
  uint32_t heads = 0, kv_heads = 0, head_dim = 0, tokens = 0;
  double seconds = 0, tflops = 0;  // of causal work
};

// A JSON line each. NotFound, or InvalidArgument that names the line and what is wrong with it.
absl::StatusOr<std::vector<Peer>> ReadPeers(const std::string& path);
// Those that were measured on this layer's shape.
std::vector<Peer> PeersOf(const std::vector<Peer>& peers, const MadeLayer::Options& layer);

}  // namespace quarry::perf
