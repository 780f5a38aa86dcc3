// A gRPC session for integration tests.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>

#include "proto/convert.h"
#include "quarry/v1/admin.grpc.pb.h"
#include "quarry/v1/kv_store.grpc.pb.h"
#include "quarry/v1/retrieval.grpc.pb.h"

namespace quarry::testing {

// A session over gRPC on the daemon's Unix socket.
class GrpcSession {
 public:
  explicit GrpcSession(const std::string& path) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    arguments.SetMaxSendMessageSize(-1);
    const auto channel =
        grpc::CreateCustomChannel("unix:" + path, grpc::InsecureChannelCredentials(), arguments);
    kv = wire::KvStore::NewStub(channel);
    retrieval = wire::Retrieval::NewStub(channel);
    admin = wire::Admin::NewStub(channel);
    stream_ = kv->Session(&context_, wire::SessionRequest());
    EXPECT_TRUE(stream_->Read(&reply));
  }
  ~GrpcSession() {
    context_.TryCancel();
    (void)stream_->Finish();
  }
  std::unique_ptr<grpc::ClientContext> Context() const {
    auto context = std::make_unique<grpc::ClientContext>();
    context->AddMetadata("quarry-session", std::to_string(reply.session()));
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    return context;
  }
  std::unique_ptr<wire::KvStore::Stub> kv;
  std::unique_ptr<wire::Retrieval::Stub> retrieval;
  std::unique_ptr<wire::Admin::Stub> admin;
  wire::SessionReply reply;

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<wire::SessionReply>> stream_;
};

}  // namespace quarry::testing
