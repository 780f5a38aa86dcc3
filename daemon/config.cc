// Values: defaults, sizes, checks, printing. Reading TOML is config_toml.cc's.
#include "daemon/config.h"

#include <charconv>
#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "daemon/config_keys.h"
#include "daemon/ip_address.h"
#include "daemon/unix_socket.h"
#include "proto/default_socket.h"
#include "proto/status_macros.h"
#include "proto/types.h"

namespace quarry {
namespace {

constexpr std::pair<std::string_view, uint64_t> kUnits[] = {
    {"TiB", 1ull << 40}, {"GiB", 1ull << 30}, {"MiB", 1ull << 20}, {"KiB", 1ull << 10}, {"B", 1}};

absl::string_view View(std::string_view s) { return {s.data(), s.size()}; }

std::string Quoted(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (byte < 0x20 || byte == 0x7f) {
      absl::StrAppendFormat(&out, "\\u%04x", byte);
    } else {
      out.push_back(c);
    }
  }
  return out + "\"";
}

absl::Status Bad(std::string_view key, std::string_view value, std::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat(View(key), " = ", View(value), ": ", View(why)));
}

// The shortest decimal that reads back to the same.
std::string Decimal(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

// Keeps the first violation of a range.
class RangeChecker {
 public:
  void Text(std::string_view, const std::string&) {}
  void Flag(std::string_view, bool) {}
  template <typename E>
  void Choice(std::string_view, E, std::initializer_list<std::string_view>) {}
  void Count(std::string_view key, uint32_t value, uint32_t min, uint32_t max) {
    if (value < min || value > max) {
      Keep(Bad(key, std::to_string(value), absl::StrCat("must be from ", min, " to ", max)));
    }
  }
  void Number(std::string_view key, double value, double min, double max) {
    if (value >= min && value <= max) return;
    Keep(Bad(key, Decimal(value), absl::StrCat("must be from ", min, " to ", max)));
  }
  void Bytes(std::string_view key, uint64_t value, uint64_t min, uint64_t max) {
    if (value < min || value > max) {
      Keep(Bad(key, Quoted(PrintBytes(value)),
               absl::StrCat("must be from ", PrintBytes(min), " to ", PrintBytes(max))));
    }
  }
  void Mode(std::string_view key, mode_t value) {
    if ((value & ~0777u) != 0 || (value & 0600u) != 0600u) {
      Keep(Bad(key, absl::StrFormat("\"0%o\"", value),
               "must be an octal file mode from \"0600\" to \"0777\" that lets the owner connect"));
    }
  }
  void Users(std::string_view key, const std::map<uid_t, std::string>& users) {
    for (const auto& [uid, tenant] : users) {
      if (absl::Status valid = ValidateTenantName(tenant); !valid.ok()) {
        Keep(Bad(absl::StrCat(View(key), ".", uid), Quoted(tenant),
                 std::string_view(valid.message().data(), valid.message().size())));
      }
    }
  }
  void UserSet(std::string_view, const std::set<uid_t>&) {}
  void LevelName(std::string_view key, const std::string& level) {
    for (std::string_view known : {"debug", "info", "warning", "error"}) {
      if (level == known) return;
    }
    Keep(Bad(key, Quoted(level), "must be debug, info, warning or error"));
  }
  absl::Status status;

 private:
  void Keep(absl::Status bad) { status.Update(std::move(bad)); }
};

absl::Status CheckSocketPath(std::string_view key, const std::string& path) {
  if (path.size() > kMaxSocketPathBytes) {
    return Bad(key, Quoted(path),
               absl::StrCat("has ", path.size(), " bytes; a socket path has at most ",
                            kMaxSocketPathBytes));
  }
  if (!path.empty() && path[0] != '/') return Bad(key, Quoted(path), "must be an absolute path");
  return absl::OkStatus();
}

absl::Status CheckDisk(const DiskTierOptions& disk) {
  const std::string& path = disk.file.path;
  if (path.empty()) return absl::OkStatus();
  if (path[0] != '/') return Bad("disk.path", Quoted(path), "must be an absolute path");
  for (const auto& [key, bytes] : {std::pair("disk.bytes", disk.file.bytes),
                                   std::pair("disk.segment_bytes", disk.log.segment_bytes)}) {
    if (bytes % kSectorBytes != 0) {
      return Bad(key, Quoted(PrintBytes(bytes)),
                 absl::StrCat("must be a multiple of ", kSectorBytes));
    }
  }
  const LogKeyOptions& key = disk.log.key;
  if (!key.file.empty() && key.file[0] != '/') {
    return Bad("disk.key_file", Quoted(key.file), "must be an absolute path");
  }
  if (!key.file.empty() && !key.environment.empty()) {
    return Bad("disk.key_environment", Quoted(key.environment),
               absl::StrCat("must be \"\" where disk.key_file is given: ", key.file));
  }
  const bool encrypted = !key.file.empty() || !key.environment.empty();
  const uint64_t least = encrypted ? EncryptedLogBytes(kLeastSegments, disk.log.segment_bytes)
                                   : LogBytes(kLeastSegments, disk.log.segment_bytes);
  if (disk.file.bytes != 0 && disk.file.bytes < least) {
    return Bad("disk.bytes", Quoted(PrintBytes(disk.file.bytes)),
               absl::StrCat("must be 0 or at least ", least, ", for four segments"));
  }
  return absl::OkStatus();
}

absl::Status CheckShm(const Config& c) {
  if (c.shm.socket.empty()) return Bad("shm.socket", "\"\"", "must name a socket path");
  QUARRY_RETURN_IF_ERROR(CheckSocketPath("shm.socket", c.shm.socket));
  if (c.shm.default_slots > c.shm.max_slots) {
    return Bad("shm.default_slots", std::to_string(c.shm.default_slots),
               absl::StrCat("must not exceed shm.max_slots = ", c.shm.max_slots));
  }
  if (c.shm.default_slot_bytes > c.shm.max_slot_bytes) {
    return Bad(
        "shm.default_slot_bytes", Quoted(PrintBytes(c.shm.default_slot_bytes)),
        absl::StrCat("must not exceed shm.max_slot_bytes = ", PrintBytes(c.shm.max_slot_bytes)));
  }
  const uint64_t one_channel = c.shm.default_slots * c.shm.default_slot_bytes;
  if (one_channel > c.shm.max_total_bytes) {
    return Bad(
        "shm.max_total_bytes", Quoted(PrintBytes(c.shm.max_total_bytes)),
        absl::StrCat("does not hold one channel of the default size, ", PrintBytes(one_channel)));
  }
  if (c.shm.bulk_queue_per_client > c.shm.bulk_queue) {
    return Bad("shm.bulk_queue_per_client", std::to_string(c.shm.bulk_queue_per_client),
               absl::StrCat("must not exceed shm.bulk_queue = ", c.shm.bulk_queue));
  }
  return absl::OkStatus();
}

absl::Status CheckGrpcAddress(const GrpcOptions& g) {
  const int tls_files = !g.tls_certificate.empty() + !g.tls_key.empty() + !g.tls_client_ca.empty();
  if (tls_files != 0 && tls_files != 3) {
    const std::string_view missing = g.tls_certificate.empty() ? "grpc.tls_certificate"
                                     : g.tls_key.empty()       ? "grpc.tls_key"
                                                               : "grpc.tls_client_ca";
    return Bad(missing, "\"\"",
               "mutual TLS needs tls_certificate, tls_key and tls_client_ca together");
  }
  if (g.listen.empty()) {
    if (tls_files != 0) return Bad("grpc.listen", "\"\"", "TLS files are set but no address");
    return absl::OkStatus();
  }
  absl::StatusOr<IpAddress> address = ParseIpAddress(g.listen);
  if (!address.ok()) {
    return Bad("grpc.listen", Quoted(g.listen), "must be an IPv4:port or [IPv6]:port");
  }
  if (tls_files == 3) return absl::OkStatus();
  if (!address->loopback) {
    return Bad("grpc.listen", Quoted(g.listen),
               "an address other than loopback needs mutual TLS (tls_certificate, tls_key, "
               "tls_client_ca)");
  }
  if (g.tcp_tenant.empty()) {
    return Bad("grpc.tcp_tenant", "\"\"",
               "grpc.listen without TLS needs the tenant that all its peers belong to");
  }
  absl::Status valid = ValidateTenantName(g.tcp_tenant);
  if (!valid.ok()) {
    return Bad("grpc.tcp_tenant", Quoted(g.tcp_tenant),
               std::string_view(valid.message().data(), valid.message().size()));
  }
  return absl::OkStatus();
}

absl::Status CheckGrpc(const Config& c) {
  QUARRY_RETURN_IF_ERROR(CheckSocketPath("grpc.socket", c.grpc.socket));
  if (!c.grpc.socket.empty() && c.grpc.socket == c.shm.socket) {
    return Bad("grpc.socket", Quoted(c.grpc.socket), "must differ from shm.socket");
  }
  return CheckGrpcAddress(c.grpc);
}

absl::Status CheckEngineAndMetrics(const Config& c) {
  const std::pair<std::string_view, uint32_t> multiples[] = {
      {"engine.run_tokens", c.engine.run_tokens}, {"engine.task_tokens", c.engine.task_tokens}};
  for (const auto& [key, value] : multiples) {
    if (value % kBlockTokens != 0) {
      return Bad(key, std::to_string(value),
                 absl::StrCat("must be a multiple of ", kBlockTokens, " tokens, one block"));
    }
  }
  if (c.engine.arena.extent_bytes > c.engine.arena.capacity_bytes) {
    return Bad("engine.extent_bytes", Quoted(PrintBytes(c.engine.arena.extent_bytes)),
               absl::StrCat("must not exceed engine.arena_bytes = ",
                            PrintBytes(c.engine.arena.capacity_bytes)));
  }
  if (c.metrics.listen.empty()) return absl::OkStatus();
  absl::StatusOr<IpAddress> address = ParseIpAddress(c.metrics.listen);
  if (!address.ok()) {
    return Bad("metrics.listen", Quoted(c.metrics.listen), "must be an IPv4:port or [IPv6]:port");
  }
  if (!address->loopback && !c.metrics.allow_remote) {
    return Bad("metrics.listen", Quoted(c.metrics.listen),
               "an address other than loopback needs metrics.allow_remote = true");
  }
  return absl::OkStatus();
}

// Writes TOML, one section per prefix before the dot.
class Printer {
 public:
  void Text(std::string_view key, const std::string& v) { Line(key, Quoted(v)); }
  void LevelName(std::string_view key, const std::string& v) { Line(key, Quoted(v)); }
  void Flag(std::string_view key, bool v) { Line(key, v ? "true" : "false"); }
  void Count(std::string_view key, uint32_t v, uint32_t, uint32_t) { Line(key, std::to_string(v)); }
  void Number(std::string_view key, double v, double, double) { Line(key, Decimal(v)); }
  void Bytes(std::string_view key, uint64_t v, uint64_t, uint64_t) {
    Line(key, Quoted(PrintBytes(v)));
  }
  void Mode(std::string_view key, mode_t v) { Line(key, absl::StrFormat("\"0%o\"", v)); }
  template <typename E>
  void Choice(std::string_view key, E v, std::initializer_list<std::string_view> names) {
    Line(key, Quoted(names.begin()[static_cast<int>(v)]));
  }
  void Users(std::string_view key, const std::map<uid_t, std::string>& users) {
    std::string list;
    for (const auto& [uid, tenant] : users) {
      absl::StrAppend(&list, list.empty() ? "" : ", ", "\"", uid, "\" = ", Quoted(tenant));
    }
    Line(key, absl::StrCat("{", list, "}"));
  }
  void UserSet(std::string_view key, const std::set<uid_t>& users) {
    std::string list;
    for (uid_t uid : users) absl::StrAppend(&list, list.empty() ? "" : ", ", uid);
    Line(key, absl::StrCat("[", list, "]"));
  }
  std::string out;

 private:
  void Line(std::string_view key, std::string_view value) {
    const size_t dot = key.find('.');
    if (key.substr(0, dot) != section_) {
      section_ = key.substr(0, dot);
      absl::StrAppend(&out, out.empty() ? "[" : "\n[", View(section_), "]\n");
    }
    absl::StrAppend(&out, View(key.substr(dot + 1)), " = ", View(value), "\n");
  }
  std::string_view section_;
};

}  // namespace

