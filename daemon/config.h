// The configuration of quarryd: the options of its parts, from a TOML file.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "daemon/engine.h"
#include "daemon/grpc_options.h"
#include "daemon/log.h"
#include "daemon/metrics.h"
#include "daemon/peer_tenant.h"
#include "daemon/shm_options.h"

namespace quarry {

struct Config {
  EngineOptions engine;
  ShmOptions shm;
  GrpcOptions grpc;
  PeerTenantOptions tenants;
  MetricsOptions metrics;
  LogOptions log;
  uint32_t drain_deadline_ms = 10000;
};

// Sockets in $XDG_RUNTIME_DIR/quarry for an ordinary user who has one, else in /run/quarry.
Config DefaultConfig();

// InvalidArgument names the key, the value and what is allowed; an unknown key is an error.
// `origin` names the text in messages. Missing keys keep DefaultConfig's values.
absl::StatusOr<Config> ParseConfig(std::string_view toml, std::string_view origin);
absl::StatusOr<Config> ReadConfig(const std::string& path);

// Checks every value and how the values fit together; messages name key and value. ParseConfig
// has called it already; call it again after overriding values.
absl::Status ValidateConfig(const Config& config);

// The whole configuration as TOML that ParseConfig reads back to the same values.
std::string PrintConfig(const Config& config);

// "4GiB", "512MiB", "64KiB", "100B" or plain digits.
absl::StatusOr<uint64_t> ParseBytes(std::string_view text);
// The shortest of those spellings.
std::string PrintBytes(uint64_t bytes);

}  // namespace quarry
