// Numeric addresses with a port, as the configuration writes them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace quarry {

struct IpAddress {
  std::string host;  // without brackets
  uint16_t port = 0;
  bool loopback = false;
};

// "127.0.0.1:9464" or "[::1]:9464"; port 0 asks for any free one. Names are refused: what they
// resolve to can change, and with it whether the address is loopback.
absl::StatusOr<IpAddress> ParseIpAddress(std::string_view text);

}  // namespace quarry
