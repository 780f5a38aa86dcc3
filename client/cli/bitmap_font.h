// A font of 5 x 7 pixels: no font of the machine is needed to label a picture.
#pragma once

#include <array>
#include <cstdint>

namespace quarry::cli {

inline constexpr int kGlyphWidth = 5, kGlyphHeight = 7;

// Rows from the top, each of 5 bits, the leftmost the highest. Letters are capitals; what the font
// does not have is a box.
std::array<uint8_t, kGlyphHeight> Glyph(char c);

}  // namespace quarry::cli
