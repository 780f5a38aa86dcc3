#include "perf/prefill/peers.h"

#include <fstream>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace quarry::perf {

absl::StatusOr<std::vector<Peer>> ReadPeers(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("--peers: cannot read ", path));
  std::vector<Peer> out;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty()) continue;
    try {
      const nlohmann::json json = nlohmann::json::parse(line);
      out.push_back({json.at("backend"), json.at("dtype"), json.at("heads"), json.at("kv_heads"),
                     json.at("head_dim"), json.at("tokens"), json.at("seconds"),
                     json.at("tflops")});
    } catch (const nlohmann::json::exception& e) {
      return absl::InvalidArgumentError(
          absl::StrCat("--peers: line ", number, " of ", path, ": ", e.what()));
    }
    if (!(out.back().seconds > 0)) {
      return absl::InvalidArgumentError(absl::StrCat("--peers: line ", number, " of ", path,
                                                     ": seconds are ", out.back().seconds));
    }
  }
  return out;
}

std::vector<Peer> PeersOf(const std::vector<Peer>& peers, const MadeLayer::Options& layer) {
  std::vector<Peer> out;
  for (const Peer& p : peers) {
    if (p.heads == layer.shape.heads && p.kv_heads == layer.shape.kv_heads &&
        p.head_dim == layer.shape.head_dim && p.tokens == layer.tokens &&
        p.dtype == DTypeName(layer.dtype)) {
      out.push_back(p);
    }
  }
  return out;
}

}  // namespace quarry::perf
