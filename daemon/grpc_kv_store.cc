// quarry.v1.KvStore: unary methods and sessions. Its streams are grpc_kv_streams.cc's.
#include "daemon/grpc_kv_streams.h"
#include "daemon/log.h"
#include "quarry/v1/kv_store.grpc.pb.h"

namespace quarry {
namespace {

// A session lives as long as its stream: one message, then silence. It holds no thread.
class SessionStream : public grpc::ServerWriteReactor<v1::SessionReply> {
 public:
  SessionStream(const GrpcShared& shared, grpc::CallbackServerContext* context,
                const v1::SessionRequest& request)
      : shared_(shared) {
    if (absl::Status status = Open(*context, request); !status.ok()) {
      CountEnd(shared_, status);
      FinishOnce(ToGrpc(status));
      return;
    }
    StartWrite(&reply_);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) FinishOnce(grpc::Status::CANCELLED);
  }
  void OnCancel() override {
    EndSession();  // at once, not when the last operation has ended
    FinishOnce(grpc::Status::CANCELLED);
  }
  void OnDone() override {
    EndSession();
    delete this;
  }

 private:
  absl::Status Open(const grpc::CallbackServerContext& context, const v1::SessionRequest& request) {
    shared_.counters.grpc_calls.fetch_add(1, std::memory_order_relaxed);
    absl::StatusOr<PeerIdentity> identity = IdentityOf(shared_, context);
    if (!identity.ok()) return identity.status();
    if (shared_.parts.draining()) return absl::UnavailableError("the daemon is draining");
    ticket_ = shared_.sessions.Take(identity->tenant);
    if (!ticket_.valid()) {
      shared_.counters.grpc_calls_refused.fetch_add(1, std::memory_order_relaxed);
      return absl::ResourceExhaustedError("grpc.max_sessions_per_tenant sessions are open");
    }
    absl::StatusOr<SessionId> session =
        shared_.parts.engine.StartSession(identity->tenant, request.client_name().substr(0, 64));
    if (!session.ok()) return session.status();
    session_ = *session;
    open_.store(true);
    shared_.counters.grpc_sessions.fetch_add(1, std::memory_order_relaxed);
    reply_.set_session(session->value);
    reply_.set_tenant(identity->tenant);
    LogClientEvent(LogLevel::kInfo, "grpc session opened",
                   {{"session", session->value},
                    {"tenant", identity->tenant},
                    {"client", request.client_name().substr(0, 64)}});
    return absl::OkStatus();
  }

  void EndSession() {
    if (!open_.exchange(false)) return;
    shared_.parts.engine.EndSession(session_);
    shared_.counters.grpc_sessions.fetch_sub(1, std::memory_order_relaxed);
    LogClientEvent(LogLevel::kInfo, "grpc session ended", {{"session", session_.value}});
  }
  // A failed write and a cancellation may come on two threads.
  void FinishOnce(const grpc::Status& status) {
    if (!finished_.exchange(true)) Finish(status);
  }

  const GrpcShared& shared_;
  TenantLimit::Ticket ticket_;
  SessionId session_;
  v1::SessionReply reply_;
  std::atomic<bool> open_{false}, finished_{false};
};

class KvStoreService : public v1::KvStore::CallbackService {
 public:
  explicit KvStoreService(const GrpcShared& shared) : shared_(shared) {}
  using Context = grpc::CallbackServerContext;
  using Unary = grpc::ServerUnaryReactor;

  grpc::ServerWriteReactor<v1::SessionReply>* Session(Context* c,
                                                      const v1::SessionRequest* in) override {
    return new SessionStream(shared_, c, *in);
  }
  grpc::ServerReadReactor<v1::AppendRequest>* Append(Context* c, v1::AppendReply* out) override {
    return NewAppendStream(shared_, c, out);
  }
  grpc::ServerReadReactor<v1::PutRequest>* Put(Context* c, v1::PutReply* out) override {
    return NewPutStream(shared_, c, out);
  }
  grpc::ServerWriteReactor<v1::GetReply>* Get(Context* c, const v1::GetRequest* in) override {
    return NewGetStream(shared_, c, in);
  }

  Unary* Open(Context* c, const v1::OpenRequest* in, v1::OpenReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* DeclareTokens(Context* c, const v1::DeclareTokensRequest* in,
                       v1::DeclareTokensReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Seal(Context* c, const v1::SealRequest* in, v1::SealReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Fork(Context* c, const v1::ForkRequest* in, v1::ForkReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Close(Context* c, const v1::CloseRequest* in, v1::CloseReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* ListContexts(Context* c, const v1::ListContextsRequest* in,
                      v1::ListContextsReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Read(Context* c, const v1::ReadRequest* in, v1::ReadReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* LongestPrefix(Context* c, const v1::LongestPrefixRequest* in,
                       v1::LongestPrefixReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Prefetch(Context* c, const v1::PrefetchRequest* in, v1::PrefetchReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Exists(Context* c, const v1::ExistsRequest* in, v1::ExistsReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Pin(Context* c, const v1::PinRequest* in, v1::PinReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Unpin(Context* c, const v1::UnpinRequest* in, v1::UnpinReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Purge(Context* c, const v1::PurgeRequest* in, v1::PurgeReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* Flush(Context* c, const v1::FlushRequest* in, v1::FlushReply* out) override {
    return RunUnary(shared_, c, in, out);
  }
  Unary* ListBlocks(Context* c, const v1::ListBlocksRequest* in,
                    v1::ListBlocksReply* out) override {
    return RunUnary(shared_, c, in, out);
  }

 private:
  const GrpcShared& shared_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewKvStoreService(const GrpcShared& shared) {
  return std::make_unique<KvStoreService>(shared);
}

}  // namespace quarry
