#include "client/leased_block.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

absl::Status WrongDigest(const ByteDigest& want, const ByteDigest& got, uint64_t bytes) {
  return absl::DataLossError(absl::StrCat("block of ", bytes, " bytes has digest ", HexOf(got),
                                          ", expected ", HexOf(want)));
}

void Release(ClientChannel& channel, uint64_t lease) {
  absl::StatusOr<ClientChannel::Slot> slot = channel.Take();
  if (!slot.ok()) return;  // lost: the daemon ends the lease with the session
  const shm::ReleaseHeader header{lease};
  std::memcpy(channel.payload(*slot), &header, sizeof(header));
  channel.Submit(*slot, shm::Opcode::kRelease, sizeof(header));
  channel.Abandon(*slot);  // nobody waits for the answer
}

class ShmLeasedBlock final : public LeasedBlock {
 public:
  ShmLeasedBlock(std::shared_ptr<LeaseHome> home, std::shared_ptr<const MappedExtent> extent,
                 const shm::LeaseReply& reply, ClientOptions::Verify verify)
      : home_(std::move(home)),
        extent_(std::move(extent)),
        lease_{reply.lease},
        bytes_(extent_->bytes().subspan(reply.offset, reply.bytes)),
        digest_{reply.digest_low, reply.digest_high},
        verify_(verify) {}

  ~ShmLeasedBlock() override { Release(*home_->channel, lease_.value); }

  std::span<const std::byte> bytes() const override { return bytes_; }
  const ByteDigest& digest() const override { return digest_; }

  absl::Status Verify() const override {
    const ByteDigest got = DigestOf(bytes_);
    return got == digest_ ? absl::OkStatus() : WrongDigest(digest_, got, bytes_.size());
  }

  absl::Status CopyTo(uint64_t offset, std::span<std::byte> out) const override {
    if (offset > bytes_.size() || out.size() > bytes_.size() - offset) {
      return absl::InvalidArgumentError(absl::StrCat("bytes [", offset, ", ", offset + out.size(),
                                                     ") of a block of ", bytes_.size()));
    }
    const bool whole = out.size() == bytes_.size();
    if (!whole || verify_ == ClientOptions::Verify::kNever) {
      std::copy_n(bytes_.begin() + static_cast<ptrdiff_t>(offset), out.size(), out.begin());
      return absl::OkStatus();
    }
    const ByteDigest got = CopyAndDigest(out.data(), bytes_.data(), out.size());
    return got == digest_ ? absl::OkStatus() : WrongDigest(digest_, got, bytes_.size());
  }

 private:
  // Shared: a block may outlive the client object that leased it.
  const std::shared_ptr<LeaseHome> home_;
  const std::shared_ptr<const MappedExtent> extent_;
  const LeaseId lease_;
  const std::span<const std::byte> bytes_;
  const ByteDigest digest_;
  const ClientOptions::Verify verify_;
};

class ShmPendingLease final : public PendingLease {
 public:
  ShmPendingLease(std::shared_ptr<LeaseHome> home, ClientChannel::Slot slot,
                  ClientOptions::Verify verify)
      : home_(std::move(home)), slot_(slot), verify_(verify) {}
  ~ShmPendingLease() override {
    if (!waited_) Wait().IgnoreError();
  }

  bool Done() const override { return waited_ || home_->channel->Done(slot_); }

  absl::StatusOr<std::unique_ptr<LeasedBlock>> Wait() override {
    if (waited_) return absl::FailedPreconditionError("the lease has been waited for before");
    waited_ = true;
    QUARRY_ASSIGN_OR_RETURN(const shm::LeaseReply reply, Reply());
    absl::StatusOr<std::shared_ptr<const MappedExtent>> extent = ExtentOf(reply);
    if (!extent.ok()) {
      Release(*home_->channel, reply.lease);  // nobody else will
      return extent.status();
    }
    return std::make_unique<ShmLeasedBlock>(home_, *std::move(extent), reply, verify_);
  }

 private:
  absl::StatusOr<shm::LeaseReply> Reply() {
    ClientChannel& channel = *home_->channel;
    uint64_t bytes = 0;
    absl::Status status = channel.Wait(slot_, &bytes);
    shm::LeaseReply reply{};
    if (status.ok() && bytes != sizeof(reply)) {
      status = absl::DataLossError(absl::StrCat("lease reply of ", bytes, " bytes"));
    }
    if (status.ok()) std::memcpy(&reply, channel.payload(slot_), sizeof(reply));
    channel.Abandon(slot_);
    if (!status.ok()) return status;
    return reply;
  }

  absl::StatusOr<std::shared_ptr<const MappedExtent>> ExtentOf(const shm::LeaseReply& reply) {
    QUARRY_ASSIGN_OR_RETURN(std::shared_ptr<const MappedExtent> extent,
                            home_->extents.Find(reply.extent));
    const uint64_t size = extent->bytes().size();
    if (reply.offset > size || reply.bytes > size - reply.offset) {
      return absl::DataLossError(absl::StrCat("lease of bytes [", reply.offset, ", ",
                                              reply.offset + reply.bytes, ") of extent ",
                                              reply.extent, " of ", size));
    }
    return extent;
  }

  const std::shared_ptr<LeaseHome> home_;
  const ClientChannel::Slot slot_;
  const ClientOptions::Verify verify_;
  bool waited_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PendingLease>> AskForLease(const std::shared_ptr<LeaseHome>& home,
                                                          shm::LeaseHeader header,
                                                          std::string_view name_space,
                                                          std::string_view key,
                                                          ClientOptions::Verify verify) {
  ClientChannel& channel = *home->channel;
  header.namespace_bytes = static_cast<uint32_t>(name_space.size());
  header.key_bytes = static_cast<uint32_t>(key.size());
  const uint64_t bytes = sizeof(header) + name_space.size() + key.size();
  if (bytes > channel.payload_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("key of ", key.size(), " bytes"));
  }
  QUARRY_ASSIGN_OR_RETURN(const ClientChannel::Slot slot, channel.Take());
  std::byte* at = channel.payload(slot);
  std::memcpy(at, &header, sizeof(header));
  char* const names = reinterpret_cast<char*>(at + sizeof(header));
  name_space.copy(names, name_space.size());  // memcpy would not take the null of an empty name
  key.copy(names + name_space.size(), key.size());
  channel.Submit(slot, shm::Opcode::kLease, bytes);
  return std::make_unique<ShmPendingLease>(home, slot, verify);
}

}  // namespace quarry
