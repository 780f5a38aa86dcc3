// What tests of the tiny models have in common.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace quarry {

// A model's folder as a part of a test's name, which has no dashes.
inline std::string TinyModelName(const ::testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

}  // namespace quarry
