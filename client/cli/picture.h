// Picture: pixels, with rectangles and text, as a PNG file.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace quarry::cli {

struct Colour {
  uint8_t red = 0, green = 0, blue = 0;
  friend bool operator==(const Colour&, const Colour&) = default;
};

// In pixels, from the upper left corner.
struct Place {
  int x = 0, y = 0;
};
struct Extent {
  int width = 0, height = 0;
};

// What lies outside is not drawn.
class Picture {
 public:
  explicit Picture(Extent size);  // white
  Extent size() const { return size_; }

  void Fill(Place at, Extent extent, Colour colour);
  // Capitals of 7 pixels, each enlarged to scale x scale; `at` is the upper left corner.
  void Write(Place at, std::string_view text, Colour colour, int scale = 1);
  static Extent TextExtent(std::string_view text, int scale = 1);
  Colour At(Place at) const;

  // PermissionDenied, NotFound, ... of the path.
  absl::Status SavePng(const std::string& path) const;

 private:
  const Extent size_;
  std::vector<uint8_t> rgb_;  // [height][width][3]
};

}  // namespace quarry::cli
