// When indexes of runs are written to the disk.
#pragma once

#include "absl/time/time.h"

namespace quarry {

struct IndexArchiveOptions {
  // Between two looks for what is to be written; what has changed since the last is left to the
  // next.
  absl::Duration look_every = absl::Seconds(1);
  // How long the end may take to write what is left.
  absl::Duration end_within = absl::Seconds(10);
};

}  // namespace quarry
