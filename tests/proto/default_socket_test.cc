#include "proto/default_socket.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "tests/daemon/other_user.h"

namespace quarry {
namespace {

// For an ordinary user: another one, where this is root.
std::string OrdinarySocket() {
  if (!testing::IsRoot()) return DefaultSocket();
  std::string out;
  testing::AsUser(65534, [&] { out = DefaultSocket(); });
  return out;
}

TEST(DefaultSocketTest, LiesInTheRuntimeDirectoryOfAnOrdinaryUser) {
  setenv("XDG_RUNTIME_DIR", "/run/user/65534", 1);
  EXPECT_EQ(OrdinarySocket(), "/run/user/65534/quarry/quarryd.sock");
  if (testing::IsRoot()) {
    EXPECT_EQ(DefaultSocket(), "/run/quarry/quarryd.sock");
  }
}

TEST(DefaultSocketTest, IsTheSystemsWithoutARuntimeDirectory) {
  unsetenv("XDG_RUNTIME_DIR");
  EXPECT_EQ(OrdinarySocket(), "/run/quarry/quarryd.sock");
  setenv("XDG_RUNTIME_DIR", "run", 1);  // relative: to be ignored
  EXPECT_EQ(OrdinarySocket(), "/run/quarry/quarryd.sock");
}

}  // namespace
}  // namespace quarry
