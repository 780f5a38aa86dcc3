#include "storage/log/tenant_keys.h"

#include <algorithm>
#include <optional>
#include <span>
#include <utility>

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "storage/crash_point.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/log/frame_codec.h"
#include "storage/log/part_cipher.h"
#include "storage/log/sealing.h"
#include "storage/log/sectors.h"

namespace quarry {

struct TenantKeys::Wrapped {
  std::string tenant;
  KeyId id{};
  uint64_t sequence = 0;
  SealNonce nonce{};
  SealTag tag{};
  std::array<std::byte, Secret::kBytes> key{};

  FramePlace PlaceIn(const Superblock& superblock, int area, uint32_t slot) const {
    return {superblock.device, slot, 0, superblock.KeyOffset(area, slot)};
  }
  // What the tag covers beside the key.
  AlignedBuffer Context(const Superblock& superblock, uint32_t slot) const {
    AlignedBuffer out(kSectorBytes);
    FrameWriter writer(out.bytes());
    writer.Bytes(superblock.device.data(), superblock.device.size());
    writer.Number(slot);
    writer.Number(sequence);
    writer.Bytes(id.data(), id.size());
    writer.Text(tenant);
    return out;
  }
  AlignedBuffer Encode(const Superblock& superblock, int area, uint32_t slot) const {
    AlignedBuffer frame = NewFrame(
        FrameKind::kKey, PlaceIn(superblock, area, slot), sequence,
        id.size() + nonce.size() + tag.size() + key.size() + sizeof(uint32_t) + tenant.size());
    FrameWriter out(BodyOf(&frame));
    out.Bytes(id.data(), id.size());
    out.Bytes(nonce.data(), nonce.size());
    out.Bytes(tag.data(), tag.size());
    out.Bytes(key.data(), key.size());
    out.Text(tenant);
    return FinishFrame(std::move(frame));
  }
  static absl::StatusOr<Wrapped> Decode(std::span<const std::byte> frame,
                                        const Superblock& superblock, int area, uint32_t slot) {
    Wrapped out;
    FrameHead head;
    QUARRY_ASSIGN_OR_RETURN(const std::span<const std::byte> body,
                            CheckedBody(frame, FrameKind::kKey, &head));
    if (head.place != out.PlaceIn(superblock, area, slot)) {
      return absl::DataLossError("a key of another slot or disk");
    }
    out.sequence = head.sequence;
    FrameReader in(body);
    in.Bytes(out.id.data(), out.id.size());
    in.Bytes(out.nonce.data(), out.nonce.size());
    in.Bytes(out.tag.data(), out.tag.size());
    in.Bytes(out.key.data(), out.key.size());
    out.tenant = in.Text();
    if (!in.ok() || out.tenant.empty()) return MalformedFrame("key");
    return out;
  }
};

namespace {

// Longer names than any that the daemon takes.
constexpr size_t kMaxTenantBytes = 2048;

absl::Status WriteOne(Disk* disk, uint64_t offset, const AlignedBuffer& bytes) {
  const std::span<const std::byte> piece[] = {bytes.bytes()};
  return disk->Write(offset, piece);
}

}  // namespace

std::array<uint8_t, 16> KeyCheckOf(const Secret& log_key, const DeviceId& device) {
  const Secret check = log_key.Derive("quarry check", device);
  std::array<uint8_t, 16> out;
  std::copy_n(check.data(), out.size(), out.begin());
  return out;
}

absl::Status WriteNoKeys(Disk* disk, const Superblock& superblock) {
  if (superblock.key_slots == 0) return absl::OkStatus();
  const AlignedBuffer zeros(superblock.key_slots * kSectorBytes);
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    QUARRY_RETURN_IF_ERROR(WriteOne(disk, superblock.KeyOffset(area, 0), zeros));
  }
  return absl::OkStatus();
}

TenantKeys::TenantKeys(Disk* disk, const Superblock& superblock, Secret wrapping_key)
    : disk_(disk),
      superblock_(superblock),
      wrapping_key_(std::move(wrapping_key)),
      slots_(superblock.key_slots) {}

