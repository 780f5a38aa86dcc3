// What is measured where no trace is named.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quarry::perf {

// Made heads of every family, at one length.
struct MadeSet {
  uint32_t tokens = 0, kv_heads = 0;
  uint32_t train_queries = 0;        // positions
  std::vector<std::string> indexes;  // beginnings of names; none: all
};

// Every index at 32,768 tokens, and at 131,072 those that are built in little time. Ends within 30
// minutes on two cores; perf/README.md says what of it takes how long.
std::vector<MadeSet> DefaultSet();
// What it is, for people.
std::string DefaultSetText();

}  // namespace quarry::perf
