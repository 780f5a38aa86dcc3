#include "storage/crash_point.h"

#ifdef QUARRY_CRASH_POINTS
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "proto/check.h"

namespace quarry {
namespace {

struct Armed {
  std::string_view name;  // of the environment, which lives as long as the process
  uint64_t meeting = 1;

  Armed() {
    const char* const given = std::getenv("QUARRY_CRASH_POINT");
    if (given == nullptr) return;
    const std::string_view text = given;
    const size_t colon = text.find(':');
    name = text.substr(0, colon);
    if (colon == std::string_view::npos) return;
    const auto end = std::from_chars(text.data() + colon + 1, text.data() + text.size(), meeting);
    QUARRY_CHECK(end.ec == std::errc() && end.ptr == text.data() + text.size());
  }
};

}  // namespace

void CrashPoint(CrashPointName point) {
  static const Armed armed;
  static std::atomic<uint64_t> meetings{0};
  if (point.name() != armed.name || ++meetings != armed.meeting) return;
  const std::string line = "crash point " + std::string(point.name()) + "\n";
  (void)!write(STDERR_FILENO, line.data(), line.size());
  kill(getpid(), SIGKILL);
  while (true) pause();
}

}  // namespace quarry
#endif
