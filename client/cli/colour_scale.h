// Colours of figures.
#pragma once

#include "client/cli/picture.h"

namespace quarry::cli {

// Along colours of rising lightness that people with any sight can order; place: 0 (dark) to 1.
Colour Rising(double place);
// 0: blue, a half: white, 1: red.
Colour Diverging(double place);

}  // namespace quarry::cli
