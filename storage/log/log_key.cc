#include "storage/log/log_key.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

int DigitOf(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

absl::StatusOr<Secret> FromHex(std::string_view text, const std::string& origin) {
  std::array<uint8_t, Secret::kBytes> bytes;
  bool right = text.size() == 2 * bytes.size();
  for (size_t i = 0; right && i < bytes.size(); ++i) {
    const int high = DigitOf(text[2 * i]), low = DigitOf(text[2 * i + 1]);
    right = high >= 0 && low >= 0;
    bytes[i] = static_cast<uint8_t>(high << 4 | low);
  }
  absl::StatusOr<Secret> out = absl::InvalidArgumentError(
      absl::StrCat(origin, " has no key of 64 hex digits, but ", text.size(), " characters"));
  if (right) out.emplace(std::span<const uint8_t, Secret::kBytes>(bytes));
  Wipe(std::as_writable_bytes(std::span(bytes)));
  return out;
}

absl::Status FileError(const std::string& path) {
  const std::string text = absl::StrCat("key file ", path, ": ", std::strerror(errno));
  if (errno == ENOENT) return absl::NotFoundError(text);
  if (errno == EACCES || errno == EPERM) return absl::PermissionDeniedError(text);
  return absl::UnavailableError(text);
}

absl::StatusOr<Secret> FromOpenFile(int file, const std::string& path) {
  const std::string origin = absl::StrCat("key file ", path);
  struct stat info;
  if (fstat(file, &info) != 0) return FileError(path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(origin + " is no file");
  if ((info.st_mode & 077) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(origin, " may be opened by others than its owner: chmod 600 it"));
  }
  std::array<char, 2 * Secret::kBytes + 2> text;  // a newline, and one more that is too many
  size_t n = 0;
  while (n < text.size()) {
    const ssize_t got = read(file, text.data() + n, text.size() - n);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError(path);
    if (got == 0) break;
    n += static_cast<size_t>(got);
  }
  absl::StatusOr<Secret> out = absl::InternalError("");
  if (n == Secret::kBytes) {
    out.emplace(std::span<const uint8_t, Secret::kBytes>(
        reinterpret_cast<const uint8_t*>(text.data()), Secret::kBytes));
  } else {
    if (n == 2 * Secret::kBytes + 1 && text[n - 1] == '\n') --n;
    out = FromHex({text.data(), n}, absl::StrCat(origin, " has no 32 bytes, and"));
  }
  Wipe(std::as_writable_bytes(std::span(text)));
  return out;
}

absl::StatusOr<Secret> FromFile(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return FileError(path);
  absl::StatusOr<Secret> out = FromOpenFile(file, path);
  close(file);
  return out;
}

absl::StatusOr<Secret> FromEnvironment(const std::string& name) {
  const std::string origin = absl::StrCat("environment variable ", name);
  const char* const text = std::getenv(name.c_str());
  if (text == nullptr) return absl::NotFoundError(origin + " is not set");
  return FromHex(text, origin);
}

}  // namespace

absl::StatusOr<std::optional<LogKey>> LoadLogKey(const LogKeyOptions& options) {
  if (options.file.empty() && options.environment.empty()) return std::nullopt;
  if (!options.file.empty() && !options.environment.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("a key in file ", options.file, " and one in ",
                                                   options.environment, ": which?"));
  }
  absl::StatusOr<Secret> secret =
      options.file.empty() ? FromEnvironment(options.environment) : FromFile(options.file);
  QUARRY_RETURN_IF_ERROR(secret.status());
  return LogKey{*std::move(secret), options.file.empty()
                                        ? absl::StrCat("environment variable ", options.environment)
                                        : absl::StrCat("key file ", options.file)};
}

}  // namespace quarry
