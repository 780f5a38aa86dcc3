#include "gpu/token_ids.h"

#include <cerrno>
#include <charconv>
#include <fstream>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// A directory opens too, and only reading fails.
absl::StatusOr<std::string> ReadText(const std::string& path) {
  errno = 0;
  std::ifstream in(path);
  std::string text;
  char piece[4096];
  while (in.read(piece, sizeof(piece)) || in.gcount() > 0) {
    text.append(piece, static_cast<size_t>(in.gcount()));
  }
  if (in.eof() && !in.bad()) return text;
  return absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path));
}

}  // namespace

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(const std::string& argument) {
  std::string text = argument;
  if (text.starts_with('@')) {
    QUARRY_ASSIGN_OR_RETURN(text, ReadText(argument.substr(1)));
  }
  std::vector<uint32_t> ids;
  for (const absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(", \n[]"), absl::SkipEmpty())) {
    uint32_t id = 0;
    const char* const end = word.data() + word.size();
    const auto [next, error] = std::from_chars(word.data(), end, id);
    if (error != std::errc() || next != end) {
      return absl::InvalidArgumentError(absl::StrCat(
          "token id ", ids.size(), ", \"", word.substr(0, 32), "\", is not a number of 32 bits"));
    }
    ids.push_back(id);
  }
  return ids;
}

}  // namespace quarry
