// DriftWatch: whether indexes still fit the queries that are asked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quarry {

// How an audited answer's actual error compares with what its index predicted.
enum class IndexFit { kGood, kPoor };

// Of some heads, counts audits in windows. Not thread-safe.
class DriftWatch {
 public:
  explicit DriftWatch(size_t heads) : heads_(heads) {}

  // True at the end of a window in which most audits of the head were poor: time to learn again,
  // for all heads, whose windows begin anew. The head's next window is twice as long, for learning
  // again may not help, until a good one.
  bool Note(size_t head, IndexFit fit);

 private:
  struct Head {
    uint32_t audits = 0, poor = 0;  // of this window
    uint32_t window;                // audits
    Head();
  };
  std::vector<Head> heads_;
};

}  // namespace quarry
