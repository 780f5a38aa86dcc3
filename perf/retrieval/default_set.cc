#include "perf/retrieval/default_set.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace quarry::perf {

std::vector<MadeSet> DefaultSet() {
  return {{.tokens = 32768, .kv_heads = 2, .train_queries = 256, .indexes = {}},
          // FAISS, hnswlib and the graph take five sixths of that time, and would take more here.
          {.tokens = 131072,
           .kv_heads = 2,
           .train_queries = 256,
           .indexes = {"exact", "codes", "auto", "clusters"}}};
}

std::string DefaultSetText() {
  std::vector<std::string> parts;
  for (const MadeSet& set : DefaultSet()) {
    parts.push_back(
        absl::StrCat(set.tokens, " tokens under ",
                     set.indexes.empty() ? "every index" : absl::StrJoin(set.indexes, ", ")));
  }
  return absl::StrCat("made heads of every family, ", absl::StrJoin(parts, "; "),
                      "; within 30 minutes on 2 cores");
}

}  // namespace quarry::perf
