#include "tests/storage/disk/fault.h"

namespace quarry::testing {

std::string_view NameOf(DiskCall call) {
  constexpr std::string_view kNames[] = {"read", "write", "sync", "discard"};
  return kNames[static_cast<int>(call)];
}

std::string_view NameOf(Fault::Kind kind) {
  constexpr std::string_view kNames[Fault::kKinds] = {
      "Error", "NoSpace",   "Short",      "BitFlip", "Misdirected",
      "Lost",  "LyingSync", "FailedSync", "Stall",   "Crash"};
  return kNames[kind];
}

bool CanBefall(Fault::Kind kind, const DiskOperation& operation, uint64_t disk_bytes) {
  const bool writes = operation.call == DiskCall::kWrite;
  const bool syncs = operation.call == DiskCall::kSync;
  const bool moves_bytes = (writes || operation.call == DiskCall::kRead) && operation.bytes > 0;
  switch (kind) {
    case Fault::kError:
    case Fault::kStall:
    case Fault::kCrash:
      return true;
    case Fault::kNoSpace:
      return writes || syncs;
    case Fault::kShort:
    case Fault::kBitFlip:
      return moves_bytes;
    case Fault::kMisdirected:
      return moves_bytes && operation.bytes < disk_bytes;
    case Fault::kLost:
      return writes && moves_bytes;
    case Fault::kLyingSync:
    case Fault::kFailedSync:
      return syncs;
  }
  return false;
}

}  // namespace quarry::testing
