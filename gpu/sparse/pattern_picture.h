// A pattern file as a picture: layers down, heads across.
#pragma once

#include "client/cli/picture.h"
#include "gpu/sparse/pattern.h"

namespace quarry {

// Three panels: the kind of pattern, its share of the dense tiles, and the expected error (dark: 0;
// the scale's end is written beside it). Heads of which nothing is expected are grey in the latter
// two.
cli::Picture DrawPatterns(const PatternFile& file);

}  // namespace quarry
