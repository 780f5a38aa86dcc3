#include "daemon/ip_address.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace quarry {

absl::StatusOr<IpAddress> ParseIpAddress(std::string_view text) {
  const absl::Status bad = absl::InvalidArgumentError(absl::StrCat(
      "\"", absl::string_view(text.data(), text.size()), "\" is no IPv4:port or [IPv6]:port"));
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return bad;
  uint32_t port = 0;
  const std::string_view port_text = text.substr(colon + 1);
  if (!absl::SimpleAtoi(absl::string_view(port_text.data(), port_text.size()), &port) ||
      port > UINT16_MAX) {
    return bad;
  }
  IpAddress address;
  address.port = static_cast<uint16_t>(port);
  std::string_view host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    address.host = host.substr(1, host.size() - 2);
    in6_addr six{};
    if (inet_pton(AF_INET6, address.host.c_str(), &six) != 1) return bad;
    address.loopback = IN6_IS_ADDR_LOOPBACK(&six);
    return address;
  }
  address.host = host;
  in_addr four{};
  if (inet_pton(AF_INET, address.host.c_str(), &four) != 1) return bad;
  address.loopback = (ntohl(four.s_addr) >> 24) == 127;
  return address;
}

}  // namespace quarry