Config DefaultConfig() {
  Config config;
  config.shm.socket = DefaultSocket();
  config.grpc.socket = DefaultSocketDirectory() + "/grpc.sock";
  config.engine.disk.log.scrub_bytes_per_s = 16ull << 20;
  return config;
}

absl::Status ValidateConfig(const Config& config) {
  RangeChecker ranges;
  VisitConfigKeys(ranges, config);
  QUARRY_RETURN_IF_ERROR(ranges.status);
  QUARRY_RETURN_IF_ERROR(CheckDisk(config.engine.disk));
  QUARRY_RETURN_IF_ERROR(CheckShm(config));
  QUARRY_RETURN_IF_ERROR(CheckGrpc(config));
  return CheckEngineAndMetrics(config);
}

std::string PrintConfig(const Config& config) {
  Printer printer;
  VisitConfigKeys(printer, config);
  return printer.out;
}

absl::StatusOr<uint64_t> ParseBytes(std::string_view text) {
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  std::string_view unit(rest, static_cast<size_t>(end - rest));
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  if (error == std::errc() && unit.empty()) return number;
  for (const auto& [name, factor] : kUnits) {
    if (error != std::errc() || unit != name) continue;
    if (number > UINT64_MAX / factor) break;
    return number * factor;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", View(text), "\" is no size; write e.g. \"4GiB\", \"512MiB\", \"64KiB\""));
}

std::string PrintBytes(uint64_t bytes) {
  for (const auto& [name, factor] : kUnits) {
    if (bytes >= factor && bytes % factor == 0) return absl::StrCat(bytes / factor, View(name));
  }
  return absl::StrCat(bytes, "B");
}

}  // namespace quarry
