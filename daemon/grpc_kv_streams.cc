#include "daemon/grpc_kv_streams.h"

#include <algorithm>
#include <span>

#include "absl/strings/str_cat.h"
#include "proto/convert.h"
#include "proto/shm_layout.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint64_t kGetPieceBytes = 1 << 20;

// Reads messages one at a time; each is handled on the pool before the next is read.
template <typename Request>
class ReadStream : public grpc::ServerReadReactor<Request> {
 public:
  ReadStream(const GrpcShared& shared, grpc::CallbackServerContext* context) : shared_(shared) {
    absl::StatusOr<Admission> admission = Admit(shared, *context);
    if (!admission.ok()) {
      End(admission.status());
      return;
    }
    admission_ = *std::move(admission);
    this->StartRead(&request_);
  }
  void OnReadDone(bool ok) override {
    const bool taken = RunOnPool(shared_, [this, ok] {
      const absl::Status status = ok ? Handle() : Complete();
      if (!ok || !status.ok()) return End(status);
      this->StartRead(&request_);
    });
    if (!taken) End(PoolFull());
  }
  void OnDone() override { delete this; }

 protected:
  virtual absl::Status Handle() = 0;    // request_
  virtual absl::Status Complete() = 0;  // the client has sent everything, or has gone
  void End(const absl::Status& status) {
    CountEnd(shared_, status);
    this->Finish(ToGrpc(status));
  }

  const GrpcShared& shared_;
  Admission admission_;
  Request request_;
};

class AppendStream : public ReadStream<v1::AppendRequest> {
 public:
  AppendStream(const GrpcShared& shared, grpc::CallbackServerContext* context,
               v1::AppendReply* reply)
      : ReadStream(shared, context), reply_(*reply) {}

 private:
  absl::Status Handle() override {
    const SessionId session = admission_.caller.session;
    Engine& engine = shared_.parts.engine;
    QUARRY_ASSIGN_OR_RETURN(const AppendRequest append, FromProto(request_));
    QUARRY_ASSIGN_OR_RETURN(const ContextInfo info, engine.Info(session, append.context));
    const KvShape& shape = info.shape;
    if (append.kv_heads == 0 || append.kv_heads > shape.kv_heads) {
      return absl::InvalidArgumentError(
          absl::StrCat("append of ", append.kv_heads, " KV heads of ", shape.kv_heads));
    }
    const uint64_t bytes = uint64_t{append.range.size()} * append.kv_heads * shape.vector_bytes();
    if (request_.k().size() != bytes || request_.v().size() != bytes) {
      return absl::InvalidArgumentError(absl::StrCat("k and v have ", request_.k().size(), " and ",
                                                     request_.v().size(), " bytes, must have ",
                                                     bytes));
    }
    const uint64_t floats = uint64_t(request_.query_positions_size()) * append.kv_heads *
                            shape.group() * shape.head_dim;
    if (static_cast<uint64_t>(request_.query_samples_size()) != floats) {
      return absl::InvalidArgumentError(
          absl::StrCat(request_.query_samples_size(), " floats of query samples for ",
                       request_.query_positions_size(), " positions, must be ", floats));
    }
    QUARRY_RETURN_IF_ERROR(engine.Append(session, append));
    reply_.set_tokens(reply_.tokens() + append.range.size());
    return absl::OkStatus();
  }
  absl::Status Complete() override { return absl::OkStatus(); }

  v1::AppendReply& reply_;
};

class PutStream : public ReadStream<v1::PutRequest> {
 public:
  PutStream(const GrpcShared& shared, grpc::CallbackServerContext* context, v1::PutReply* reply)
      : ReadStream(shared, context), reply_(*reply) {}

 private:
  absl::Status Handle() override {
    if (!begun_) {
      QUARRY_RETURN_IF_ERROR(Begin());
    } else if (Differs(request_.key(), key_) ||
               Differs(request_.engine_namespace(), name_space_)) {
      return absl::InvalidArgumentError("a later message names another key or namespace");
    }
    if (request_.data().size() > total_bytes_ - data_.size()) {
      return absl::InvalidArgumentError(absl::StrCat("data of ",
                                                     data_.size() + request_.data().size(),
                                                     " bytes, announced were ", total_bytes_));
    }
    data_.append(request_.data());
    return absl::OkStatus();
  }

