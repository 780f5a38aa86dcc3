// AuditTable: what audits found, by tenant, model, layer and KV head.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "daemon/audit_measure.h"
#include "proto/audit_types.h"

namespace quarry {

// Names of models come from clients, so what is kept is bounded: 8 models of a tenant and 64 of
// all, the one longest not audited giving way to a new one, and 4,096 heads of a model; further
// heads are not kept. Thread-safe.
class AuditTable {
 public:
  enum class Drift { kNone, kFound };
  void Add(const AuditSubject& subject, uint32_t layer, uint32_t kv_head,
           const AuditMeasure& measure, Drift drift);

  // Of one tenant, by model, layer and KV head.
  std::vector<HeadAudit> Of(std::string_view tenant) const;
  // Of all tenants, those of models with one name together.
  std::vector<HeadAudit> OfAll() const;

 private:
  using Head = std::pair<uint32_t, uint32_t>;  // layer, KV head
  struct Model {
    std::map<Head, AuditFigures> heads;
    uint64_t audited = 0;  // when last, by adds_
  };
  using Key = std::pair<std::string, std::string>;  // tenant, model

  void MakeRoom(const std::string& tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;
  std::map<Key, Model> models_ ABSL_GUARDED_BY(mutex_);
  uint64_t adds_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace quarry
