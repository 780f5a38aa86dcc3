// Places where a test ends the process, to see what a crash there leaves behind.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <string_view>

namespace quarry {

// All of them, by what the process is doing: those of `disk`, `format` and `recovery` are met while
// a log is opened, the others while it is used.
inline constexpr std::string_view kCrashPoints[] = {
    "disk.created",
    "disk.preallocated",
    "disk.synced",
    "format.begun",
    "format.areas-written",
    "format.areas-synced",
    "format.copy-written",
    "format.written",
    "format.synced",
    "recovery.superblock-mended",
    "recovery.keys-read",
    "recovery.key-mended",
    "recovery.begun",
    "recovery.start-read",
    "recovery.scanned",
    "recovery.note-written",
    "recovery.footer-written",
    "recovery.sealed",
    "recovery.segments-read",
    "recovery.blocks-chosen",
    "publish.published",
    "publish.queued",
    "write.taken",
    "write.written",
    "write.let-go",
    "append.room-made",
    "append.added",
    "append.committed",
    "append.indexed",
    "segment.chosen",
    "segment.start-written",
    "segment.end-cleared",
    "segment.note-written",
    "segment.synced",
    "segment.discarded",
    "data.begun-behind",
    "data.behind-done",
    "data.note-written",
    "data.written",
    "note.copy-written",
    "keys.copy-written",
    "keys.drawn",
    "keys.copy-erased",
    "keys.erased",
    "keys.gone",
    "commit.data-synced",
    "commit.frame-written",
    "commit.footer-next",
    "commit.footer-written",
    "commit.written",
    "commit.synced",
    "commit.counted",
    "purge.ram-done",
    "purge.not-found-any-more",
    "purge.room-made",
    "purge.added",
    "purge.durable",
    "purge.done",
    "reclaim.chosen",
    "reclaim.footer-read",
    "reclaim.purges-taken",
    "reclaim.purges-added",
    "reclaim.block-read",
    "reclaim.block-added",
    "reclaim.handed-over",
    "reclaim.committed",
    "reclaim.indexed",
    "reclaim.dropped",
    "reclaim.freed",
    "promote.begun",
    "promote.read",
    "promote.published",
};

// One of them; another name does not compile.
class CrashPointName {
 public:
  consteval CrashPointName(const char* name)  // NOLINT: names stand where they are met
      : number_(static_cast<size_t>(
            std::find(std::begin(kCrashPoints), std::end(kCrashPoints), std::string_view(name)) -
            std::begin(kCrashPoints))) {
    if (number_ == std::size(kCrashPoints)) throw "no such crash point";
  }
  std::string_view name() const { return kCrashPoints[number_]; }

 private:
  size_t number_;
};

// Where the build has QUARRY_CRASH_POINTS: ends the process with SIGKILL, and a line on standard
// error, at the n-th meeting of the point that QUARRY_CRASH_POINT=<name>:<n> of the environment
// names. Elsewhere it is nothing. From any thread.
#ifdef QUARRY_CRASH_POINTS
void CrashPoint(CrashPointName point);
#else
inline void CrashPoint(CrashPointName) {}
#endif

}  // namespace quarry
