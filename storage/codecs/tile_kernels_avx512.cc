// AVX-512.
#include "storage/codecs/tile_coding.h"

namespace quarry::codecs {

const Table& Avx512Table() {
  static constexpr Table kTable = {.name = "avx512", .encode = Encode, .decode = Decode};
  return kTable;
}

}  // namespace quarry::codecs
