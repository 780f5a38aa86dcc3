#include "storage/disk/disk_error.h"

#include <cerrno>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

absl::StatusCode OpeningCode(int error) {
  switch (error) {
    case ENOENT:
      return absl::StatusCode::kNotFound;
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::StatusCode::kPermissionDenied;
    case EINVAL:
    case EFBIG:  // no file of that file system is so large, whatever room it has
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
    case ENOTDIR:
      return absl::StatusCode::kInvalidArgument;
    case EBUSY:
    case ETXTBSY:
      return absl::StatusCode::kFailedPrecondition;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
      return absl::StatusCode::kResourceExhausted;
    default:
      return absl::StatusCode::kUnavailable;
  }
}

absl::StatusCode TransferCode(int error) {
  return error == ENOSPC || error == EDQUOT ? absl::StatusCode::kResourceExhausted
                                            : absl::StatusCode::kUnavailable;
}

}  // namespace

absl::Status DiskError(DiskCall call, int error, std::string_view what) {
  char text[128];
  return absl::Status(call == DiskCall::kOpening ? OpeningCode(error) : TransferCode(error),
                      absl::StrCat(std::string(what), ": ", strerror_r(error, text, sizeof(text)),
                                   " (errno ", error, ")"));
}

}  // namespace quarry
