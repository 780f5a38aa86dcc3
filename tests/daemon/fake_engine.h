// An engine without attention: sessions, contexts of one shape, answers that name their row. Lets
// the transports be tested on their own, and lets a test hold attends back.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "daemon/engine.h"

namespace quarry::testing {

inline KvShape FakeShape() { return {2, 4, 2, 16, DType::kFp32}; }

class FakeEngine : public Engine {
 public:
  ~FakeEngine() override {
    for (const auto& [index, extent] : extents_) close(extent.fd);
  }

  // ---- What tests look at and steer.
  std::set<uint64_t> sessions() const {
    const absl::MutexLock lock(&mutex_);
    std::set<uint64_t> ids;
    for (const auto& [id, tenant] : sessions_) ids.insert(id);
    return ids;
  }
  bool armed() const {
    const absl::MutexLock lock(&mutex_);
    return armed_;
  }
  void HoldAttends(bool hold) {
    const absl::MutexLock lock(&mutex_);
    hold_ = hold;
  }
  size_t held() const {
    const absl::MutexLock lock(&mutex_);
    return held_.size();
  }
  // Answers every held attend on the calling thread.
  void ReleaseAttends() {
    std::vector<std::function<void()>> held;
    {
      const absl::MutexLock lock(&mutex_);
      held.swap(held_);
    }
    for (auto& finish : held) finish();
  }
  // Calls of Append block until released.
  void HoldAppends(bool hold) {
    const absl::MutexLock lock(&mutex_);
    hold_appends_ = hold;
  }
  std::vector<std::string> appended() const {
    const absl::MutexLock lock(&mutex_);
    return appended_;
  }
  // An extent of `tenant` with `bytes` bytes of `fill`.
  uint32_t AddExtent(const std::string& tenant, uint64_t bytes, char fill) {
    const absl::MutexLock lock(&mutex_);
    ExtentInfo extent;
    extent.index = static_cast<uint32_t>(extents_.size()) + 1;
    extent.fd = memfd_create("fake-extent", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    const std::string data(bytes, fill);
    [[maybe_unused]] const ssize_t n = write(extent.fd, data.data(), data.size());
    fcntl(extent.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
    extent.bytes = bytes;
    extent.page_bytes = 4096;
    extent.tenant = tenant;
    extents_[extent.index] = extent;
    return extent.index;
  }
  bool drained() const {
    const absl::MutexLock lock(&mutex_);
    return drained_;
  }

  // ---- Engine.
  absl::StatusOr<SessionId> StartSession(std::string_view tenant, std::string_view) override {
    const absl::MutexLock lock(&mutex_);
    sessions_[++next_] = std::string(tenant);
    return SessionId{next_};
  }
  absl::StatusOr<std::string> SessionTenant(SessionId session) const override {
    const absl::MutexLock lock(&mutex_);
    const auto it = sessions_.find(session.value);
    if (it == sessions_.end()) return NoSession(session);
    return it->second;
  }
  void EndSession(SessionId session) override {
    const absl::MutexLock lock(&mutex_);
    sessions_.erase(session.value);
  }
  absl::StatusOr<OpenResult> Open(SessionId session, const OpenRequest& request) override {
    const absl::MutexLock lock(&mutex_);
    if (drained_) return absl::UnavailableError("draining");
    const auto it = sessions_.find(session.value);
    if (it == sessions_.end()) return NoSession(session);
    contexts_[++next_] = {it->second, request.max_tokens};
    OpenResult result;
    result.context = {next_};
    return result;
  }
  absl::Status DeclareTokens(SessionId s, ContextId c, std::span<const uint32_t>) override {
    return Info(s, c).status();
  }
  absl::Status Append(SessionId session, const AppendRequest& request) override {
    const absl::MutexLock lock(&mutex_);
    const auto free = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !hold_appends_; };
    mutex_.Await(absl::Condition(&free));
    if (!sessions_.contains(session.value)) return NoSession(session);
    appended_.push_back(absl::StrCat(request.context.value, " layer ", request.layer, " tokens ",
                                     request.range.lo, "-", request.range.hi, " ids ",
                                     request.new_token_ids.size()));
    return absl::OkStatus();
  }
  absl::StatusOr<ContextInfo> Seal(SessionId s, ContextId c) override { return Info(s, c); }
  absl::StatusOr<ContextId> Fork(SessionId s, const ForkRequest& request) override {
    if (absl::Status status = Info(s, request.context).status(); !status.ok()) return status;
    const absl::MutexLock lock(&mutex_);
    const auto it = sessions_.find(s.value);
    if (it == sessions_.end()) return NoSession(s);
    contexts_[++next_] = {it->second, request.max_tokens};
    return ContextId{next_};
  }
  absl::Status Close(SessionId s, ContextId c) override {
    if (absl::Status status = Info(s, c).status(); !status.ok()) return status;
    const absl::MutexLock lock(&mutex_);
    contexts_.erase(c.value);
    return absl::OkStatus();
  }
  absl::StatusOr<ContextInfo> Info(SessionId session, ContextId context) override {
    const absl::MutexLock lock(&mutex_);
    const auto s = sessions_.find(session.value);
    if (s == sessions_.end()) return NoSession(session);
    const auto c = contexts_.find(context.value);
    if (c == contexts_.end() || c->second.tenant != s->second) {
      return absl::NotFoundError(absl::StrCat("no context ", context.value));
    }
    ContextInfo info;
    info.context = context;
    info.model = "fake";
    info.shape = FakeShape();
    info.tokens = info.known_tokens = info.max_tokens = c->second.max_tokens;
    return info;
  }
  absl::StatusOr<std::vector<ContextInfo>> ListContexts(SessionId session) override {
    std::vector<uint64_t> ids;
    {
      const absl::MutexLock lock(&mutex_);
      for (const auto& [id, context] : contexts_) ids.push_back(id);
    }
    std::vector<ContextInfo> out;
    for (const uint64_t id : ids) {
      if (auto info = Info(session, {id}); info.ok()) out.push_back(*info);
    }
    return out;
  }
  absl::Status Read(SessionId s, ContextId c, uint32_t layer, TokenRange, std::span<std::byte> k,
                    std::span<std::byte> v) override {
    if (absl::Status status = Info(s, c).status(); !status.ok()) return status;
    std::memset(k.data(), static_cast<int>('k' + layer), k.size());
    std::memset(v.data(), static_cast<int>('v' + layer), v.size());
    return absl::OkStatus();
  }
  absl::StatusOr<BlockLease> LeaseContextBlock(SessionId s, ContextId c, uint32_t block) override {
    if (absl::Status status = Info(s, c).status(); !status.ok()) return status;
    return BlockLease{{100 + block}, 1, block * 4096ull, 4096, {1, 2}};
  }
  absl::StatusOr<BlockLease> LeaseEngineBlock(SessionId session, std::string_view name_space,
                                              std::string_view key) override {
    const absl::MutexLock lock(&mutex_);
    const auto it = blocks_.find(KeyOf(session, name_space, key));
    if (it == blocks_.end()) return absl::NotFoundError("no such block");
    return BlockLease{{7}, 1, 0, it->second.size(), {3, 4}};
  }
  absl::Status ReleaseLease(SessionId, LeaseId lease) override {
    return lease.value >= 100 || lease.value == 7 ? absl::OkStatus()
                                                  : absl::NotFoundError("no such lease");
  }
  absl::StatusOr<std::vector<bool>> Exists(SessionId session, std::string_view name_space,
                                           std::span<const std::string> keys) override {
    const absl::MutexLock lock(&mutex_);
    std::vector<bool> out;
    for (const std::string& key : keys) {
      out.push_back(blocks_.contains(KeyOf(session, name_space, key)));
    }
    return out;
  }
  absl::StatusOr<LongestPrefix> FindLongestPrefix(SessionId, const OpenRequest&) override {
    return LongestPrefix{};
  }
  absl::StatusOr<uint64_t> Prefetch(SessionId, const OpenRequest& request) override {
    return request.tokens.size();
  }
  absl::StatusOr<PutResult> Put(SessionId session, std::string_view name_space,
                                std::string_view key, std::span<const std::byte> bytes,
                                std::optional<ByteDigest> digest) override {
    const absl::MutexLock lock(&mutex_);
    PutResult result;
    result.digest = digest.value_or(ByteDigest{5, 6});
    result.existed =
        !blocks_
             .emplace(KeyOf(session, name_space, key),
                      std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()))
             .second;
    return result;
  }
  absl::StatusOr<std::string> Get(SessionId session, std::string_view name_space,
                                  std::string_view key, ByteDigest* digest) override {
    const absl::MutexLock lock(&mutex_);
    const auto it = blocks_.find(KeyOf(session, name_space, key));
    if (it == blocks_.end()) return absl::NotFoundError("no such block");
    *digest = {5, 6};
    return it->second;
  }
  absl::StatusOr<uint64_t> Pin(SessionId, const PinRequest& request) override {
    return request.blocks.size() * 1000;
  }
  absl::Status Unpin(SessionId, std::string_view name) override {
    return name == "known" ? absl::OkStatus() : absl::NotFoundError("no such pin");
  }
  absl::StatusOr<uint64_t> Purge(SessionId, const PurgeRequest& request) override {
    return request.blocks.size();
  }
  absl::StatusOr<FlushResult> Flush(SessionId, const FlushRequest& request) override {
    FlushResult result;
    result.durable_blocks = request.blocks.size();
    result.refusal = "nothing";
    return result;
  }
  absl::StatusOr<std::vector<BlockInfo>> ListBlocks(SessionId, uint32_t) override {
    BlockInfo block;
    block.state = BlockState::kPublished;
    block.bytes = 77;
    return std::vector<BlockInfo>{block};
  }

