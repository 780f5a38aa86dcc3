// AuditedQuery: a live answer that will be compared with the exact one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/block_table.h"
#include "daemon/drift_watch.h"
#include "proto/retrieval_types.h"
#include "proto/types.h"

namespace quarry {

// Whose answers are audited. Thread-safe.
class AuditSubject {
 public:
  virtual ~AuditSubject() = default;
  virtual const std::string& tenant() const = 0;
  virtual const std::string& model() const = 0;
  virtual const KvShape& shape() const = 0;
  // Where its tokens lie now; null once it is closed: then nobody may hold its memory for long.
  virtual std::shared_ptr<const BlockTable> Memory() const = 0;
  // Takes note of how well an index of this head predicted its error. True if that shows that its
  // indexes do not fit live queries any more, which the subject sees to itself.
  virtual bool NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit) = 0;
};

// The query heads of one KV head's group, of one row. Holds no memory of the context: a subject
// that is closed before its turn is not audited.
struct AuditedQuery {
  std::weak_ptr<AuditSubject> subject;
  uint32_t layer = 0;
  uint32_t kv_head = 0;
  TokenRange range;
  Budget budget;
  DType q_dtype = DType::kFp32;  // what q was before widening
  std::vector<float> q;          // [group][head_dim]
  std::vector<float> o;          // [group][head_dim], as answered
  std::vector<float> lse;        // [group], as answered
  float predicted = 0;           // AttendAnswer::error_estimate, of these heads
  bool merged = false;           // with attention over the tokens outside range, below rest_hi
  uint32_t rest_hi = 0;
};

}  // namespace quarry
