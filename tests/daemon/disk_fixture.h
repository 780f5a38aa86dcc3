// Engines with a disk that tests start again and again.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>

#include "tests/daemon/engine_fixture.h"

namespace quarry {

// The disk is a file that ends with the test.
class EngineDiskTest : public EngineTest {
 protected:
  void SetUp() override {
    directory_ =
        std::filesystem::temp_directory_path() / ("quarry-engine-" + std::to_string(getpid()));
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override {
    engine_ = nullptr;
    std::filesystem::remove_all(directory_);
  }
  std::string disk() const { return directory_ / "kv.quarry"; }
  EngineOptions DiskOptions(uint32_t run_tokens, uint32_t first_run_token) const {
    EngineOptions options = ClusterOptions(run_tokens, first_run_token);
    options.disk.file.path = disk();
    options.disk.file.bytes = 128 << 20;
    options.disk.log.segment_bytes = 4 << 20;
    options.disk.indexes.look_every = absl::Milliseconds(50);
    return options;
  }

  std::filesystem::path directory_;
};

}  // namespace quarry
