// A model's weights in a device's memory, all of them or those in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
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

// Units that are used in turn. Those that do not stay on the device wait in the host's memory, and
// come while the one before them is in use. Used by the device's thread.
class WeightStore {
 public:
  // `residence` is of the units' UnitBytes. What the units borrow is needed until this returns.
  // InvalidArgument as PackMatrix; ResourceExhausted where device or host lack memory.
  static absl::StatusOr<std::unique_ptr<WeightStore>> Create(Device* device,
                                                             std::span<const StoredUnit> units,
                                                             const Residence& residence);
  ~WeightStore();
  WeightStore(const WeightStore&) = delete;
  WeightStore& operator=(const WeightStore&) = delete;

  // The matrices of a unit, borrowed from the store; always at the same addresses.
  std::vector<DeviceMatrix> Borrow(size_t unit) const;
  // Operations that are called from now until another unit is used may read this unit's matrices.
  void Use(size_t unit);

  const Residence& residence() const { return residence_; }

 private:
  struct Part {
    MatrixLayout layout;
    size_t offset = 0;  // bytes, in the unit
  };
  struct Unit {
    std::vector<Part> parts;
    uint64_t bytes = 0;
    DeviceBuffer resident;
    HostBuffer host;  // of a streamed one
    size_t turn = 0;  // of a streamed one, among them
  };
  struct Slot {
    DeviceBuffer memory;
    size_t holds = kNone;  // turn
    Device::UploadTicket upload = 0;
  };
  static constexpr size_t kNone = ~size_t{0};

  WeightStore(Device* device, const Residence& residence)
      : device_(device), residence_(residence) {}
  absl::Status Add(const StoredUnit& stored, size_t unit, ThreadTeam* team);
  Slot& SlotOf(size_t turn) { return slots_[turn % slots_.size()]; }
  void Fetch(size_t turn);

  Device* const device_;
  const Residence residence_;
  std::vector<Unit> units_;
  std::vector<size_t> streamed_;  // units, by turn
  std::vector<Slot> slots_;
  size_t in_use_ = kNone;  // unit
};

}  // namespace quarry
