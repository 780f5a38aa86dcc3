#include "tests/storage/disk/simulated_disk.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

#include "proto/check.h"

namespace quarry::testing {
namespace {

constexpr std::string_view kPowerGone = "the power is gone";
constexpr std::string_view kInputOutputError = "input/output error";

// The pieces' sectors from `sector` on.
Patches PatchesOf(uint64_t sector, WritePieces pieces) {
  Patches patches;
  for (const std::span<const std::byte> piece : pieces) {
    for (size_t at = 0; at < piece.size(); at += kSectorBytes) {
      patches.push_back({sector++, SectorContent(piece.data() + at)});
    }
  }
  return patches;
}

void Flip(SectorBytes& bytes, uint64_t bit) {
  bytes[bit / 8] ^= std::byte{static_cast<uint8_t>(1u << bit % 8)};
}

}  // namespace

void DiskCounts::Add(const DiskOperation& operation) {
  switch (operation.call) {
    case DiskCall::kRead:
      ++reads;
      read_bytes += operation.bytes;
      break;
    case DiskCall::kWrite:
      ++writes;
      written_bytes += operation.bytes;
      break;
    case DiskCall::kSync:
      ++syncs;
      break;
    case DiskCall::kDiscard:
      ++discards;
      discarded_bytes += operation.bytes;
      break;
  }
}

SimulatedDisk::SimulatedDisk(SimulatedDiskOptions options)
    : SimulatedDisk(std::move(options), State()) {
  state_.random.seed(options_.seed);
}

SimulatedDisk::SimulatedDisk(SimulatedDiskOptions options, State state)
    : options_(std::move(options)), state_(std::move(state)) {
  QUARRY_CHECK(options_.bytes > 0 && options_.bytes % kSectorBytes == 0);
  QUARRY_CHECK(options_.torn_bytes >= kGranuleBytes && options_.torn_bytes <= kSectorBytes);
  QUARRY_CHECK(std::has_single_bit(options_.torn_bytes));
}

absl::Status SimulatedDisk::Read(uint64_t offset, ReadPieces out) {
  DiskOperation operation{DiskCall::kRead, offset};
  if (absl::Status valid = CheckPieces(operation, out); !valid.ok()) return valid;
  const Begun begun = Begin(operation);
  absl::MutexLock lock(&mutex_);
  if (!state_.powered) return Unavailable(operation, kPowerGone);
  uint64_t from = offset;
  uint64_t wanted = operation.bytes;
  std::optional<uint64_t> flipped_bit;
  absl::Status status;
  if (begun.fault.has_value()) {
    switch (*begun.fault) {
      case Fault::kError:
        return Unavailable(operation, kInputOutputError);
      case Fault::kCrash:
        CutPower();
        return Unavailable(operation, kPowerGone);
      case Fault::kShort:
        wanted = state_.random() % (wanted / options_.torn_bytes + 1) * options_.torn_bytes;
        status = Unavailable(operation, absl::StrCat("only ", wanted, " bytes were read"));
        break;
      case Fault::kBitFlip:
        flipped_bit = state_.random() % (wanted * 8);
        break;
      case Fault::kMisdirected:
        from = OtherPlace(operation);
        break;
      default:
        QUARRY_CHECK(false);
    }
  }
  uint64_t done = 0;
  for (const std::span<std::byte> piece : out) {
    const size_t n = std::min<uint64_t>(piece.size(), wanted - done);
    state_.newest.CopyTo(from + done, piece.first(n));
    if (flipped_bit.has_value() && *flipped_bit / 8 - done < n) {
      piece[*flipped_bit / 8 - done] ^= std::byte{static_cast<uint8_t>(1u << *flipped_bit % 8)};
      flipped_bit.reset();
    }
    done += n;
  }
  return status;
}

absl::Status SimulatedDisk::Write(uint64_t offset, WritePieces pieces) {
  DiskOperation operation{DiskCall::kWrite, offset};
  if (absl::Status valid = CheckPieces(operation, pieces); !valid.ok()) return valid;
  const Begun begun = Begin(operation);
  Patches patches = PatchesOf(offset / kSectorBytes, pieces);
  absl::MutexLock lock(&mutex_);
  if (!state_.powered) return Unavailable(operation, kPowerGone);
  if (!begun.fault.has_value()) {
    Land(std::move(patches));
    return absl::OkStatus();
  }
  switch (*begun.fault) {
    case Fault::kError:
      return Unavailable(operation, kInputOutputError);
    case Fault::kNoSpace:
      LandPart(std::move(patches));
      return absl::ResourceExhaustedError(
          absl::StrCat(Describe(operation), ": no space left on the device"));
    case Fault::kShort:
      LandPart(std::move(patches));
      return Unavailable(operation, "only a part was written");
    case Fault::kCrash:
      LandPart(std::move(patches));
      CutPower();
      return Unavailable(operation, kPowerGone);
    case Fault::kLost:
      return absl::OkStatus();
    case Fault::kBitFlip: {
      Patch& patch = patches[state_.random() % patches.size()];
      SectorBytes bytes = patch.content.bytes();
      Flip(bytes, state_.random() % (kSectorBytes * 8));
      patch.content = SectorContent(bytes.data());
      break;
    }
    case Fault::kMisdirected: {
      uint64_t sector = OtherPlace(operation) / kSectorBytes;
      for (Patch& patch : patches) patch.sector = sector++;
      break;
    }
    default:
      QUARRY_CHECK(false);
  }
  Land(std::move(patches));
  return absl::OkStatus();
}

absl::Status SimulatedDisk::Sync() {
  const DiskOperation operation{DiskCall::kSync};
  const Begun begun = Begin(operation);
  absl::MutexLock lock(&mutex_);
  if (!state_.powered) return Unavailable(operation, kPowerGone);
  if (begun.fault == Fault::kLyingSync) return absl::OkStatus();
  if (begun.fault == Fault::kCrash) {
    CutPower();
    return Unavailable(operation, kPowerGone);
  }
  std::vector<Patches> covered = TakeUnsynced(begun.landed);
  if (!begun.fault.has_value()) {
    for (const Patches& patches : covered) state_.durable.Apply(patches);
    return absl::OkStatus();
  }
  LoseUnsynced(std::move(covered));
  if (begun.fault == Fault::kNoSpace) {
    return absl::ResourceExhaustedError(
        absl::StrCat(Describe(operation), ": no space left on the device"));
  }
  return Unavailable(operation, kInputOutputError);
}

absl::Status SimulatedDisk::Discard(uint64_t offset, uint64_t bytes) {
  const DiskOperation operation{DiskCall::kDiscard, offset, bytes};
  if (absl::Status valid = CheckRange(operation); !valid.ok()) return valid;
  if (!options_.discards_supported) {
    return absl::UnimplementedError(absl::StrCat(Describe(operation), ": not supported"));
  }
  const Begun begun = Begin(operation);
  absl::MutexLock lock(&mutex_);
  if (!state_.powered) return Unavailable(operation, kPowerGone);
  if (begun.fault == Fault::kError) return Unavailable(operation, kInputOutputError);

  const uint64_t begin = offset / kSectorBytes;
  const uint64_t end = begin + bytes / kSectorBytes;
  const uint64_t garbage = state_.random();
  Patches patches;
  const auto add = [&](uint64_t sector) {
    patches.push_back({sector, SectorContent::Garbage(garbage + 2 * sector)});
  };
  if (bytes > kWholeDiscardBytes) {
    for (uint64_t sector : state_.newest.Written(begin, end)) add(sector);
  } else {
    for (uint64_t sector = begin; sector < end; ++sector) add(sector);
  }
  if (begun.fault == Fault::kCrash) {
    LandPart(std::move(patches));
    CutPower();
    return Unavailable(operation, kPowerGone);
  }
  Land(std::move(patches));
  return absl::OkStatus();
}

void SimulatedDisk::Schedule(Fault fault) {
  QUARRY_CHECK(fault.kind != Fault::kStall || options_.stall != nullptr);
  absl::MutexLock lock(&mutex_);
  state_.faults.push_back(fault);
}

uint64_t SimulatedDisk::struck(Fault::Kind kind) const {
  absl::MutexLock lock(&mutex_);
  return state_.struck[kind];
}

DiskCounts SimulatedDisk::counts() const {
  absl::MutexLock lock(&mutex_);
  return state_.counts;
}

uint64_t SimulatedDisk::unsynced() const {
  absl::MutexLock lock(&mutex_);
  return state_.unsynced.size();
}

std::unique_ptr<SimulatedDisk> SimulatedDisk::Crashed(uint64_t seed) const {
  std::mt19937_64 random(seed);
  return Crashed(static_cast<PowerCut>(random() % kPowerCuts), random());
}

std::unique_ptr<SimulatedDisk> SimulatedDisk::Crashed(PowerCut cut, uint64_t seed) const {
  SimulatedDiskOptions options = options_;
  options.seed = seed;
  State state;
  state.random.seed(seed);
  {
    absl::MutexLock lock(&mutex_);
    state.durable =
        AfterPowerCut(cut, state_.durable, state_.unsynced, options_.torn_bytes, state.random);
  }
  state.newest = state.durable;
  return std::unique_ptr<SimulatedDisk>(new SimulatedDisk(std::move(options), std::move(state)));
}

std::unique_ptr<SimulatedDisk> SimulatedDisk::Clone() const {
  absl::MutexLock lock(&mutex_);
  return std::unique_ptr<SimulatedDisk>(new SimulatedDisk(options_, state_));
}

void SimulatedDisk::FlipBit(uint64_t offset_in_bits) {
  constexpr uint64_t kSectorBits = kSectorBytes * 8;
  QUARRY_CHECK(offset_in_bits / 8 < options_.bytes);
  absl::MutexLock lock(&mutex_);
  ChangeSector(offset_in_bits / kSectorBits,
               [&](SectorBytes& sector) { Flip(sector, offset_in_bits % kSectorBits); });
}

void SimulatedDisk::Corrupt(uint64_t offset, std::span<const std::byte> bytes) {
  QUARRY_CHECK(offset <= options_.bytes && bytes.size() <= options_.bytes - offset);
  absl::MutexLock lock(&mutex_);
  while (!bytes.empty()) {
    const uint64_t within = offset % kSectorBytes;
    const size_t n = std::min<size_t>(kSectorBytes - within, bytes.size());
    ChangeSector(offset / kSectorBytes, [&](SectorBytes& sector) {
      std::memcpy(sector.data() + within, bytes.data(), n);
    });
    offset += n;
    bytes = bytes.subspan(n);
  }
}

std::vector<std::byte> SimulatedDisk::Peek(uint64_t offset, size_t bytes) const {
  QUARRY_CHECK(offset <= options_.bytes && bytes <= options_.bytes - offset);
  std::vector<std::byte> peeked(bytes);
  absl::MutexLock lock(&mutex_);
  state_.newest.CopyTo(offset, peeked);
  return peeked;
}

absl::Status SimulatedDisk::CheckRange(const DiskOperation& operation) const {
  if (operation.offset % kSectorBytes != 0 || operation.bytes % kSectorBytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(Describe(operation), ": not in sectors of ", kSectorBytes, " bytes"));
  }
  if (operation.offset > options_.bytes || operation.bytes > options_.bytes - operation.offset) {
    return absl::InvalidArgumentError(
        absl::StrCat(Describe(operation), ": passes the end at ", options_.bytes));
  }
  return absl::OkStatus();
}

