#include "daemon/session_table.h"

#include <random>

#include "absl/strings/str_cat.h"

namespace quarry {
namespace {

constexpr size_t kMaxTenantBytes = 255;

// From the system's generator: a session's number is what a call names it by.
SessionId RandomSessionId() {
  std::random_device device;
  return SessionId{(uint64_t{device()} << 32) | device()};
}

absl::Status EndedError(SessionId id) {
  return absl::NotFoundError(absl::StrCat("session ", id.value, " has ended"));
}

}  // namespace

absl::Status Session::AddContext(ContextId context) {
  absl::MutexLock lock(&mutex_);
  if (ended()) return EndedError(id_);
  contexts_.insert(context);
  return absl::OkStatus();
}

void Session::RemoveContext(ContextId context) {
  absl::MutexLock lock(&mutex_);
  contexts_.erase(context);
}

absl::StatusOr<BlockLease> Session::AddLease(std::shared_ptr<HeldBlock> block) {
  BlockLease lease;
  lease.extent = block->memory().extent;
  lease.offset = block->memory().offset;
  lease.bytes = block->memory().bytes;
  lease.digest = block->digest();
  absl::MutexLock lock(&mutex_);
  if (ended()) return EndedError(id_);
  if (leases_.size() >= max_leases_) {
    return absl::ResourceExhaustedError(absl::StrCat("session ", id_.value, " holds ",
                                                     leases_.size(), " leases, the most allowed"));
  }
  lease.lease = LeaseId{next_lease_++};
  leases_.emplace(lease.lease, std::move(block));
  return lease;
}

absl::Status Session::RemoveLease(LeaseId lease) {
  std::shared_ptr<HeldBlock> block;  // its lease ends outside the lock
  absl::MutexLock lock(&mutex_);
  auto it = leases_.find(lease);
  if (it == leases_.end()) {
    return absl::NotFoundError(
        absl::StrCat("session ", id_.value, " holds no lease ", lease.value));
  }
  block = std::move(it->second);
  leases_.erase(it);
  return absl::OkStatus();
}

uint64_t Session::leases() const {
  absl::MutexLock lock(&mutex_);
  return leases_.size();
}

std::vector<ContextId> Session::End() {
  absl::flat_hash_map<LeaseId, std::shared_ptr<HeldBlock>> leases;
  absl::MutexLock lock(&mutex_);
  ended_.store(true, std::memory_order_release);
  leases.swap(leases_);
  std::vector<ContextId> contexts(contexts_.begin(), contexts_.end());
  contexts_.clear();
  return contexts;
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Start(std::string_view tenant,
                                                             std::string_view name) {
  if (tenant.empty() || tenant.size() > kMaxTenantBytes) {
    return absl::InvalidArgumentError(absl::StrCat("tenant of ", tenant.size(), " bytes; 1 to ",
                                                   kMaxTenantBytes, " are allowed"));
  }
  absl::MutexLock lock(&mutex_);
  if (sessions_.size() >= max_sessions_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(sessions_.size(), " sessions are attached, the most allowed"));
  }
  for (;;) {
    const SessionId id = RandomSessionId();
    if (id.value == 0) continue;
    auto [it, fresh] = sessions_.try_emplace(id);
    if (!fresh) continue;
    it->second = std::make_shared<Session>(id, tenant, name, max_leases_);
    return it->second;
  }
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Find(SessionId id) const {
  absl::ReaderMutexLock lock(&mutex_);
  auto it = sessions_.find(id);
  if (it == sessions_.end()) {
    return absl::NotFoundError(absl::StrCat("no session ", id.value));
  }
  return it->second;
}

std::shared_ptr<Session> SessionTable::Remove(SessionId id) {
  absl::MutexLock lock(&mutex_);
  auto it = sessions_.find(id);
  if (it == sessions_.end()) return nullptr;
  std::shared_ptr<Session> session = std::move(it->second);
  sessions_.erase(it);
  return session;
}

uint64_t SessionTable::size() const {
  absl::ReaderMutexLock lock(&mutex_);
  return sessions_.size();
}

uint64_t SessionTable::leases() const {
  absl::ReaderMutexLock lock(&mutex_);
  uint64_t leases = 0;
  for (const auto& [id, session] : sessions_) leases += session->leases();
  return leases;
}

}  // namespace quarry
