#include "storage/log/log_key.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

namespace quarry {
namespace {

class LogKeyTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::optional<LogKey>> FromFile(const std::string& content, mode_t mode = 0600) {
    path_ = ::testing::TempDir() + "/log_key_test.key";
    std::remove(path_.c_str());
    std::ofstream(path_, std::ios::binary) << content;
    EXPECT_EQ(chmod(path_.c_str(), mode), 0);
    return LoadLogKey({.file = path_, .environment = {}});
  }
  static void ExpectKey(const absl::StatusOr<std::optional<LogKey>>& key, uint8_t byte) {
    ASSERT_TRUE(key.ok()) << key.status();
    ASSERT_TRUE(key->has_value());
    for (const uint8_t b : (*key)->secret.bytes()) EXPECT_EQ(b, byte);
  }
  void ExpectRefused(const absl::StatusOr<std::optional<LogKey>>& key) {
    ASSERT_TRUE(absl::IsInvalidArgument(key.status())) << key.status();
    EXPECT_NE(std::string(key.status().message()).find(path_), std::string::npos) << key.status();
    EXPECT_EQ(std::string(key.status().message()).find("abab"), std::string::npos) << "told";
  }
  std::string path_;
};

TEST_F(LogKeyTest, NoneIsAskedFor) {
  const auto key = LoadLogKey({});
  ASSERT_TRUE(key.ok());
  EXPECT_FALSE(key->has_value());
}

TEST_F(LogKeyTest, FilesHaveBytesOrDigits) {
  ExpectKey(FromFile(std::string(32, '\x07')), 7);
  std::string digits(64, 'a');
  for (size_t i = 1; i < digits.size(); i += 2) digits[i] = 'B';
  ExpectKey(FromFile(digits), 0xab);
  ExpectKey(FromFile(digits + "\n", 0400), 0xab);
  for (const std::string& wrong :
       {std::string(), digits.substr(1), digits + "0", digits + "\n\n", digits.substr(0, 31),
        digits.substr(0, 63) + "g", std::string(10000, 'a')}) {
    SCOPED_TRACE(wrong.size());
    ExpectRefused(FromFile(wrong));
  }
}

TEST_F(LogKeyTest, FilesThatOthersMayOpenAreRefused) {
  for (const mode_t mode : {0640, 0604, 0620, 0610, 0666}) {
    SCOPED_TRACE(mode);
    ExpectRefused(FromFile(std::string(32, 'a'), mode));
  }
}

TEST_F(LogKeyTest, WhatIsNotThereIsNamed) {
  absl::Status missing = LoadLogKey({.file = "/nowhere/key", .environment = {}}).status();
  EXPECT_TRUE(absl::IsNotFound(missing)) << missing;
  EXPECT_NE(std::string(missing.message()).find("/nowhere/key"), std::string::npos) << missing;
  unsetenv("QUARRY_NO_KEY");
  missing = LoadLogKey({.file = {}, .environment = "QUARRY_NO_KEY"}).status();
  EXPECT_TRUE(absl::IsNotFound(missing)) << missing;
  EXPECT_NE(std::string(missing.message()).find("QUARRY_NO_KEY"), std::string::npos) << missing;
}

TEST_F(LogKeyTest, VariablesHaveDigits) {
  setenv("QUARRY_A_KEY", std::string(64, '3').c_str(), 1);
  ExpectKey(LoadLogKey({.file = {}, .environment = "QUARRY_A_KEY"}), 0x33);
  setenv("QUARRY_A_KEY", "33", 1);
  EXPECT_TRUE(
      absl::IsInvalidArgument(LoadLogKey({.file = {}, .environment = "QUARRY_A_KEY"}).status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(LoadLogKey({.file = "/a", .environment = "QUARRY_A_KEY"}).status()));
}

}  // namespace
}  // namespace quarry
