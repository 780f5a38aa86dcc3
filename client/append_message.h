// Appends cut to the size of a slot.
#pragma once

#include "absl/status/statusor.h"
#include "client/channel.h"
#include "proto/kv_types.h"

namespace quarry {

// Sends the append in as few messages as the slots allow, in token order. Query samples travel
// with the first; ids must be none, or those of the range. InvalidArgument if not even one token
// fits; otherwise the first error, with the tokens before it appended.
absl::Status SendAppend(ClientChannel& channel, const KvShape& shape, const AppendRequest& request);

}  // namespace quarry
