#include "daemon/drift_watch.h"

#include <algorithm>

namespace quarry {
namespace {

// More than half of 16 audits are poor by chance in 0.04% of the windows where a sixth of all are,
// in 0.7% where a quarter are, in 40% where half are.
constexpr uint32_t kFirstWindow = 16, kLongestWindow = 4096;

}  // namespace

DriftWatch::Head::Head() : window(kFirstWindow) {}

bool DriftWatch::Note(size_t index, IndexFit fit) {
  Head& head = heads_[index];
  ++head.audits;
  head.poor += fit == IndexFit::kPoor;
  if (head.audits < head.window) return false;
  const bool drift = 2 * head.poor > head.audits;
  head.audits = head.poor = 0;
  head.window = drift ? std::min(2 * head.window, kLongestWindow) : kFirstWindow;
  if (!drift) return false;
  for (Head& other : heads_) other.audits = other.poor = 0;
  return true;
}

}  // namespace quarry
