// How FAISS and hnswlib are called: what they throw stays inside.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace quarry {

// Runs f; what it throws becomes a status.
template <typename F>
absl::Status StatusOfCall(std::string_view what, F&& f) {
  try {
    f();
    return absl::OkStatus();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(std::string(what), ": no memory"));
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrCat(std::string(what), ": ", e.what()));
  }
}

// Runs f, which throws only for a bug of ours or for want of memory: ends the process then.
template <typename F>
void MustNotThrow(std::string_view what, F&& f) {
  if (const absl::Status status = StatusOfCall(what, f); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    std::abort();
  }
}

}  // namespace quarry
