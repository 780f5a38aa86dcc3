// The portable level.
#include "storage/codecs/tile_coding.h"

namespace quarry::codecs {

const Table& ScalarTable() {
  static constexpr Table kTable = {.name = "scalar", .encode = Encode, .decode = Decode};
  return kTable;
}

}  // namespace quarry::codecs
