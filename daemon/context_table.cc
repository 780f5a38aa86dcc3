#include "daemon/context_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

absl::Status FullError(size_t contexts) {
  return absl::ResourceExhaustedError(
      absl::StrCat(contexts, " contexts are open, the most allowed"));
}

}  // namespace

absl::Status ContextTable::CheckRoom() const {
  absl::ReaderMutexLock lock(&mutex_);
  return contexts_.size() < max_contexts_ ? absl::OkStatus() : FullError(contexts_.size());
}

absl::Status ContextTable::Insert(std::shared_ptr<Context> context, Session& owner) {
  const ContextId id = context->params().id;
  {
    absl::MutexLock lock(&mutex_);
    if (contexts_.size() >= max_contexts_) return FullError(contexts_.size());
    contexts_.emplace(id, std::move(context));
  }
  // In this order: a session that ends in between no longer lists the context, so it is taken
  // back here.
  absl::Status status = owner.AddContext(id);
  if (!status.ok()) Close(id);
  return status;
}

absl::StatusOr<std::shared_ptr<Context>> ContextTable::Find(std::string_view tenant,
                                                            ContextId id) const {
  absl::ReaderMutexLock lock(&mutex_);
  auto it = contexts_.find(id);
  if (it == contexts_.end() || it->second->params().tenant != tenant) {
    return absl::NotFoundError(absl::StrCat("no context ", id.value));
  }
  return it->second;
}

void ContextTable::Close(ContextId id) {
  std::shared_ptr<Context> context;
  {
    absl::MutexLock lock(&mutex_);
    auto it = contexts_.find(id);
    if (it == contexts_.end()) return;
    context = std::move(it->second);
    contexts_.erase(it);
  }
  context->Retire();
}

std::vector<std::shared_ptr<Context>> ContextTable::List(std::string_view tenant) const {
  std::vector<std::shared_ptr<Context>> list;
  {
    absl::ReaderMutexLock lock(&mutex_);
    for (const auto& [id, context] : contexts_) {
      if (context->params().tenant == tenant) list.push_back(context);
    }
  }
  std::sort(list.begin(), list.end(), [](const auto& a, const auto& b) {
    return a->params().id.value < b->params().id.value;
  });
  return list;
}

uint64_t ContextTable::size() const {
  absl::ReaderMutexLock lock(&mutex_);
  return contexts_.size();
}

}  // namespace quarry
