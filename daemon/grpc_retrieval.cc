// quarry.v1.Retrieval.
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/grpc_calls.h"
#include "proto/attend_shape.h"
#include "proto/convert.h"
#include "proto/shm_layout.h"
#include "proto/status_macros.h"
#include "quarry/v1/retrieval.grpc.pb.h"

namespace quarry {
namespace {

// One attend message in flight. Borrows the request; fills the reply.
class AttendJob {
 public:
  AttendJob(const GrpcShared& shared, SessionId session, const v1::AttendRequest& request,
            v1::AttendReply* reply)
      : shared_(shared), session_(session), request_(request), reply_(*reply) {}

  // `done` runs once, on any thread; not OK: the message as a whole was wrong.
  void Run(std::function<void(absl::Status)> done) {
    started_ = absl::Now();
    done_ = std::move(done);
    if (request_.rows_size() == 0 || static_cast<uint32_t>(request_.rows_size()) > shm::kMaxRows) {
      return End(absl::InvalidArgumentError(absl::StrCat(
          request_.rows_size(), " rows in a message; 1 to ", shm::kMaxRows, " are allowed")));
    }
    reply_.Clear();
    for (int i = 0; i < request_.rows_size(); ++i) {
      v1::AttendAnswer& answer = *reply_.add_answers();
      const absl::Status added = AddRow(request_.rows(i));
      if (added.ok()) {
        places_.push_back(i);
      } else {
        answer.set_status(static_cast<uint32_t>(added.code()));
        answer.set_error(std::string(added.message()));
      }
    }
    if (rows_.empty()) return Finish();
    // Rows and answers have their places; only now may answers point into the buffers.
    size_t at = 0;
    buffer_.resize(floats_);
    for (size_t i = 0; i < rows_.size(); ++i) {
      answers_[i].o = {buffer_.data() + at, sizes_[i].o / sizeof(float)};
      at += answers_[i].o.size();
      answers_[i].lse = {buffer_.data() + at, sizes_[i].lse / sizeof(float)};
      at += answers_[i].lse.size();
    }
    // This object may be gone as soon as the batch is answered.
    Engine& engine = shared_.parts.engine;
    const auto answered = std::make_shared<std::atomic<bool>>(false);
    engine.Attend(session_, rows_, answers_, [this, answered] {
      answered->store(true, std::memory_order_relaxed);
      Finish();
    });
    while (!answered->load(std::memory_order_relaxed) && engine.Work()) {
    }
  }

 private:
  absl::Status AddRow(const v1::AttendRow& message) {
    QUARRY_ASSIGN_OR_RETURN(const RowFromWire wire, FromProto(message));
    QUARRY_ASSIGN_OR_RETURN(const ContextInfo info,
                            shared_.parts.engine.Info(session_, wire.row.context));
    QUARRY_ASSIGN_OR_RETURN(const AttendRowBytes bytes, BytesOfRow(wire.row, info.shape));
    if (wire.q_bytes != bytes.q || wire.k_bytes != bytes.kv || wire.v_bytes != bytes.kv) {
      return absl::InvalidArgumentError(
          absl::StrCat("q, k and v have ", wire.q_bytes, ", ", wire.k_bytes, " and ", wire.v_bytes,
                       " bytes, must have ", bytes.q, ", ", bytes.kv, " and ", bytes.kv));
    }
    rows_.push_back(wire.row);
    sizes_.push_back(bytes);
    answers_.emplace_back();
    floats_ += (bytes.o + bytes.lse) / sizeof(float);
    if (floats_ * sizeof(float) > shared_.options.max_message_bytes) {
      rows_.pop_back();
      answers_.pop_back();
      sizes_.pop_back();
      floats_ -= (bytes.o + bytes.lse) / sizeof(float);
      return absl::ResourceExhaustedError(absl::StrCat("the answers of the rows do not fit into ",
                                                       shared_.options.max_message_bytes,
                                                       " bytes, grpc.max_message_bytes"));
    }
    return absl::OkStatus();
  }

  void Finish() {
    for (size_t i = 0; i < answers_.size(); ++i) {
      *reply_.mutable_answers(places_[i]) = ToProto(answers_[i]);
    }
    shared_.counters.grpc_attend.Observe(
        static_cast<uint64_t>(absl::ToInt64Nanoseconds(absl::Now() - started_)));
    End(absl::OkStatus());
  }

  // `done` may destroy this object, and with it done_, while it runs.
  void End(const absl::Status& status) {
    const auto done = std::move(done_);
    done(status);
  }