absl::StatusOr<std::unique_ptr<TenantKeys>> TenantKeys::Recover(Disk* disk,
                                                                const Superblock& superblock,
                                                                const Secret& log_key) {
  std::unique_ptr<TenantKeys> keys(
      new TenantKeys(disk, superblock, log_key.Derive("quarry keys", superblock.device)));
  QUARRY_RETURN_IF_ERROR(FillWithRandom(keys->salt_));
  std::array<AlignedBuffer, LogLayout::kAreas> slots;
  std::array<std::vector<bool>, LogLayout::kAreas> read;
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    slots[area] = AlignedBuffer(superblock.key_slots * kSectorBytes);
    read[area] = ReadEachSector(disk, superblock.KeyOffset(area, 0), &slots[area]);
  }
  for (uint32_t slot = 0; slot < superblock.key_slots; ++slot) {
    Found found;
    for (int area = 0; area < LogLayout::kAreas; ++area) {
      if (!read[area][slot]) continue;
      found[area] = slots[area].bytes().subspan(slot * kSectorBytes, kSectorBytes);
    }
    keys->RecoverSlot(slot, found);
  }
  return keys;
}

void TenantKeys::RecoverSlot(uint32_t slot, const Found& sectors) {
  std::optional<Wrapped> found;
  Slot value;
  bool blank = true, read_all = true;
  std::vector<int> lacking;  // areas
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    const std::span<const std::byte> bytes = sectors[area];
    if (bytes.empty()) {
      read_all = false;
      continue;
    }
    blank &= IsBlank(bytes);
    absl::StatusOr<Wrapped> one = Wrapped::Decode(bytes, superblock_, area, slot);
    Slot unwrapped;
    if (one.ok()) unwrapped = Unwrapped(slot, *one);
    if (unwrapped.state != SlotState::kUsed) lacking.push_back(area);
    // One that can be unwrapped before one that only looks whole.
    if (one.ok() && (!found.has_value() || value.state != SlotState::kUsed)) {
      found = *std::move(one);
      value = std::move(unwrapped);
    }
  }
  if (value.state == SlotState::kUsed) {
    for (const int area : lacking) {
      // If that fails, the next start tries again.
      (void)WriteOne(disk_, superblock_.KeyOffset(area, slot),
                     found->Encode(superblock_, area, slot));
      CrashPoint("recovery.key-mended");
    }
  } else if (!found.has_value() && !read_all) {
    value.state = SlotState::kUnknown;
  } else if (!found.has_value() && !blank) {
    // Torn when it was written, or else lost: no other copy will tell.
    spdlog::warn("slot {} of the keys on {} has none that is whole", slot, disk_->name());
  }
  if (value.state == SlotState::kUnknown) {
    ++unreadable_;
    spdlog::error("a key on {} cannot be read, in slot {}: what it is for is not found (tenant {})",
                  disk_->name(), slot, value.tenant.empty() ? "unknown" : value.tenant);
  }
  Use(slot, std::move(value));
}

TenantKeys::Slot TenantKeys::Unwrapped(uint32_t slot, const Wrapped& wrapped) const {
  std::array<std::byte, Secret::kBytes> key;
  const AlignedBuffer context = wrapped.Context(superblock_, slot);
  Slot out{SlotState::kUnknown, wrapped.tenant, wrapped.id, wrapped.sequence, nullptr};
  if (Unseal(wrapping_key_, wrapped.nonce, {context.bytes()}, {{wrapped.key, key.data()}},
             wrapped.tag)) {
    out.state = SlotState::kUsed;
    out.key = std::make_shared<const Secret>(std::span<const uint8_t, Secret::kBytes>(
        reinterpret_cast<const uint8_t*>(key.data()), Secret::kBytes));
  }
  Wipe(key);
  return out;
}

void TenantKeys::Use(uint32_t slot, Slot value) {
  absl::MutexLock lock(&mutex_);
  if (value.key != nullptr) {
    by_id_[value.id] = slot;
    Writing& writing = writing_[value.tenant];
    // The latest, where there are several.
    const auto other = by_id_.find(writing.seal.key);
    if (other == by_id_.end() || slots_[other->second].sequence < value.sequence) {
      writing.seal.key = value.id;
      writing.seal.salt = salt_;
      writing.part_key = std::make_shared<const Secret>(PartKey(*value.key, writing.seal));
    }
  }
  slots_[slot] = std::move(value);
}

void TenantKeys::Forget(Slot* slot, SlotState state) {
  by_id_.erase(slot->id);
  const auto writing = writing_.find(slot->tenant);
  if (writing != writing_.end() && writing->second.seal.key == slot->id) writing_.erase(writing);
  slot->key = nullptr;
  slot->state = state;
}

absl::Status TenantKeys::WriteSlot(uint32_t slot, const Wrapped& wrapped) {
  for (int area = 0; area < LogLayout::kAreas; ++area) {
    QUARRY_RETURN_IF_ERROR(WriteOne(disk_, superblock_.KeyOffset(area, slot),
                                    wrapped.Encode(superblock_, area, slot)));
    CrashPoint("keys.copy-written");
  }
  return absl::OkStatus();
}

