#include "daemon/grpc_peers.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace quarry {
namespace {

FileDescriptor AnyDescriptor() { return FileDescriptor(eventfd(0, EFD_CLOEXEC)); }
std::string PeerOf(int number) { return "fd:" + std::to_string(number); }

constexpr absl::Time kStart = absl::UnixEpoch();

TEST(GrpcPeersTest, NumbersGoUpAndAreNotReusedWhileTheirCallsMayLinger) {
  GrpcPeers peers({900, 903});
  for (int n = 900; n <= 903; ++n) {
    const auto placed = peers.Place(AnyDescriptor(), {"t" + std::to_string(n)}, kStart);
    ASSERT_TRUE(placed.ok()) << placed.status();
    EXPECT_EQ(*placed, n);
    close(n);  // as gRPC does at the connection's end
    peers.Retire(n, kStart);
    EXPECT_FALSE(peers.Find(PeerOf(n)).has_value());
  }
  EXPECT_EQ(peers.Place(AnyDescriptor(), {"x"}, kStart + absl::Seconds(59)).status().code(),
            absl::StatusCode::kResourceExhausted);
  const auto later = peers.Place(AnyDescriptor(), {"x"}, kStart + GrpcPeers::kQuarantine);
  ASSERT_TRUE(later.ok());
  EXPECT_EQ(*later, 900);
  EXPECT_EQ(peers.Find(PeerOf(900))->tenant, "x");
  close(900);
}

TEST(GrpcPeersTest, LiveNumbersAndNumbersOfOthersAreSkipped) {
  GrpcPeers peers({910, 913});
  const FileDescriptor somebodys(fcntl(0, F_DUPFD_CLOEXEC, 911));
  ASSERT_EQ(somebodys.get(), 911);
  EXPECT_EQ(*peers.Place(AnyDescriptor(), {"a"}, kStart), 910);
  EXPECT_EQ(*peers.Place(AnyDescriptor(), {"b"}, kStart), 912);
  EXPECT_EQ(*peers.Place(AnyDescriptor(), {"c"}, kStart), 913);
  EXPECT_FALSE(peers.Place(AnyDescriptor(), {"d"}, kStart).ok());
  EXPECT_EQ(peers.Find(PeerOf(910))->tenant, "a");
  EXPECT_EQ(peers.Find(PeerOf(912))->tenant, "b");
  EXPECT_FALSE(peers.Find(PeerOf(911)).has_value());
  for (const int n : {910, 912, 913}) close(n);
}

TEST(GrpcPeersTest, OnlyItsOwnSpellingOfAPeerIsFound) {
  GrpcPeers peers({920, 921});
  ASSERT_TRUE(peers.Place(AnyDescriptor(), {"a"}, kStart).ok());
  EXPECT_TRUE(peers.Find("fd:920").has_value());
  for (const char* other : {"", "fd:", "920", "ipv4:127.0.0.1:920", "fd:920x", "unix:fd:920"}) {
    EXPECT_FALSE(peers.Find(other).has_value()) << other;
  }
  close(920);
}

TEST(GrpcPeersTest, TheDefaultRangeLiesWithinTheLimit) {
  const GrpcPeers::Range range = GrpcPeers::DefaultRange();
  EXPECT_LT(range.first, range.last);
  const FileDescriptor highest(fcntl(0, F_DUPFD_CLOEXEC, range.last));
  EXPECT_EQ(highest.get(), range.last);
}

}  // namespace
}  // namespace quarry