  const GrpcShared& shared_;
  const SessionId session_;
  const v1::AttendRequest& request_;
  v1::AttendReply& reply_;
  std::function<void(absl::Status)> done_;
  absl::Time started_;
  std::vector<AttendRow> rows_;
  std::vector<AttendRowBytes> sizes_;
  std::vector<AttendAnswer> answers_;
  std::vector<int> places_;  // engine row -> message row
  std::vector<float> buffer_;
  size_t floats_ = 0;
};

class AttendCall : public UnaryCall {
 public:
  using UnaryCall::UnaryCall;
  void Start(const v1::AttendRequest* request, v1::AttendReply* reply) {
    job_ = std::make_unique<AttendJob>(shared_, admission.caller.session, *request, reply);
    shared_.working.fetch_add(1);
    const bool taken = RunOnPool(shared_, [this, reply] {
      job_->Run([this, reply, &shared = shared_](const absl::Status& status) {
        End(status, reply->ByteSizeLong());
        shared.working.fetch_sub(1);
      });
    });
    if (!taken) {
      shared_.working.fetch_sub(1);
      End(PoolFull());
    }
  }

 private:
  std::unique_ptr<AttendJob> job_;
};

// One reply per request, in order: the next request is read when the reply is written, so a
// client that does not read is not read from either.
template <typename Request, typename Reply>
class PingPong : public grpc::ServerBidiReactor<Request, Reply> {
 public:
  PingPong(const GrpcShared& shared, grpc::CallbackServerContext* context) : shared_(shared) {
    absl::StatusOr<Admission> admission = Admit(shared, *context);
    if (!admission.ok()) {
      End(admission.status());
      return;
    }
    admission_ = *std::move(admission);
    this->StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(absl::OkStatus());  // half-closed, or gone
    if (shared_.parts.draining()) {
      return End(absl::UnavailableError("the daemon is draining; it takes no new requests"));
    }
    if (!RunOnPool(shared_, [this] { Serve(); })) End(PoolFull());
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return End(absl::CancelledError("the client has gone"));
    this->StartRead(&request_);
  }
  void OnDone() override { delete this; }

 protected:
  // Answers request_ in reply_, then calls Reply.
  virtual void Serve() = 0;
  void SendReply(const absl::Status& status) {
    if (!status.ok()) return End(status);
    this->StartWrite(&reply_);
  }
  void End(const absl::Status& status) {
    CountEnd(shared_, status);
    this->Finish(ToGrpc(status));
  }

  const GrpcShared& shared_;
  Admission admission_;
  Request request_;
  Reply reply_;
};

class AttendStreamCall : public PingPong<v1::AttendRequest, v1::AttendReply> {
 public:
  using PingPong::PingPong;

 private:
  void Serve() override {
    job_ = std::make_unique<AttendJob>(shared_, admission_.caller.session, request_, &reply_);
    shared_.working.fetch_add(1);
    job_->Run([this, &shared = shared_](const absl::Status& status) {
      SendReply(status);
      shared.working.fetch_sub(1);
    });
  }
  std::unique_ptr<AttendJob> job_;
};

class TopKStreamCall : public PingPong<v1::TopKRequest, v1::TopKReply> {
 public:
  using PingPong::PingPong;

 private:
  void Serve() override {
    reply_.Clear();
    SendReply(Call(shared_.parts, admission_.caller, request_, &reply_));
  }
};

class RetrievalService : public v1::Retrieval::CallbackService {
 public:
  explicit RetrievalService(const GrpcShared& shared) : shared_(shared) {}

  grpc::ServerUnaryReactor* Attend(grpc::CallbackServerContext* context,
                                   const v1::AttendRequest* request,
                                   v1::AttendReply* reply) override {
    auto* call = new AttendCall(shared_);
    absl::StatusOr<Admission> admission = Admit(shared_, *context);
    if (!admission.ok()) {
      call->End(admission.status());
    } else {
      call->admission = *std::move(admission);
      call->Start(request, reply);
    }
    return call;
  }
  grpc::ServerBidiReactor<v1::AttendRequest, v1::AttendReply>* AttendStream(
      grpc::CallbackServerContext* context) override {
    return new AttendStreamCall(shared_, context);
  }
  grpc::ServerUnaryReactor* TopK(grpc::CallbackServerContext* context,
                                 const v1::TopKRequest* request, v1::TopKReply* reply) override {
    return RunUnary(shared_, context, request, reply);
  }
  grpc::ServerBidiReactor<v1::TopKRequest, v1::TopKReply>* TopKStream(
      grpc::CallbackServerContext* context) override {
    return new TopKStreamCall(shared_, context);
  }

 private:
  const GrpcShared& shared_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewRetrievalService(const GrpcShared& shared) {
  return std::make_unique<RetrievalService>(shared);
}

}  // namespace quarry
