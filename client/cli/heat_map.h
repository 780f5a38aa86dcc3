// Heat maps of audits: layers down, KV heads across, one panel per figure.
#pragma once

#include <span>

#include "client/cli/picture.h"
#include "proto/audit_types.h"

namespace quarry::cli {

// One row of panels per model, in the order given (by model): the error of o (dark: none; the
// scale's end is written beside it), the median of actual by predicted error (white: as predicted,
// blue: less, red: more, to a factor of 4), and, where any audit has them, captured mass and
// recall, else the error of e^lse. Heads that no audit saw are grey.
Picture DrawHeatMaps(std::span<const HeadAudit> heads);

}  // namespace quarry::cli
