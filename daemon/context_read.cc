// Copying a context's K and V out.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "daemon/context.h"
#include "proto/status_macros.h"

namespace quarry {

absl::Status Context::Read(uint32_t layer, TokenRange range, std::span<std::byte> k,
                           std::span<std::byte> v) const {
  const KvShape& s = shape();
  if (layer >= s.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("context ", params_.id.value, ": layer ", layer, " of ", s.layers, " layers"));
  }
  const uint32_t available = AvailableTokens(layer, 0, s.kv_heads);
  if (range.lo > range.hi || range.hi > available) {
    return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value, ": tokens [",
                                                   range.lo, ", ", range.hi, ") of layer ", layer,
                                                   ", which has ", available));
  }
  const size_t vector_bytes = s.vector_bytes();
  const size_t token_bytes = vector_bytes * s.kv_heads;
  const size_t wanted = range.size() * token_bytes;
  if (k.size() != wanted || v.size() != wanted) {
    return absl::InvalidArgumentError(absl::StrCat("context ", params_.id.value, ": K and V of ",
                                                   k.size(), " and ", v.size(), " bytes for ",
                                                   wanted));
  }
  QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<const BlockTable> table, Table());
  for (uint32_t lo = range.lo; lo < range.hi;) {
    const uint32_t block = lo / kBlockTokens;
    const uint32_t hi = std::min(range.hi, (block + 1) * kBlockTokens);
    if (absl::Status verified = table->blocks[block]->Verify(); !verified.ok()) {
      // Nor may a context that computes these tokens again find what was made of the broken bytes.
      services_.runs->Forget(table->blocks[block]->handle());
      return verified;
    }
    const size_t part_bytes = s.kv_heads * size_t{kBlockTokens} * vector_bytes;
    const uint64_t first_strip = s.strip_offset(layer, KvPart::kKey, 0);
    std::vector<std::byte> copied;  // of a paged block: all of the layer
    const std::byte* strips = nullptr;
    if (PagedBlock* const paged = table->blocks[block]->paged(); paged != nullptr) {
      copied.resize(2 * part_bytes);
      const WantedBytes all{first_strip, copied};
      QUARRY_RETURN_IF_ERROR(paged->CopyOnce({&all, 1}));
      strips = copied.data();
    } else {
      strips = table->blocks[block]->data() + first_strip;
    }
    for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
      std::byte* const out =
          (part == KvPart::kKey ? k : v).data() + size_t{lo - range.lo} * token_bytes;
      for (uint32_t h = 0; h < s.kv_heads; ++h) {
        const std::byte* const strip = strips + (s.strip_offset(layer, part, h) - first_strip) +
                                       size_t{lo % kBlockTokens} * vector_bytes;
        for (uint32_t t = 0; t < hi - lo; ++t) {
          std::memcpy(out + t * token_bytes + h * vector_bytes, strip + t * vector_bytes,
                      vector_bytes);
        }
      }
    }
    if (const Rotation* turn = table->TurnAt(lo); turn != nullptr) {
      turn->TurnStoredKeys(k.data() + size_t{lo - range.lo} * token_bytes,
                           size_t{hi - lo} * s.kv_heads, s.head_dim, s.dtype);
    }
    lo = hi;
  }
  return absl::OkStatus();
}

}  // namespace quarry
