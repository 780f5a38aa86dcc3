// Changed texts for the reader of configurations: none crashes it, and what it takes is valid and
// says the same when it is printed and read again.
//
//   QUARRY_FUZZ_RUNS=N   executions
#include <gtest/gtest.h>

#include <algorithm>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "daemon/config.h"
#include "tests/support/byte_mutator.h"
#include "tests/support/given_number.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

constexpr std::string_view kDisk =
    "[disk]\npath = \"/tmp/disk\"\nbytes = \"8GiB\"\nsegment_bytes = \"64MiB\"\n"
    "[tenants.users]\n1000 = \"someone\"\n";

class ConfigFuzzTest : public ::testing::Test {
 protected:
  // Some sections with some of their keys; now and then a key has another's value, or an odd one.
  std::string Text() {
    static constexpr std::string_view kOdd[] = {
        "0", "-1", "9223372036854775807", "1e308", "nan", "\"\"", "\"16EiB\"", "true", "[]", "{}"};
    std::string text;
    bool section_taken = false;
    for (const std::string& line : lines_) {
      if (line.empty()) continue;
      const bool section = line[0] == '[';
      if (section) section_taken = mutator_.Below(3) != 0;
      if (!section_taken || (!section && mutator_.Below(2) == 0)) continue;
      std::string value = line.substr(std::min(line.size(), line.find('=')));
      std::string key = line.substr(0, line.size() - value.size());
      if (!value.empty() && mutator_.Below(40) == 0) {
        const std::string& other = lines_[mutator_.Below(lines_.size())];
        value = other.substr(std::min(other.size(), other.find('=')));
      }
      if (!value.empty() && mutator_.Below(40) == 0) {
        value = "= " + std::string(kOdd[mutator_.Below(std::size(kOdd))]);
      }
      absl::StrAppend(&text, key, value, "\n");
    }
    return text;
  }

  const std::vector<std::string> lines_ =
      absl::StrSplit(PrintConfig(DefaultConfig()) + std::string(kDisk), '\n');
  testing::ByteMutator mutator_{Seed()};
};

TEST_F(ConfigFuzzTest, AnyTextIsRefusedOrSaysTheSameAgain) {
  const uint64_t runs = FuzzRuns(3000);
  uint64_t taken = 0;
  for (uint64_t run = 0; run < runs && !HasFailure(); ++run) {
    std::string text = Text();
    const uint64_t changes = text.empty() ? 0 : mutator_.Below(4);
    for (uint64_t n = 1; n < changes; ++n) {
      mutator_.Change(std::as_writable_bytes(std::span(text)));
    }
    const auto config = ParseConfig(text, "fuzz");
    if (!config.ok()) {
      EXPECT_TRUE(absl::IsInvalidArgument(config.status())) << config.status() << "\n" << text;
      continue;
    }
    ++taken;
    EXPECT_TRUE(ValidateConfig(*config).ok()) << text;
    const std::string printed = PrintConfig(*config);
    const auto again = ParseConfig(printed, "printed");
    ASSERT_TRUE(again.ok()) << again.status() << "\n" << printed;
    EXPECT_EQ(PrintConfig(*again), printed) << text;
  }
  std::printf("%lu executions, %lu taken\n", runs, taken);
  EXPECT_GT(taken, runs / 100);
}

}  // namespace
}  // namespace quarry
