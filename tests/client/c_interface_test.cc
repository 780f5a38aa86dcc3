// The C interface, used by a C11 program, against a real daemon.
#include <gtest/gtest.h>

#include "tests/client/c_session.h"
#include "tests/support/daemon_process.h"

namespace quarry {
namespace {

class CInterfaceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::DaemonOptions options;
    options.arguments = {"--arena-bytes", "128MiB"};
    auto daemon = testing::DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }
  // Empty when the session went as it should.
  std::string Run(const char* (*session)(const char*)) const {
    const char* problem = session(daemon_->socket_path().c_str());
    return problem == nullptr ? "" : problem;
  }
  std::unique_ptr<testing::DaemonProcess> daemon_;
};

TEST_F(CInterfaceTest, AContextIsOpenedAppendedAttendedForkedAndRead) {
  EXPECT_EQ(Run(c_opens_appends_attends_and_reads), "");
}

TEST_F(CInterfaceTest, ADocumentIsReusedAtAnotherPositionAndFlagged) {
  EXPECT_EQ(Run(c_reuses_at_another_position), "");
}

TEST_F(CInterfaceTest, BlocksArePutLeasedAndOutliveTheClient) {
  EXPECT_EQ(Run(c_puts_and_leases), "");
}

TEST_F(CInterfaceTest, ErrorsHaveTheirCodeAndText) {
  EXPECT_EQ(Run(c_gets_codes_and_texts_for_errors), "");
}

}  // namespace
}  // namespace quarry