absl::Status TenantKeys::EraseSlot(uint32_t slot) {
  const AlignedBuffer zeros(kSectorBytes);
  absl::Status status;
  for (int area = 0; area < LogLayout::kAreas; ++area) {  // all that can be
    status.Update(WriteOne(disk_, superblock_.KeyOffset(area, slot), zeros));
    CrashPoint("keys.copy-erased");
  }
  return status;
}

std::optional<TenantKeys::Writing> TenantKeys::ForWriting(std::string_view tenant) const {
  absl::MutexLock lock(&mutex_);
  const auto known = writing_.find(tenant);
  if (known == writing_.end()) return std::nullopt;
  return known->second;
}

absl::StatusOr<TenantKeys::Writing> TenantKeys::Draw(std::string_view tenant, uint64_t sequence) {
  uint32_t slot = 0;
  {
    absl::MutexLock lock(&mutex_);
    while (slot < slots_.size() && slots_[slot].state != SlotState::kFree) ++slot;
  }
  if (slot == superblock_.key_slots) {
    return absl::FailedPreconditionError(absl::StrCat("all ", slot, " slots for keys on ",
                                                      disk_->name(), " are taken: tenant ",
                                                      std::string(tenant), " has none"));
  }
  if (tenant.size() > kMaxTenantBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a tenant's name of ", tenant.size(), " bytes has no room beside its key"));
  }
  Wrapped wrapped;
  wrapped.tenant = std::string(tenant);
  wrapped.sequence = sequence;
  QUARRY_RETURN_IF_ERROR(FillWithRandom(wrapped.id));
  QUARRY_RETURN_IF_ERROR(FillWithRandom(wrapped.nonce));
  QUARRY_ASSIGN_OR_RETURN(Secret drawn, Secret::Random());
  auto key = std::make_shared<const Secret>(std::move(drawn));
  const AlignedBuffer context = wrapped.Context(superblock_, slot);
  wrapped.tag = Seal(wrapping_key_, wrapped.nonce, {context.bytes()},
                     {{std::as_bytes(key->bytes()), wrapped.key.data()}});
  const absl::Status written = WriteSlot(slot, wrapped);
  CrashPoint("keys.drawn");
  Use(slot, {SlotState::kFresh, wrapped.tenant, wrapped.id, sequence, std::move(key)});
  absl::MutexLock lock(&mutex_);
  if (written.ok()) return writing_.find(tenant)->second;
  Forget(&slots_[slot], SlotState::kUnknown);
  return written;
}

std::shared_ptr<const Secret> TenantKeys::Find(const KeyId& id) const {
  absl::MutexLock lock(&mutex_);
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : slots_[found->second].key;
}

void TenantKeys::Retire(std::string_view tenant) {
  absl::MutexLock lock(&mutex_);
  const auto writing = writing_.find(tenant);
  if (writing != writing_.end()) writing_.erase(writing);
}

absl::StatusOr<size_t> TenantKeys::Destroy(std::string_view tenant, uint64_t before) {
  std::vector<uint32_t> doomed;
  {
    absl::MutexLock lock(&mutex_);
    for (uint32_t slot = 0; slot < slots_.size(); ++slot) {
      Slot& one = slots_[slot];
      if (one.tenant != tenant || one.sequence >= before || one.state == SlotState::kFree) continue;
      Forget(&one, SlotState::kUnknown);
      doomed.push_back(slot);
    }
  }
  absl::Status status;
  for (const uint32_t slot : doomed) {
    const absl::Status erased = EraseSlot(slot);
    status.Update(erased);
    absl::MutexLock lock(&mutex_);
    if (erased.ok()) slots_[slot].state = SlotState::kDoomed;
  }
  if (!status.ok()) return status;
  return doomed.size();
}

void TenantKeys::Settle(Outcome outcome) {
  const bool durable = outcome == Outcome::kDurable;
  absl::MutexLock lock(&mutex_);
  for (Slot& slot : slots_) {
    if (slot.state == SlotState::kFresh) {
      if (durable) {
        slot.state = SlotState::kUsed;
      } else {
        Forget(&slot, SlotState::kUnknown);
      }
    } else if (slot.state == SlotState::kDoomed) {
      slot = durable ? Slot() : Slot{SlotState::kUnknown, slot.tenant, {}, slot.sequence, nullptr};
    }
  }
}

}  // namespace quarry