  // Only the first message has to say it.
  static bool Differs(const std::string& said, const std::string& first) {
    return !said.empty() && said != first;
  }

  absl::Status Begin() {
    begun_ = true;
    name_space_ = request_.engine_namespace();
    key_ = request_.key();
    total_bytes_ = request_.total_bytes();
    if (request_.has_digest()) digest_ = FromProto(request_.digest());
    if (key_.empty() || key_.size() > shm::kMaxNameBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the key has ", key_.size(), " bytes; 1 to ", shm::kMaxNameBytes, " are allowed"));
    }
    if (total_bytes_ > shared_.options.max_put_bytes) {
      return absl::InvalidArgumentError(absl::StrCat("a block of ", total_bytes_,
                                                     " bytes; grpc.max_put_bytes is ",
                                                     shared_.options.max_put_bytes));
    }
    return absl::OkStatus();
  }

  absl::Status Complete() override {
    if (!begun_ || data_.size() != total_bytes_) {
      return absl::InvalidArgumentError(
          absl::StrCat("the stream ended after ", data_.size(), " of ", total_bytes_, " bytes"));
    }
    QUARRY_ASSIGN_OR_RETURN(
        const PutResult result,
        shared_.parts.engine.Put(admission_.caller.session, name_space_, key_,
                                 std::as_bytes(std::span<const char>(data_)), digest_));
    reply_.set_block_id(ToBytes(result.id));
    *reply_.mutable_digest() = ToProto(result.digest);
    reply_.set_existed(result.existed);
    return absl::OkStatus();
  }

  v1::PutReply& reply_;
  bool begun_ = false;
  std::string name_space_, key_, data_;
  uint64_t total_bytes_ = 0;
  std::optional<ByteDigest> digest_;
};

class GetStream : public grpc::ServerWriteReactor<v1::GetReply> {
 public:
  GetStream(const GrpcShared& shared, grpc::CallbackServerContext* context,
            const v1::GetRequest& request)
      : shared_(shared), request_(request) {
    absl::StatusOr<Admission> admission = Admit(shared, *context);
    if (!admission.ok()) {
      End(admission.status());
      return;
    }
    admission_ = *std::move(admission);
    if (!RunOnPool(shared, [this] { Fetch(); })) End(PoolFull());
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return End(absl::CancelledError("the client has gone"));
    if (sent_ == bytes_.size()) return End(absl::OkStatus());
    SendPiece();
  }
  void OnDone() override { delete this; }

 private:
  void Fetch() {
    ByteDigest digest;
    absl::StatusOr<std::string> bytes = shared_.parts.engine.Get(
        admission_.caller.session, request_.engine_namespace(), request_.key(), &digest);
    if (!bytes.ok()) return End(bytes.status());
    bytes_ = *std::move(bytes);
    reply_.set_total_bytes(bytes_.size());
    *reply_.mutable_digest() = ToProto(digest);
    SendPiece();
  }
  // The first message, with total and digest, goes out also for an empty block.
  void SendPiece() {
    const uint64_t piece = std::min<uint64_t>(
        {kGetPieceBytes, bytes_.size() - sent_, shared_.options.max_message_bytes / 2});
    reply_.set_data(bytes_.data() + sent_, piece);
    sent_ += piece;
    StartWrite(&reply_);
  }
  void End(const absl::Status& status) {
    CountEnd(shared_, status);
    Finish(ToGrpc(status));
  }

  const GrpcShared& shared_;
  const v1::GetRequest& request_;
  Admission admission_;
  std::string bytes_;
  uint64_t sent_ = 0;
  v1::GetReply reply_;
};

}  // namespace

grpc::ServerReadReactor<v1::AppendRequest>* NewAppendStream(const GrpcShared& shared,
                                                            grpc::CallbackServerContext* context,
                                                            v1::AppendReply* reply) {
  return new AppendStream(shared, context, reply);
}

grpc::ServerReadReactor<v1::PutRequest>* NewPutStream(const GrpcShared& shared,
                                                      grpc::CallbackServerContext* context,
                                                      v1::PutReply* reply) {
  return new PutStream(shared, context, reply);
}

grpc::ServerWriteReactor<v1::GetReply>* NewGetStream(const GrpcShared& shared,
                                                     grpc::CallbackServerContext* context,
                                                     const v1::GetRequest* request) {
  return new GetStream(shared, context, *request);
}

}  // namespace quarry
