// A model's weights in a device's memory, all of them or those in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/thread_team.h"
#include "gpu/weights/matrix_layout.h"
#include "gpu/weights/residence.h"

namespace quarry {

// Stored matrices, one above the other, that become one matrix on the device.
struct StoredMatrix {
  std::string name;
  std::vector<HostMatrix> stacked;
  size_t width = 0;
  WeightForm form = WeightForm::kPlain;
};
// Matrices that are used together: a layer.
using StoredUnit = std::vector<StoredMatrix>;

// Bytes of a unit in a device's memory.
uint64_t UnitBytes(const Device& device, const StoredUnit& unit);

// Units that are used in turn, in the order of their numbers and then again. Those that are not
// resident wait in the host's memory, and come while the one before them is in use: to slots, in
// which they take turns, or to spare memory of the device, in which they stay until somebody else
// wants it. Used by the device's thread.
class WeightStore final : private Device::SpareOwner {
 public:
  // `residence` is of the units' UnitBytes. What the units borrow is needed until this returns.
  // leave_free: what spare memory leaves of the device's budget; nullopt: no unit takes any.
  // InvalidArgument as PackMatrix; ResourceExhausted where device or host lack memory.
  static absl::StatusOr<std::unique_ptr<WeightStore>> Create(
      Device* device, std::span<const StoredUnit> units, const Residence& residence,
      std::optional<uint64_t> leave_free = std::nullopt);
  ~WeightStore() override;
  WeightStore(const WeightStore&) = delete;
  WeightStore& operator=(const WeightStore&) = delete;

  // Operations that are called from now until another unit is used, or none, may read this unit's
  // matrices, which until then stay where they are.
  void Use(size_t unit);
  void UseNone() { in_use_ = kNone; }
  // The matrices of a unit, borrowed from the store, where they are when it is used next, if no
  // unit comes before; and where that is.
  std::vector<DeviceMatrix> Borrow(size_t unit) const;
  const std::byte* At(size_t unit) const;
  // How often a unit came or went so far, or was given memory. If that is the same after all units
  // have been used, all are there to stay, and Use calls no operation until it is another.
  uint64_t moves() const { return moves_; }

  const Residence& residence() const { return residence_; }
  // Of the streamed bytes, those that have spare memory at present.
  uint64_t spare_bytes() const;

 private:
  struct Part {
    MatrixLayout layout;
    size_t offset = 0;  // bytes, in the unit
  };
  static constexpr size_t kNone = ~size_t{0};
  // Memory that streamed units come to.
  struct Place {
    DeviceBuffer memory;
    size_t holds = kNone;             // unit
    Device::UploadTicket upload = 0;  // of it; 0: nobody has to wait any more
  };
  struct Unit {
    std::vector<Part> parts;
    uint64_t bytes = 0;
    DeviceBuffer resident;
    // Of a streamed one.
    HostBuffer host;
    Place spare;  // with memory while it has some
    bool has_spare() const { return spare.memory.bytes() > 0; }
  };

  WeightStore(Device* device, const Residence& residence)
      : device_(device), residence_(residence) {}
  absl::Status Add(const StoredUnit& stored, size_t unit, ThreadTeam* team);
  // Where a streamed unit is, or is on its way to; null: nowhere.
  Place* Find(size_t unit);
  const Place* Find(size_t unit) const { return const_cast<WeightStore*>(this)->Find(unit); }
  void Fetch(size_t unit, Place* to);
  std::vector<size_t> Wanted(size_t unit) const;
  void TakeSpare();
  size_t MostCrowded() const;
  bool GiveBack() override;

  Device* const device_;
  const Residence residence_;
  std::vector<Unit> units_;
  std::vector<size_t> streamed_;  // units, rising
  std::vector<Place> slots_;
  std::optional<uint64_t> leave_free_;
  size_t in_use_ = kNone;  // unit
  uint64_t moves_ = 0;
};

}  // namespace quarry
