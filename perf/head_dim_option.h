// The check of options that give a head_dim.
#pragma once

#include <cstdint>
#include <string>

#include <CLI/CLI.hpp>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "proto/head_dim.h"

namespace quarry::perf {

inline CLI::Validator HeadDim() {
  const std::string wanted = absl::StrCat("multiple of ", kHeadDimStep, " up to ", kMaxHeadDim);
  return CLI::Validator(
      [wanted](const std::string& text) {
        uint32_t dim = 0;
        return absl::SimpleAtoi(text, &dim) && IsHeadDim(dim)
                   ? std::string()
                   : absl::StrCat(text, " is no ", wanted);
      },
      wanted);
}

}  // namespace quarry::perf