template <typename Pieces>
absl::Status SimulatedDisk::CheckPieces(DiskOperation& operation, Pieces pieces) const {
  for (const auto& piece : pieces) operation.bytes += piece.size();
  for (const auto& piece : pieces) {
    const auto address = reinterpret_cast<uintptr_t>(piece.data());
    if (piece.size() % kSectorBytes == 0 && address % kSectorBytes == 0) continue;
    return absl::InvalidArgumentError(absl::StrCat(Describe(operation), ": a piece of ",
                                                   piece.size(), " bytes at address ", address,
                                                   " is not in sectors of ", kSectorBytes));
  }
  return CheckRange(operation);
}

std::string SimulatedDisk::Describe(const DiskOperation& operation) const {
  const std::string name(NameOf(operation.call));
  if (operation.call == DiskCall::kSync) return absl::StrCat(name, " of disk ", options_.name);
  return absl::StrCat(name, " of ", operation.bytes, " bytes at ", operation.offset, " of disk ",
                      options_.name);
}

absl::Status SimulatedDisk::Unavailable(const DiskOperation& operation,
                                        std::string_view why) const {
  return absl::UnavailableError(absl::StrCat(Describe(operation), ": ", std::string(why)));
}

SimulatedDisk::Begun SimulatedDisk::Begin(const DiskOperation& operation) {
  Begun begun;
  {
    absl::MutexLock lock(&mutex_);
    begun = Strike(operation);
  }
  for (int i = 0; i < begun.stalls; ++i) options_.stall();
  return begun;
}

