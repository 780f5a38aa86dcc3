// SentencePiece behind plain types: its header declares an absl::string_view of its own, which
// must not meet Abseil's.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace quarry {

// Errors are texts; empty means success.
class SentencePieceModel {
 public:
  SentencePieceModel();
  ~SentencePieceModel();
  std::string Load(const std::string& path);
  std::string Encode(const std::string& text, std::vector<int>* ids) const;
  std::string Decode(const std::vector<int>& ids) const;
  int bos_id() const;  // negative: none

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace quarry
