// quarry.v1.Admin.
#include "daemon/grpc_calls.h"
#include "quarry/v1/admin.grpc.pb.h"

namespace quarry {
namespace {

class AdminService : public v1::Admin::CallbackService {
 public:
  explicit AdminService(const GrpcShared& shared) : shared_(shared) {}

  grpc::ServerUnaryReactor* Status(grpc::CallbackServerContext* context,
                                   const v1::StatusRequest* request,
                                   v1::StatusReply* reply) override {
    return RunUnary(shared_, context, request, reply, SessionPolicy::kOptional);
  }
  grpc::ServerUnaryReactor* Statistics(grpc::CallbackServerContext* context,
                                       const v1::StatisticsRequest* request,
                                       v1::StatisticsReply* reply) override {
    return RunUnary(shared_, context, request, reply, SessionPolicy::kOptional);
  }
  // Of the session's tenant, so a session is needed.
  grpc::ServerUnaryReactor* Audit(grpc::CallbackServerContext* context,
                                  const v1::AuditRequest* request, v1::AuditReply* reply) override {
    return RunUnary(shared_, context, request, reply);
  }
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request, v1::DrainReply* reply) override {
    return RunUnary(shared_, context, request, reply, SessionPolicy::kOptional);
  }

 private:
  const GrpcShared& shared_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewAdminService(const GrpcShared& shared) {
  return std::make_unique<AdminService>(shared);
}

}  // namespace quarry