SimulatedDisk::Begun SimulatedDisk::Strike(const DiskOperation& operation) {
  Begun begun;
  begun.landed = state_.landed;
  const uint64_t number = state_.counts.operations();
  state_.counts.Add(operation);
  if (!state_.powered) return begun;
  std::vector<Fault> waiting;
  for (const Fault& fault : state_.faults) {
    const bool stalls = fault.kind == Fault::kStall;
    if (fault.at > number || !CanBefall(fault.kind, operation, options_.bytes) ||
        (!stalls && begun.fault.has_value())) {
      waiting.push_back(fault);
      continue;
    }
    if (stalls) {
      ++begun.stalls;
    } else {
      begun.fault = fault.kind;
    }
    ++state_.struck[fault.kind];
  }
  state_.faults = std::move(waiting);
  return begun;
}

void SimulatedDisk::Land(Patches patches) {
  state_.newest.Apply(patches);
  state_.unsynced.push_back(std::move(patches));
  ++state_.landed;
}

void SimulatedDisk::LandPart(Patches patches) {
  Land(RandomPart(std::move(patches), options_.torn_bytes, state_.random));
}

std::vector<Patches> SimulatedDisk::TakeUnsynced(uint64_t landed) {
  // Another sync may have covered some of them since.
  const uint64_t synced = state_.landed - state_.unsynced.size();
  const auto end = state_.unsynced.begin() + (std::max(landed, synced) - synced);
  std::vector<Patches> taken(std::make_move_iterator(state_.unsynced.begin()),
                             std::make_move_iterator(end));
  state_.unsynced.erase(state_.unsynced.begin(), end);
  return taken;
}

