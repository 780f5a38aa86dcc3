#include "storage/extent.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <numa.h>
#include <numaif.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/slot_size.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace quarry {
namespace {

// Errors of system calls, in one place.
absl::Status SystemError(const char* call, uint64_t bytes) {
  const int error = errno;
  std::string message =
      absl::StrCat("arena: ", call, " for an extent of ", bytes, " bytes: ", std::strerror(error));
  if (error == EMFILE || error == ENFILE) {
    absl::StrAppend(&message, " (one descriptor per extent: raise LimitNOFILE or the extent size)");
    return absl::ResourceExhaustedError(message);
  }
  return error == ENOMEM ? absl::ResourceExhaustedError(message) : absl::InternalError(message);
}

bool ManyNumaNodes() { return numa_available() >= 0 && numa_num_configured_nodes() > 1; }

}  // namespace

ExtentDescriptorHandle::~ExtentDescriptorHandle() { close(fd_); }

absl::StatusOr<std::unique_ptr<Extent>> Extent::Create(const ExtentOptions& options) {
  std::unique_ptr<Extent> extent(new Extent(options));
  QUARRY_RETURN_IF_ERROR(extent->Map());
  if (options.prefault) QUARRY_RETURN_IF_ERROR(extent->Prefault());
  QUARRY_RETURN_IF_ERROR(extent->Seal());
  return extent;
}

Extent::~Extent() {
  if (data_ != nullptr) munmap(data_, options_.bytes);
}

absl::Status Extent::Map() {
  unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (options_.page_bytes == kHugePageBytes) flags |= MFD_HUGETLB | MFD_HUGE_2MB;
  const int fd = memfd_create("quarry-extent", flags);
  if (fd < 0) return SystemError("memfd_create", options_.bytes);
  descriptor_ = std::make_shared<const ExtentDescriptorHandle>(fd);
  if (ftruncate(fd, static_cast<off_t>(options_.bytes)) != 0) {
    return SystemError("ftruncate", options_.bytes);
  }
  void* data = mmap(nullptr, options_.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return SystemError("mmap", options_.bytes);
  data_ = static_cast<std::byte*>(data);
  if (ManyNumaNodes()) {
    // Preferred, not bound: a full node must slow us down, not kill us. Before the first touch.
    bitmask* nodes = numa_allocate_nodemask();
    numa_bitmask_setbit(nodes, options_.numa_node);
    mbind(data_, options_.bytes, MPOL_PREFERRED, nodes->maskp, nodes->size + 1, 0);
    numa_free_nodemask(nodes);
  }
  madvise(data_, options_.bytes, MADV_HUGEPAGE);  // heeded where shmem_enabled says advise
  return absl::OkStatus();
}

absl::Status Extent::Prefault() {
  if (madvise(data_, options_.bytes, MADV_POPULATE_WRITE) == 0) return absl::OkStatus();
  if (errno != EINVAL) return SystemError("pre-faulting", options_.bytes);
  for (uint64_t i = 0; i < options_.bytes; i += options_.page_bytes) {  // kernels before 5.14
    reinterpret_cast<volatile char*>(data_)[i] = 0;
  }
  return absl::OkStatus();
}

absl::Status Extent::Seal() {
  // The mapping made above stays writable; every later one can only read.
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
  if (fcntl(descriptor_->fd(), F_ADD_SEALS, seals) == 0) return absl::OkStatus();
  return SystemError("sealing", options_.bytes);
}

uint32_t RoomiestNumaNode() {
  if (!ManyNumaNodes()) return 0;
  uint32_t best = 0;
  long long most = -1;
  bitmask* allowed = numa_get_mems_allowed();
  for (int node = 0; node <= numa_max_node(); ++node) {
    long long free_bytes = 0;
    if (!numa_bitmask_isbitset(allowed, static_cast<unsigned>(node))) continue;
    if (numa_node_size64(node, &free_bytes) < 0 || free_bytes <= most) continue;
    most = free_bytes;
    best = static_cast<uint32_t>(node);
  }
  numa_bitmask_free(allowed);
  return best;
}

}  // namespace quarry
