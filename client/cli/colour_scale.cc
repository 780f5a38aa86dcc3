#include "client/cli/colour_scale.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace quarry::cli {
namespace {

// `share` of the way from a to b.
Colour Between(Colour a, Colour b, double share) {
  const auto mix = [share](uint8_t x, uint8_t y) {
    return static_cast<uint8_t>(std::lround(x + (y - x) * share));
  };
  return {mix(a.red, b.red), mix(a.green, b.green), mix(a.blue, b.blue)};
}

}  // namespace

Colour Rising(double place) {
  constexpr Colour kStops[] = {{68, 1, 84},    {65, 68, 135},  {42, 120, 142},
                               {34, 168, 132}, {122, 209, 81}, {253, 231, 37}};
  const double at = std::clamp(place, 0.0, 1.0) * 5;
  const auto stop = std::min(static_cast<size_t>(at), size_t{4});
  return Between(kStops[stop], kStops[stop + 1], at - static_cast<double>(stop));
}

Colour Diverging(double place) {
  constexpr Colour kBlue{33, 102, 172}, kWhite{247, 247, 247}, kRed{178, 24, 43};
  const double at = std::clamp(place, 0.0, 1.0) * 2;
  return at < 1 ? Between(kBlue, kWhite, at) : Between(kWhite, kRed, at - 1);
}

}  // namespace quarry::cli
