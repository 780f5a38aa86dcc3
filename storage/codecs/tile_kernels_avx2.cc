// AVX2.
#include "storage/codecs/tile_coding.h"

namespace quarry::codecs {

const Table& Avx2Table() {
  static constexpr Table kTable = {.name = "avx2", .encode = Encode, .decode = Decode};
  return kTable;
}

}  // namespace quarry::codecs
