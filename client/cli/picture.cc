// The only file that knows libpng.
#include "client/cli/picture.h"

#include <png.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "client/cli/bitmap_font.h"

namespace quarry::cli {
namespace {

constexpr int kAdvance = kGlyphWidth + 1;

}  // namespace

Picture::Picture(Extent size)
    : size_(size),
      rgb_(static_cast<size_t>(size.width) * static_cast<size_t>(size.height) * 3, 255) {}

void Picture::Fill(Place at, Extent extent, Colour colour) {
  const int left = std::max(at.x, 0), right = std::min(at.x + extent.width, size_.width);
  const int top = std::max(at.y, 0), bottom = std::min(at.y + extent.height, size_.height);
  for (int y = top; y < bottom; ++y) {
    for (int x = left; x < right; ++x) {
      uint8_t* const pixel = &rgb_[(static_cast<size_t>(y) * static_cast<size_t>(size_.width) +
                                    static_cast<size_t>(x)) *
                                   3];
      pixel[0] = colour.red;
      pixel[1] = colour.green;
      pixel[2] = colour.blue;
    }
  }
}

void Picture::Write(Place at, std::string_view text, Colour colour, int scale) {
  for (char c : text) {
    const auto rows = Glyph(c);
    for (int row = 0; row < kGlyphHeight; ++row) {
      for (int column = 0; column < kGlyphWidth; ++column) {
        if ((rows[static_cast<size_t>(row)] >> (kGlyphWidth - 1 - column) & 1) == 0) continue;
        Fill({at.x + column * scale, at.y + row * scale}, {scale, scale}, colour);
      }
    }
    at.x += kAdvance * scale;
  }
}

Extent Picture::TextExtent(std::string_view text, int scale) {
  if (text.empty()) return {0, kGlyphHeight * scale};
  return {(static_cast<int>(text.size()) * kAdvance - 1) * scale, kGlyphHeight * scale};
}

Colour Picture::At(Place at) const {
  const uint8_t* const pixel = &rgb_[(static_cast<size_t>(at.y) * static_cast<size_t>(size_.width) +
                                      static_cast<size_t>(at.x)) *
                                     3];
  return {pixel[0], pixel[1], pixel[2]};
}

absl::Status Picture::SavePng(const std::string& path) const {
  png_image image;
  std::memset(&image, 0, sizeof(image));
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(size_.width);
  image.height = static_cast<png_uint_32>(size_.height);
  image.format = PNG_FORMAT_RGB;
  errno = 0;
  if (png_image_write_to_file(&image, path.c_str(), 0, rgb_.data(), 0, nullptr) != 0) {
    return absl::OkStatus();
  }
  // libpng's message is that of errno, if there is one.
  const std::string what = absl::StrCat("cannot write the picture ", path);
  return errno != 0 ? absl::ErrnoToStatus(errno, what)
                    : absl::InternalError(absl::StrCat(what, ": ", image.message));
}

}  // namespace quarry::cli
