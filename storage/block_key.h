// What a block is found by.
#pragma once

#include <string>

#include "proto/types.h"

namespace quarry {

struct BlockKey {
  BlockId id;
  BlockId parent;  // all zero: a root, or an engine's block
  NamespaceDigest name_space;
  std::string full_key;  // what was hashed, compared on every find: collisions are misses
};

}  // namespace quarry
