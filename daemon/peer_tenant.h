// Who a peer is: its tenant, and whether it may administer the daemon. The tenant comes from the
// kernel's credentials of the peer or from its certificate, never from a request.
#pragma once

#include <sys/types.h>

#include <map>
#include <set>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace quarry {

struct PeerTenantOptions {
  std::map<uid_t, std::string> tenants;  // of users; several users may share one tenant
  bool refuse_unknown_users = false;     // false: tenant "uid-<n>"
  std::set<uid_t> admins;                // besides the daemon's own user
};

struct PeerIdentity {
  std::string tenant;
  bool admin = false;
};

// 1 to 63 of [A-Za-z0-9._-], not starting with "uid-" (those names belong to users without a
// tenant of their own).
absl::Status ValidateTenantName(std::string_view name);

// Immutable, so any thread.
class PeerTenants {
 public:
  // `own_user`: the daemon's effective user, always an administrator.
  PeerTenants(PeerTenantOptions options, uid_t own_user);

  // PermissionDenied for a user without a tenant when unknown users are refused.
  absl::StatusOr<PeerIdentity> OfUser(uid_t uid) const;
  // The common name of a verified client certificate.
  absl::StatusOr<PeerIdentity> OfCertificate(std::string_view common_name) const;

 private:
  const PeerTenantOptions options_;
  const uid_t own_user_;
};

// The credentials of a connected Unix socket's peer, as the kernel noted them at connect().
struct PeerCredentials {
  pid_t pid = 0;
  uid_t uid = 0;
};
absl::StatusOr<PeerCredentials> CredentialsOf(int socket_fd);

}  // namespace quarry
