#include "proto/default_socket.h"

#include <unistd.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"

namespace quarry {

std::string DefaultSocketDirectory() {
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  const bool own = geteuid() != 0 && runtime != nullptr && runtime[0] == '/';
  return own ? absl::StrCat(runtime, "/quarry") : "/run/quarry";
}

std::string DefaultSocket() { return DefaultSocketDirectory() + "/quarryd.sock"; }

}  // namespace quarry
