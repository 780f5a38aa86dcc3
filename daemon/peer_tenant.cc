#include "daemon/peer_tenant.h"

#include <sys/socket.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/file_descriptor.h"

namespace quarry {

absl::Status ValidateTenantName(std::string_view name) {
  const absl::string_view shown(name.data(), name.size());
  if (name.empty() || name.size() > 63) {
    return absl::InvalidArgumentError(absl::StrCat("tenant name \"", shown, "\" has ", name.size(),
                                                   " bytes; 1 to 63 are allowed"));
  }
  for (char c : name) {
    const bool allowed = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                         (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
    if (!allowed) {
      return absl::InvalidArgumentError(
          absl::StrCat("tenant name \"", shown, "\" has a byte outside [A-Za-z0-9._-]"));
    }
  }
  if (name.substr(0, 4) == "uid-") {
    return absl::InvalidArgumentError(
        absl::StrCat("tenant name \"", shown,
                     "\" starts with \"uid-\", which is kept for users without a tenant"));
  }
  return absl::OkStatus();
}

PeerTenants::PeerTenants(PeerTenantOptions options, uid_t own_user)
    : options_(std::move(options)), own_user_(own_user) {}

absl::StatusOr<PeerIdentity> PeerTenants::OfUser(uid_t uid) const {
  const bool admin = uid == own_user_ || options_.admins.contains(uid);
  const auto it = options_.tenants.find(uid);
  if (it != options_.tenants.end()) return PeerIdentity{it->second, admin};
  if (options_.refuse_unknown_users) {
    return absl::PermissionDeniedError(absl::StrCat("user ", uid, " has no tenant here"));
  }
  return PeerIdentity{absl::StrCat("uid-", uid), admin};
}

absl::StatusOr<PeerIdentity> PeerTenants::OfCertificate(std::string_view common_name) const {
  if (absl::Status valid = ValidateTenantName(common_name); !valid.ok()) {
    return absl::UnauthenticatedError(
        absl::StrCat("the certificate's common name is no tenant: ", valid.message()));
  }
  return PeerIdentity{std::string(common_name), /*admin=*/false};
}

absl::StatusOr<PeerCredentials> CredentialsOf(int socket_fd) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  if (getsockopt(socket_fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    return ErrnoStatus(errno, "SO_PEERCRED");
  }
  return PeerCredentials{credentials.pid, credentials.uid};
}

}  // namespace quarry
