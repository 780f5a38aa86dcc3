#include "proto/simd_level.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/check.h"

namespace quarry {
namespace {

bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
}

// CPUID says that the processor has tiles; the kernel must also let this process use them.
bool HasAmx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!HasAvx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

std::vector<SimdLevel> DetectLevels() {
  std::vector<SimdLevel> levels = {SimdLevel::kScalar};
  if (HasAvx2()) levels.push_back(SimdLevel::kAvx2);
  if (HasAvx512()) levels.push_back(SimdLevel::kAvx512);
  if (HasAmx()) levels.push_back(SimdLevel::kAmx);
  return levels;
}

}  // namespace

std::string_view SimdLevelName(SimdLevel level) {
  switch (level) {
    case SimdLevel::kScalar:
      return "scalar";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAmx:
      return "amx";
  }
  return "unknown";
}

const std::vector<SimdLevel>& SupportedSimdLevels() {
  static const auto& levels = *new std::vector<SimdLevel>(DetectLevels());
  return levels;
}

absl::StatusOr<SimdLevel> ChooseSimdLevel() {
  const std::vector<SimdLevel>& supported = SupportedSimdLevels();
  const char* forced = std::getenv("QUARRY_SIMD");
  if (forced == nullptr || *forced == '\0') return supported.back();
  for (SimdLevel level :
       {SimdLevel::kScalar, SimdLevel::kAvx2, SimdLevel::kAvx512, SimdLevel::kAmx}) {
    if (SimdLevelName(level) != forced) continue;
    if (std::find(supported.begin(), supported.end(), level) != supported.end()) return level;
    return absl::UnavailableError(
        absl::StrCat("QUARRY_SIMD=", forced, ": this machine does not have ", forced));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("QUARRY_SIMD=", forced, ": must be scalar, avx2, avx512 or amx"));
}

SimdLevel SimdLevelInUse() {
  static const SimdLevel level = [] {
    const absl::StatusOr<SimdLevel> chosen = ChooseSimdLevel();
    QUARRY_CHECK(chosen.ok());
    return *chosen;
  }();
  return level;
}

}  // namespace quarry