  // o[i] = q[i] + layer; lse = first_head.
  void Attend(SessionId session, std::span<const AttendRow> rows, std::span<AttendAnswer> answers,
              std::function<void()> done) override {
    auto finish = [this, session, rows, answers, done = std::move(done)] {
      for (size_t i = 0; i < rows.size(); ++i) AnswerRow(session, rows[i], answers[i]);
      done();
    };
    {
      const absl::MutexLock lock(&mutex_);
      if (hold_) {
        held_.push_back(std::move(finish));
        return;
      }
    }
    finish();
  }
  TopKAnswer TopK(SessionId, const AttendRow& row, uint32_t k, bool) override {
    TopKAnswer answer;
    for (uint32_t h = 0; h < row.heads; ++h) {
      answer.heads.emplace_back();
      for (uint32_t i = 0; i < k; ++i) answer.heads.back().push_back({i, 1.0f / (1 + i)});
    }
    return answer;
  }
  // One head, of the tenant's own model.
  absl::StatusOr<std::vector<HeadAudit>> Audits(SessionId session) override {
    absl::StatusOr<std::string> tenant = SessionTenant(session);
    if (!tenant.ok()) return tenant.status();
    HeadAudit audit{"model of " + *tenant, 3, 1, {}};
    audit.figures.audits = 4;
    return std::vector{audit};
  }
  std::vector<HeadAudit> AuditsOfAllTenants() const override {
    const absl::MutexLock lock(&mutex_);
    return audits_;
  }
  void SetAuditsOfAllTenants(std::vector<HeadAudit> audits) {
    const absl::MutexLock lock(&mutex_);
    audits_ = std::move(audits);
  }
  bool Work() override { return false; }
  void SetArmed(bool armed) override {
    const absl::MutexLock lock(&mutex_);
    armed_ = armed;
  }
  absl::StatusOr<ExtentInfo> Extent(SessionId session, uint32_t extent) override {
    const absl::MutexLock lock(&mutex_);
    const auto it = extents_.find(extent);
    if (it == extents_.end() || !sessions_.contains(session.value) ||
        it->second.tenant != sessions_[session.value]) {
      return absl::NotFoundError(absl::StrCat("no extent ", extent));
    }
    return it->second;
  }
  void Drain() override {
    const absl::MutexLock lock(&mutex_);
    drained_ = true;
  }
  EngineStats Stats() const override {
    const absl::MutexLock lock(&mutex_);
    EngineStats stats;
    stats.sessions = sessions_.size();
    stats.contexts = contexts_.size();
    return stats;
  }

