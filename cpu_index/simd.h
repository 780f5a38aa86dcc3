// Picks the kernels for this processor, once.
#pragma once

#include "cpu_index/kernels.h"
#include "proto/simd_level.h"

namespace quarry {

const kernels::Table& KernelsOf(SimdLevel level);

// The kernels in use: those of SimdLevelInUse().
const kernels::Table& Kernels();

}  // namespace quarry
