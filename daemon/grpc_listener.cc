#include "daemon/grpc_listener.h"

#include <chrono>
#include <fstream>
#include <sstream>

#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server_posix.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "daemon/grpc_accept.h"
#include "daemon/grpc_calls.h"
#include "daemon/ip_address.h"
#include "daemon/log.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr int kStreamsPerConnection = 256;
// Remote peers that vanish without closing their connection are found by gRPC's pings.
constexpr int kRemotePingMs = 60000;
// What Shutdown leaves calls that are only being written; open streams are cancelled then.
constexpr auto kShutdownGrace = std::chrono::milliseconds(200);

void ToOurLog(gpr_log_func_args* args) {
  const LogLevel level = args->severity == GPR_LOG_SEVERITY_ERROR  ? LogLevel::kError
                         : args->severity == GPR_LOG_SEVERITY_INFO ? LogLevel::kInfo
                                                                   : LogLevel::kDebug;
  LogClientEvent(level, "grpc", {{"message", args->message}});
}

absl::StatusOr<std::string> ReadFile(const char* key, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) return absl::NotFoundError(absl::StrCat(key, " = \"", path, "\": cannot be read"));
  return text.str();
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> CredentialsFor(const GrpcOptions& o) {
  if (!o.tls()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions ssl(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  QUARRY_ASSIGN_OR_RETURN(pair.private_key, ReadFile("grpc.tls_key", o.tls_key));
  QUARRY_ASSIGN_OR_RETURN(pair.cert_chain, ReadFile("grpc.tls_certificate", o.tls_certificate));
  QUARRY_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadFile("grpc.tls_client_ca", o.tls_client_ca));
  ssl.pem_key_cert_pairs.push_back(std::move(pair));
  return grpc::SslServerCredentials(ssl);
}

class GrpcListenerImpl : public GrpcListener {
 public:
  GrpcListenerImpl(const GrpcOptions& options, const ServiceParts& parts,
                   const PeerTenants& tenants)
      : options_(options),
        tenants_(tenants),
        peers_(GrpcPeers::DefaultRange()),
        pool_({options.threads, options.queue, "quarry-grpc"}),
        calls_(options.max_calls_per_tenant),
        sessions_(options.max_sessions_per_tenant),
        shared_{options_, parts,  tenants,   peers_,
                pool_,    calls_, sessions_, parts.metrics.counters(),
                working_} {}

  // Streams and sessions are cancelled; calls in the engine are waited for.
  ~GrpcListenerImpl() override {
    accept_.reset();
    if (server_ != nullptr) {
      server_->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
      server_->Wait();
    }
  }

  absl::Status Serve() {
    // Never shut down again: gRPC's last shutdown may wait 10 s for a poller of its own.
    static const bool initialized = (grpc_init(), true);
    (void)initialized;
    gpr_set_log_function(ToOurLog);
    kv_store_ = NewKvStoreService(shared_);
    retrieval_ = NewRetrievalService(shared_);
    admin_ = NewAdminService(shared_);
    grpc::ServerBuilder builder;
    builder.RegisterService(kv_store_.get());
    builder.RegisterService(retrieval_.get());
    builder.RegisterService(admin_.get());
    builder.SetMaxReceiveMessageSize(static_cast<int>(options_.max_message_bytes));
    builder.SetMaxSendMessageSize(static_cast<int>(options_.max_message_bytes) + 4096);
    // Two daemons must not share a port unnoticed.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kStreamsPerConnection);
    QUARRY_RETURN_IF_ERROR(AddTcp(builder));
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || (!options_.listen.empty() && port_ == 0)) {
      return absl::FailedPreconditionError(
          absl::StrCat("grpc.listen = \"", options_.listen,
                       "\": cannot listen there, is another quarryd running?"));
    }
    if (!options_.listen.empty()) {
      Log(LogLevel::kInfo, "serving gRPC",
          {{"listen", options_.listen}, {"port", port_}, {"tls", options_.tls()}});
    }
    if (options_.socket.empty()) return absl::OkStatus();
    QUARRY_ASSIGN_OR_RETURN(
        accept_, GrpcAccept::Start(options_, {tenants_, peers_, shared_.counters, [this](int fd) {
                                                grpc::AddInsecureChannelFromFd(server_.get(), fd);
                                              }}));
    Log(LogLevel::kInfo, "serving gRPC", {{"socket", options_.socket}});
    return absl::OkStatus();
  }

  int port() const override { return port_; }

  bool AwaitDrained(absl::Time deadline) override {
    while (working_.load() != 0) {
      if (absl::Now() >= deadline) return false;
      absl::SleepFor(absl::Milliseconds(1));
    }
    return true;
  }

 private:
  absl::Status AddTcp(grpc::ServerBuilder& builder) {
    if (options_.listen.empty()) return absl::OkStatus();
    QUARRY_ASSIGN_OR_RETURN(const IpAddress address, ParseIpAddress(options_.listen));
    // The configuration has been validated; this is the door itself.
    if (!address.loopback && !options_.tls()) {
      return absl::InvalidArgumentError(absl::StrCat("grpc.listen = \"", options_.listen,
                                                     "\": not loopback, and without mutual TLS"));
    }
    if (!address.loopback) {
      builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kRemotePingMs);
      builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kRemotePingMs);
    }
    QUARRY_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                            CredentialsFor(options_));
    builder.AddListeningPort(options_.listen, credentials, &port_);
    return absl::OkStatus();
  }

  const GrpcOptions options_;
  const PeerTenants& tenants_;
  GrpcPeers peers_;
  BulkPool pool_;
  TenantLimit calls_, sessions_;
  std::atomic<uint32_t> working_{0};
  const GrpcShared shared_;
  std::unique_ptr<grpc::Service> kv_store_, retrieval_, admin_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<GrpcAccept> accept_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcListener>> GrpcListener::Start(const GrpcOptions& options,
                                                                  const ServiceParts& parts,
                                                                  const PeerTenants& tenants) {
  auto listener = std::make_unique<GrpcListenerImpl>(options, parts, tenants);
  QUARRY_RETURN_IF_ERROR(listener->Serve());
  return listener;
}

}  // namespace quarry
