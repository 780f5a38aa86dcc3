// Opening and forking: where a context's blocks come from.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/context.h"
#include "daemon/context_table.h"
#include "daemon/prefix_index.h"
#include "daemon/session_table.h"
#include "daemon/stretch_finder.h"
#include "proto/kv_types.h"

namespace quarry {

// Thread-safe.
class ContextFactory {
 public:
  ContextFactory(const ContextServices& services, ContextTable& contexts,
                 uint32_t max_context_tokens)
      : services_(services),
        contexts_(contexts),
        prefixes_(*services.store),
        max_context_tokens_(max_context_tokens) {}

  absl::StatusOr<OpenResult> Open(Session& session, const OpenRequest& request);
  absl::StatusOr<ContextId> Fork(Session& session, const ForkRequest& request);
  // What Open would reuse, and where it is.
  absl::StatusOr<std::vector<PrefixBlock>> LocatePrefix(const Session& session,
                                                        const OpenRequest& request) const;

 private:
  absl::StatusOr<OpenResult> OpenWhere(Session& session, const OpenRequest& request, PrefixUse use);
  absl::Status CheckMaxTokens(const RopeSpec& rope, uint32_t max_tokens) const;
  absl::Status CheckOpen(const OpenRequest& request) const;
  absl::Status FillTable(const Session& session, const OpenRequest& request, PrefixMatch prefix,
                         std::vector<StretchMatch> stretches, BlockTable* table) const;
  absl::Status Insert(Session& session, ContextParams params, ContextStart start, ContextId* id);

  const ContextServices services_;
  ContextTable& contexts_;
  const PrefixIndex prefixes_;
  const uint32_t max_context_tokens_;
};

}  // namespace quarry
