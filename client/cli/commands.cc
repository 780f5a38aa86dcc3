#include "client/cli/commands.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "client/cli/connection.h"
#include "proto/status_macros.h"

namespace quarry::cli {
namespace {

using nlohmann::json;

template <typename D>
absl::StatusOr<D> ParseHex(const std::string& hex) {
  D d;
  const std::string bytes = absl::HexStringToBytes(hex);
  if (hex.size() != 64 || bytes.size() != d.bytes.size() ||
      hex.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("'", hex, "' is not 64 hex digits"));
  }
  std::copy(bytes.begin(), bytes.end(), d.bytes.begin());
  return d;
}

absl::StatusOr<std::vector<BlockId>> ParseBlocks(const std::vector<std::string>& list) {
  std::vector<BlockId> out;
  for (const std::string& hex : list) {
    QUARRY_ASSIGN_OR_RETURN(BlockId id, ParseHex<BlockId>(hex));
    out.push_back(id);
  }
  return out;
}

// Published blocks counted at most: a listing of more does not fit a slot of the default size.
constexpr uint32_t kMaxCounted = 32768;

double MiB(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

}  // namespace

absl::Status ShowStatus(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(DaemonStatus s, client->Status());
  QUARRY_ASSIGN_OR_RETURN(auto values, client->Statistics());
  if (a.json) {
    std::printf("%s\n", json({{"version", s.version}, {"pid", s.pid}, {"tenant", s.tenant},
                              {"uptime_seconds", s.uptime_seconds}, {"draining", s.draining},
                              {"simd_level", s.simd_level}, {"statistics", values}})
                            .dump()
                            .c_str());
    return absl::OkStatus();
  }
  std::printf("quarryd %s, pid %llu, up %.0f s%s\nkernels %s, you are tenant %s\n",
              s.version.c_str(), static_cast<unsigned long long>(s.pid), s.uptime_seconds,
              s.draining ? ", draining" : "", s.simd_level.c_str(), s.tenant.c_str());
  for (const auto& [name, value] : values) {
    if (name.find("_bucket{") != std::string::npos) continue;  // for machines: --json has them
    std::printf("%-52s %.10g\n", name.c_str(), value);
  }
  return absl::OkStatus();
}

absl::Status ShowContexts(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(std::vector<ContextInfo> contexts, client->ListContexts());
  json list = json::array();
  if (!a.json) std::printf("%-20s %-16s %9s %9s %9s %12s %12s\n", "context", "model", "tokens",
                           "shared", "maximum", "shared MiB", "private MiB");
  for (const ContextInfo& c : contexts) {
    if (a.json) {
      list.push_back({{"context", c.context.value}, {"model", c.model}, {"tokens", c.tokens},
                      {"shared_tokens", c.shared_tokens}, {"max_tokens", c.max_tokens},
                      {"sealed", c.sealed}, {"shared_bytes", c.shared_bytes},
                      {"private_bytes", c.private_bytes},
                      {"shifted_tokens", c.shifted_tokens}});
      continue;
    }
    std::printf("%-20llu %-16s %9u %9u %9u %12.1f %12.1f%s%s\n",
                static_cast<unsigned long long>(c.context.value), c.model.c_str(), c.tokens,
                c.shared_tokens, c.max_tokens, MiB(c.shared_bytes), MiB(c.private_bytes),
                c.sealed ? "  sealed" : "", c.shifted_tokens > 0 ? "  shifted" : "");
  }
  if (a.json) std::printf("%s\n", list.dump().c_str());
  return absl::OkStatus();
}

absl::Status ShowBlocks(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(std::vector<BlockSummary> blocks, client->ListBlocks(a.limit));
  json list = json::array();
  for (const BlockSummary& b : blocks) {
    if (a.json) {
      list.push_back({{"id", b.id.Hex()},
                      {"parent", b.parent.Hex()},
                      {"namespace", b.name_space.Hex()},
                      {"bytes", b.bytes},
                      {"state", b.state},
                      {"leases", b.leases},
                      {"children", b.children},
                      {"pins", b.pins},
                      {"in_ram", b.in_ram},
                      {"on_disk", b.on_disk}});
      continue;
    }
    std::printf("%s %10llu bytes  %-9s %-8s %3u leases %3u children", b.id.Hex().c_str(),
                static_cast<unsigned long long>(b.bytes), b.state.c_str(),
                b.in_ram ? b.on_disk ? "RAM,disk" : "RAM" : "disk", b.leases, b.children);
    if (!b.name_space.IsZero()) std::printf("  namespace %s", b.name_space.Hex().c_str());
    for (const std::string& pin : b.pins) std::printf("  pin:%s", pin.c_str());
    std::printf("\n");
  }
  if (a.json) std::printf("%s\n", list.dump().c_str());
  return absl::OkStatus();
}

absl::Status Pin(const Arguments& a) {
  PinRequest request;
  request.name = a.name;
  request.ttl_ms = a.ttl_ms;
  QUARRY_ASSIGN_OR_RETURN(request.blocks, ParseBlocks(a.blocks));
  if (a.context != 0) request.context = ContextId{a.context};
  if (request.blocks.empty() && !request.context) {
    return absl::InvalidArgumentError("pin needs --context or --block");
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(uint64_t bytes, client->Pin(request));
  if (a.json) {
    std::printf("%s\n", json({{"pin", a.name}, {"bytes", bytes}}).dump().c_str());
  } else {
    std::printf("pinned %.1f MiB as %s\n", MiB(bytes), a.name.c_str());
  }
  return absl::OkStatus();
}

absl::Status Unpin(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_RETURN_IF_ERROR(client->Unpin(a.name));
  if (a.json) {
    std::printf("%s\n", json({{"unpinned", a.name}}).dump().c_str());
  } else {
    std::printf("unpinned %s\n", a.name.c_str());
  }
  return absl::OkStatus();
}

absl::Status Purge(const Arguments& a) {
  if ((a.all ? 1 : 0) + (a.name_space.empty() ? 0 : 1) + (a.blocks.empty() ? 0 : 1) != 1) {
    return absl::InvalidArgumentError("purge needs exactly one of --all, --namespace and --block");
  }
  PurgeRequest request;
  request.whole_tenant = a.all;
  QUARRY_ASSIGN_OR_RETURN(request.blocks, ParseBlocks(a.blocks));
  if (!a.name_space.empty()) {
    QUARRY_ASSIGN_OR_RETURN(request.name_space, ParseHex<NamespaceDigest>(a.name_space));
  }
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(uint64_t blocks, client->Purge(request));
  if (a.json) {
    std::printf("%s\n", json({{"blocks", blocks}}).dump().c_str());
  } else {
    std::printf("purged %llu blocks\n", static_cast<unsigned long long>(blocks));
  }
  return absl::OkStatus();
}

absl::Status Flush(const Arguments& a) {
  FlushRequest request;
  QUARRY_ASSIGN_OR_RETURN(request.blocks, ParseBlocks(a.blocks));
  if (a.context != 0) request.context = ContextId{a.context};
  request.whole_tenant = !request.context.has_value() && request.blocks.empty();
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(const FlushResult result,
                          client->Flush(request, absl::Milliseconds(a.timeout_ms)));
  if (a.json) {
    std::printf("%s\n", json({{"blocks", result.durable_blocks},
                              {"bytes", result.durable_bytes},
                              {"tokens", result.tokens}})
                            .dump()
                            .c_str());
  } else {
    std::printf("%llu blocks, %.1f MiB, are on the disk\n",
                static_cast<unsigned long long>(result.durable_blocks), MiB(result.durable_bytes));
  }
  return absl::OkStatus();
}

absl::Status Drain(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_RETURN_IF_ERROR(client->Drain());
  if (a.json) {
    std::printf("%s\n", json({{"draining", true}}).dump().c_str());
  } else {
    std::printf("the daemon finishes what is in flight and stops\n");
  }
  return absl::OkStatus();
}

absl::Status Verify(const Arguments& a) {
  QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Connect(a));
  QUARRY_ASSIGN_OR_RETURN(std::vector<ContextInfo> contexts, client->ListContexts());
  uint64_t bytes = 0, failed = 0;
  std::string first_failure;
  // Contexts share blocks. While one of them is open its blocks stay where they are.
  std::set<std::pair<const std::byte*, uint64_t>> checked;
  for (const ContextInfo& context : contexts) {
    for (uint32_t b = 0; b < context.tokens / kBlockTokens; ++b) {
      auto lease = client->LeaseContextBlock(context.context, b);
      if (absl::IsNotFound(lease.status()) || absl::IsFailedPrecondition(lease.status())) {
        continue;  // closed, not published, or reused from another position
      }
      QUARRY_RETURN_IF_ERROR(lease.status());
      if (!checked.emplace((*lease)->bytes().data(), (*lease)->digest().low).second) continue;
      bytes += (*lease)->bytes().size();
      const absl::Status verified = (*lease)->Verify();
      if (verified.ok()) continue;
      if (failed++ == 0) {
        first_failure = absl::StrCat("context ", context.context.value, " block ", b, ": ",
                                     verified.message());
      }
    }
  }
  QUARRY_ASSIGN_OR_RETURN(std::vector<BlockSummary> published, client->ListBlocks(kMaxCounted));
  const bool all = published.size() < kMaxCounted;
  std::erase_if(published, [](const BlockSummary& block) { return block.state == "INDEX"; });
  const uint64_t unreached = published.size() - std::min(published.size(), checked.size());
  if (a.json) {
    std::printf("%s\n", json({{"contexts", contexts.size()}, {"blocks", checked.size()},
                              {"bytes", bytes}, {"failed", failed}, {"unreached", unreached}})
                            .dump()
                            .c_str());
  } else {
    std::printf("%zu contexts, %zu blocks, %.1f MiB checked, %llu wrong\n", contexts.size(),
                checked.size(), MiB(bytes), static_cast<unsigned long long>(failed));
    if (unreached > 0) {
      std::printf("%llu%s published blocks were not checked: no open context uses them\n",
                  static_cast<unsigned long long>(unreached), all ? "" : " or more");
    }
  }
  return failed == 0 ? absl::OkStatus() : absl::DataLossError(first_failure);
}

}  // namespace quarry::cli