void SimulatedDisk::LoseUnsynced(std::vector<Patches> lost) {
  SectorImage seen = state_.durable;
  for (const Patches& patches : lost) {
    const bool kept = state_.random() % 2 == 0;
    if (kept) state_.durable.Apply(patches);
    if (kept || state_.random() % 2 == 0) seen.Apply(patches);
  }
  for (const Patches& patches : state_.unsynced) seen.Apply(patches);
  state_.newest = std::move(seen);
}

uint64_t SimulatedDisk::OtherPlace(const DiskOperation& operation) {
  constexpr uint64_t kNearSectors = 64;
  const uint64_t places = (options_.bytes - operation.bytes) / kSectorBytes + 1;
  const uint64_t own = operation.offset / kSectorBytes;
  const bool near = state_.random() % 2 == 0;
  const uint64_t first = near && own > kNearSectors ? own - kNearSectors : 0;
  const uint64_t end = near ? std::min(places, own + kNearSectors + 1) : places;
  // One of the others: the last stands in for its own.
  const uint64_t place = first + state_.random() % (end - first - 1);
  return (place == own ? end - 1 : place) * kSectorBytes;
}

void SimulatedDisk::ChangeSector(uint64_t sector, const std::function<void(SectorBytes&)>& change) {
  const auto changed = [&](const SectorContent& content) {
    SectorBytes bytes = content.bytes();
    change(bytes);
    return SectorContent(bytes.data());
  };
  state_.newest.Apply({sector, changed(state_.newest.Get(sector))});
  state_.durable.Apply({sector, changed(state_.durable.Get(sector))});
  for (Patches& patches : state_.unsynced) {
    for (Patch& patch : patches) {
      if (patch.sector == sector) patch.content = changed(patch.content);
    }
  }
}

}  // namespace quarry::testing
