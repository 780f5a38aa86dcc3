// Which vector instructions this processor has. Every set of kernels has a table per level and is
// chosen by these (cpu_index/simd.h, storage/codecs/kv_codecs.h).
#pragma once

#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace quarry {

enum class SimdLevel { kScalar, kAvx2, kAvx512, kAmx };

std::string_view SimdLevelName(SimdLevel level);

// Levels that this processor and kernel support, lowest first. AMX asks for the permission to use
// its tile state, which the kernel grants to the whole process.
const std::vector<SimdLevel>& SupportedSimdLevels();

// The highest supported level, or the one that QUARRY_SIMD=scalar|avx2|avx512|amx forces.
// InvalidArgument names an unknown level, Unavailable one that this machine lacks.
absl::StatusOr<SimdLevel> ChooseSimdLevel();

// ChooseSimdLevel() at the first call. A level that cannot be used ends the process; programs call
// ChooseSimdLevel() at start to say so properly.
SimdLevel SimdLevelInUse();

}  // namespace quarry
