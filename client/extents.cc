#include "client/extents.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Each question is a round trip on the socket.
constexpr int kAskedAtOnce = 4;

absl::StatusOr<std::shared_ptr<const MappedExtent>> Map(ClientChannel& channel, uint32_t extent) {
  uint64_t bytes = 0;
  QUARRY_ASSIGN_OR_RETURN(OwnedFd fd, channel.FetchExtent(extent, &bytes));
  // Faulted in at once: page by page it costs reads of large blocks a third of their rate.
  void* at = mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (at == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("mapping extent ", extent, " of ", bytes,
                                                     " bytes: ", std::strerror(errno)));
  }
  return std::make_shared<const MappedExtent>(static_cast<const std::byte*>(at), bytes);
}

}  // namespace

MappedExtent::~MappedExtent() { munmap(const_cast<std::byte*>(data_), bytes_); }

absl::StatusOr<std::shared_ptr<const MappedExtent>> ExtentMap::Find(uint32_t extent) {
  absl::MutexLock lock(&mutex_);
  auto it = mappings_.find(extent);
  if (it == mappings_.end()) {
    QUARRY_ASSIGN_OR_RETURN(std::shared_ptr<const MappedExtent> mapped, Map(channel_, extent));
    DropGone();
    it = mappings_.emplace(extent, std::move(mapped)).first;
  }
  return it->second;
}

void ExtentMap::DropGone() {
  int asked = 0;
  for (size_t left = mappings_.size(); left > 0 && asked < kAskedAtOnce; --left) {
    auto it = mappings_.lower_bound(next_asked_);
    if (it == mappings_.end()) it = mappings_.begin();
    next_asked_ = it->first + 1;
    if (it->second.use_count() > 1) continue;  // a block in it is leased
    ++asked;
    uint64_t bytes = 0;
    if (absl::IsNotFound(channel_.FetchExtent(it->first, &bytes).status())) mappings_.erase(it);
  }
}

}  // namespace quarry
