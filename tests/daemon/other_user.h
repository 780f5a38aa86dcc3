// Connecting as another user, for tests that run as root.
#pragma once

#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <thread>

namespace quarry::testing {

inline bool IsRoot() { return geteuid() == 0; }

// Runs f on a thread whose effective user is `uid` (the raw system call changes one thread only,
// and the kernel notes a thread's user at connect()).
template <typename F>
void AsUser(uid_t uid, F f) {
  std::thread([&] {
    syscall(SYS_setresgid, -1, uid, -1);
    syscall(SYS_setresuid, -1, uid, -1);
    f();
  }).join();
}

// A connected socket, or -1.
inline int ConnectUnix(const std::string& path, int type) {
  const int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}

}  // namespace quarry::testing