 private:
  struct Context {
    std::string tenant;
    uint32_t max_tokens = 0;
  };
  static absl::Status NoSession(SessionId session) {
    return absl::NotFoundError(absl::StrCat("no session ", session.value));
  }
  std::string KeyOf(SessionId session, std::string_view name_space, std::string_view key) {
    const auto it = sessions_.find(session.value);
    return (it == sessions_.end() ? std::string("?") : it->second) + "/" + std::string(name_space) +
           "/" + std::string(key);
  }
  void AnswerRow(SessionId session, const AttendRow& row, AttendAnswer& answer) {
    if (absl::StatusOr<ContextInfo> info = Info(session, row.context); !info.ok()) {
      answer.status = info.status();
      return;
    }
    const auto* q = static_cast<const std::byte*>(row.q);
    for (size_t i = 0; i < answer.o.size(); ++i) {
      float value = 0;
      if (row.q_dtype == DType::kFp32) std::memcpy(&value, q + i * 4, 4);
      answer.o[i] = value + static_cast<float>(row.layer);
    }
    for (float& lse : answer.lse) lse = static_cast<float>(row.first_head);
    answer.covered = row.range;
    answer.tokens_attended = uint64_t{row.range.size()} * row.heads;
  }

  mutable absl::Mutex mutex_;
  uint64_t next_ = 0;
  std::map<uint64_t, std::string> sessions_;  // tenants
  std::map<uint64_t, Context> contexts_;
  std::map<std::string, std::string> blocks_;
  std::map<uint32_t, ExtentInfo> extents_;
  std::vector<std::function<void()>> held_;
  std::vector<std::string> appended_;
  std::vector<HeadAudit> audits_;
  bool hold_ = false, hold_appends_ = false, armed_ = false, drained_ = false;
};

}  // namespace quarry::testing
