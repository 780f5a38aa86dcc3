#include "client/extents.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {

ExtentMap::~ExtentMap() {
  for (const auto& [extent, mapping] : mappings_) {
    munmap(const_cast<std::byte*>(mapping.data), mapping.bytes);
  }
}

absl::StatusOr<ExtentMap::Mapping> ExtentMap::Map(uint32_t extent) {
  Mapping mapping;
  QUARRY_ASSIGN_OR_RETURN(OwnedFd fd, channel_.FetchExtent(extent, &mapping.bytes));
  // Faulted in at once: page by page it costs reads of large blocks a third of their rate.
  void* at = mmap(nullptr, mapping.bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (at == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("mapping extent ", extent, " of ",
                                                     mapping.bytes, " bytes: ",
                                                     std::strerror(errno)));
  }
  mapping.data = static_cast<const std::byte*>(at);
  return mapping;
}

absl::StatusOr<const std::byte*> ExtentMap::Find(uint32_t extent, uint64_t offset,
                                                 uint64_t bytes) {
  absl::MutexLock lock(&mutex_);
  auto it = mappings_.find(extent);
  if (it == mappings_.end()) {
    QUARRY_ASSIGN_OR_RETURN(Mapping mapping, Map(extent));
    it = mappings_.emplace(extent, mapping).first;
  }
  if (offset > it->second.bytes || bytes > it->second.bytes - offset) {
    return absl::DataLossError(absl::StrCat("lease of bytes [", offset, ", ", offset + bytes,
                                            ") of extent ", extent, " of ", it->second.bytes));
  }
  return it->second.data + offset;
}

}  // namespace quarry
