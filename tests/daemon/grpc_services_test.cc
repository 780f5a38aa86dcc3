// The gRPC services over a fake engine, through real connections.
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/grpcpp.h>
#include <sys/stat.h>

#include <fstream>
#include <thread>

#include "daemon/grpc_listener.h"
#include "gmock/gmock.h"
#include "proto/convert.h"
#include "quarry/v1/admin.grpc.pb.h"
#include "quarry/v1/kv_store.grpc.pb.h"
#include "quarry/v1/retrieval.grpc.pb.h"
#include "tests/daemon/other_user.h"
#include "tests/daemon/server_fixture.h"
#include "tests/daemon/test_certificates.h"

namespace quarry::testing {
namespace {

namespace v1 = ::quarry::v1;
using ::testing::HasSubstr;

constexpr uid_t kOtherUser = 12345;

// One connection, as a user, with its stubs and maybe a session.
class Peer {
 public:
  Peer(const std::string& path, uid_t user, size_t max_message = 256 << 20) {
    int fd = -1;
    if (user == geteuid()) {
      fd = ConnectUnix(path, SOCK_STREAM);
    } else {
      AsUser(user, [&] { fd = ConnectUnix(path, SOCK_STREAM); });
    }
    if (fd < 0) return;
    channel_ = grpc::CreateCustomInsecureChannelFromFd("quarryd", fd, Args(max_message));
    MakeStubs();
  }
  explicit Peer(std::shared_ptr<grpc::Channel> channel) : channel_(std::move(channel)) {
    MakeStubs();
  }
  ~Peer() {
    if (session_context_ != nullptr) session_context_->TryCancel();
    if (session_stream_ != nullptr) (void)session_stream_->Finish();
  }

  bool OpenSession() {
    session_context_ = std::make_unique<grpc::ClientContext>();
    v1::SessionRequest request;
    request.set_client_name("test");
    session_stream_ = kv->Session(session_context_.get(), request);
    v1::SessionReply reply;
    if (!session_stream_->Read(&reply)) {
      session_status = session_stream_->Finish();
      session_stream_.reset();
      return false;
    }
    session = reply.session();
    tenant = reply.tenant();
    return true;
  }
  std::unique_ptr<grpc::ClientContext> Context(uint64_t with_session = 0) const {
    auto context = std::make_unique<grpc::ClientContext>();
    const uint64_t id = with_session != 0 ? with_session : session;
    if (id != 0) context->AddMetadata("quarry-session", std::to_string(id));
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    return context;
  }
  grpc::Status ListContexts(uint64_t with_session = 0, int* count = nullptr) {
    v1::ListContextsReply reply;
    const grpc::Status status =
        kv->ListContexts(Context(with_session).get(), v1::ListContextsRequest(), &reply);
    if (count != nullptr) *count = reply.contexts_size();
    return status;
  }
  uint64_t Open(uint32_t max_tokens = 100) {
    OpenRequest request;
    request.spec.shape = FakeShape();
    request.max_tokens = max_tokens;
    v1::OpenReply reply;
    const grpc::Status status = kv->Open(Context().get(), ToProto(request), &reply);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return reply.context();
  }

  std::unique_ptr<v1::KvStore::Stub> kv;
  std::unique_ptr<v1::Retrieval::Stub> retrieval;
  std::unique_ptr<v1::Admin::Stub> admin;
  uint64_t session = 0;
  std::string tenant;
  grpc::Status session_status;

 private:
  static grpc::ChannelArguments Args(size_t max_message) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(static_cast<int>(max_message));
    arguments.SetMaxSendMessageSize(static_cast<int>(max_message));
    return arguments;
  }
  void MakeStubs() {
    kv = v1::KvStore::NewStub(channel_);
    retrieval = v1::Retrieval::NewStub(channel_);
    admin = v1::Admin::NewStub(channel_);
  }
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<grpc::ClientContext> session_context_;
  std::unique_ptr<grpc::ClientReader<v1::SessionReply>> session_stream_;
};

class GrpcServicesTest : public ServerFixture {
 protected:
  void StartGrpc(GrpcOptions options = {}) {
    options.socket = grpc_path();
    options.socket_mode = 0666;
    ::chmod(directory_.path().c_str(), 0755);
    tenants_ = std::make_unique<PeerTenants>(PeerTenantOptions(), geteuid());
    auto listener = GrpcListener::Start(options, parts_, *tenants_);
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }
  void TearDown() override {
    engine_.HoldAttends(false);
    engine_.ReleaseAttends();
    engine_.HoldAppends(false);
    listener_.reset();
    ServerFixture::TearDown();
  }
  std::string grpc_path() const { return directory_.path() + "/grpc.sock"; }
  std::unique_ptr<Peer> NewPeer(uid_t user = geteuid()) {
    auto peer = std::make_unique<Peer>(grpc_path(), user);
    EXPECT_TRUE(peer->OpenSession()) << peer->session_status.error_message();
    return peer;
  }
  static v1::AttendRequest AttendOf(uint64_t context, int rows, uint32_t layer = 0) {
    v1::AttendRequest request;
    const KvShape shape = FakeShape();
    for (int r = 0; r < rows; ++r) {
      v1::AttendRow& row = *request.add_rows();
      row.set_context(context);
      row.set_layer(layer);
      row.mutable_range()->set_hi(10);
      row.set_heads(shape.heads);
      row.set_q_dtype(v1::DTYPE_FP32);
      std::vector<float> q(shape.heads * shape.head_dim, static_cast<float>(r));
      row.set_q(q.data(), q.size() * 4);
    }
    return request;
  }
  static float FirstOf(const v1::AttendAnswer& answer) {
    float value = -1;
    if (answer.o().size() >= 4) std::memcpy(&value, answer.o().data(), 4);
    return value;
  }

  std::unique_ptr<GrpcListener> listener_;
};

TEST_F(GrpcServicesTest, ASessionBelongsToTheUserWhoConnects) {
  StartGrpc();
  auto peer = NewPeer();
  EXPECT_EQ(peer->tenant, tenant());
  if (!IsRoot()) GTEST_SKIP() << "needs root to connect as another user";
  EXPECT_EQ(NewPeer(kOtherUser)->tenant, "uid-12345");
}

TEST_F(GrpcServicesTest, CallsNeedASessionOfTheirOwnTenant) {
  StartGrpc();
  auto peer = NewPeer();
  EXPECT_TRUE(peer->ListContexts().ok());
  EXPECT_EQ(peer->ListContexts(peer->session + 1).error_code(), grpc::UNAUTHENTICATED);
  Peer bare(grpc_path(), geteuid());
  EXPECT_EQ(bare.ListContexts().error_code(), grpc::UNAUTHENTICATED);
  // Another connection of the same tenant may use the session.
  EXPECT_TRUE(bare.ListContexts(peer->session).ok());
  if (!IsRoot()) GTEST_SKIP() << "needs root to connect as another user";
  auto other = NewPeer(kOtherUser);
  EXPECT_EQ(other->ListContexts(peer->session).error_code(), grpc::UNAUTHENTICATED);
  EXPECT_EQ(peer->ListContexts(other->session).error_code(), grpc::UNAUTHENTICATED);
  peer->Open();
  int count = -1;
  EXPECT_TRUE(other->ListContexts(0, &count).ok());
  EXPECT_EQ(count, 0);
}

TEST_F(GrpcServicesTest, MetadataThatIsNoNumberIsRefused) {
  StartGrpc();
  auto peer = NewPeer();
  for (const char* bad : {"", "x", "-1", "99999999999999999999999"}) {
    grpc::ClientContext context;
    context.AddMetadata("quarry-session", bad);
    v1::ListContextsReply reply;
    EXPECT_EQ(peer->kv->ListContexts(&context, v1::ListContextsRequest(), &reply).error_code(),
              grpc::UNAUTHENTICATED)
        << bad;
  }
}

TEST_F(GrpcServicesTest, ASessionEndsWithItsStreamAndWithItsConnection) {
  StartGrpc();
  auto a = NewPeer();
  auto b = NewPeer();
  EXPECT_EQ(engine_.sessions().size(), 2u);
  a.reset();
  EXPECT_TRUE(Eventually([&] { return engine_.sessions().size() == 1; }, absl::Seconds(1)));
  b.reset();
  EXPECT_TRUE(Eventually([&] { return engine_.sessions().empty(); }, absl::Seconds(1)));
  EXPECT_TRUE(Eventually([&] { return counters().grpc_connections == 0; }));
}

TEST_F(GrpcServicesTest, SessionsAndCallsOfATenantAreLimited) {
  GrpcOptions options;
  options.max_sessions_per_tenant = 2;
  options.max_calls_per_tenant = 2;
  StartGrpc(options);
  auto a = NewPeer();
  auto b = NewPeer();
  Peer c(grpc_path(), geteuid());
  EXPECT_FALSE(c.OpenSession());
  EXPECT_EQ(c.session_status.error_code(), grpc::RESOURCE_EXHAUSTED);
  // Two idle streams take both places; they hold no thread. A stream that has answered is in its
  // place; one that came before an earlier call had left its own is refused, and asked for anew.
  const uint64_t opened = a->Open();
  struct IdleStream {
    std::unique_ptr<grpc::ClientContext> context;
    std::unique_ptr<grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendReply>> stream;
  };
  const auto take_place = [&](IdleStream& idle) {
    return Eventually([&] {
      v1::AttendReply reply;
      idle.context = a->Context();
      idle.stream = a->retrieval->AttendStream(idle.context.get());
      if (idle.stream->Write(AttendOf(opened, 1)) && idle.stream->Read(&reply)) return true;
      (void)idle.stream->Finish();
      return false;
    });
  };
  IdleStream first, second;
  ASSERT_TRUE(take_place(first));
  ASSERT_TRUE(take_place(second));
  EXPECT_EQ(a->ListContexts().error_code(), grpc::RESOURCE_EXHAUSTED);
  v1::StatusReply why;  // an operator's questions are answered even so
  EXPECT_TRUE(a->admin->Status(a->Context().get(), v1::StatusRequest(), &why).ok());
  if (IsRoot()) {
    EXPECT_TRUE(NewPeer(kOtherUser)->ListContexts().ok());
  }
  for (IdleStream* idle : {&first, &second}) {
    idle->context->TryCancel();
    (void)idle->stream->Finish();
  }
  EXPECT_TRUE(Eventually([&] { return b->ListContexts().ok(); }));
}

TEST_F(GrpcServicesTest, AttendAnswersRowsAndRefusesWrongOnes) {
  StartGrpc();
  auto peer = NewPeer();
  const uint64_t context = peer->Open();
  v1::AttendRequest request = AttendOf(context, 3, /*layer=*/1);
  request.mutable_rows(1)->set_q("too short");
  v1::AttendReply reply;
  grpc::Status status = peer->retrieval->Attend(peer->Context().get(), request, &reply);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(reply.answers_size(), 3);
  EXPECT_EQ(FirstOf(reply.answers(0)), 1.0f);
  EXPECT_EQ(reply.answers(1).status(), static_cast<uint32_t>(grpc::INVALID_ARGUMENT));
  EXPECT_FALSE(reply.answers(1).error().empty());
  EXPECT_EQ(FirstOf(reply.answers(2)), 3.0f);
  EXPECT_EQ(reply.answers(2).covered().hi(), 10u);
  status = peer->retrieval->Attend(peer->Context().get(), v1::AttendRequest(), &reply);
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT);
  status = peer->retrieval->Attend(peer->Context().get(), AttendOf(context, 1025), &reply);
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT);
}

TEST_F(GrpcServicesTest, AnAttendStreamAnswersInOrder) {
  StartGrpc();
  auto peer = NewPeer();
  const uint64_t context = peer->Open();
  auto client_context = peer->Context();
  auto stream = peer->retrieval->AttendStream(client_context.get());
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(stream->Write(AttendOf(context, 1 + i % 3, i % 2)));
  stream->WritesDone();
  v1::AttendReply reply;
  for (int i = 0; i < 50; ++i) {
    ASSERT_TRUE(stream->Read(&reply)) << i;
    ASSERT_EQ(reply.answers_size(), 1 + i % 3);
    EXPECT_EQ(FirstOf(reply.answers(0)), static_cast<float>(i % 2));
  }
  EXPECT_FALSE(stream->Read(&reply));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(GrpcServicesTest, AnAttendOfACancelledCallFinishesHarmlessly) {
  StartGrpc();
  auto peer = NewPeer();
  const uint64_t context = peer->Open();
  engine_.HoldAttends(true);
  auto unary = peer->Context(), streaming = peer->Context();
  std::thread call([&] {
    v1::AttendReply reply;
    EXPECT_EQ(peer->retrieval->Attend(unary.get(), AttendOf(context, 1), &reply).error_code(),
              grpc::CANCELLED);
  });
  auto stream = peer->retrieval->AttendStream(streaming.get());
  ASSERT_TRUE(stream->Write(AttendOf(context, 1)));
  ASSERT_TRUE(Eventually([&] { return engine_.held() == 2; }));
  unary->TryCancel();
  streaming->TryCancel();
  call.join();
  (void)stream->Finish();
  peer.reset();
  engine_.ReleaseAttends();
  EXPECT_TRUE(Eventually([&] { return listener_->AwaitDrained(absl::Now()); }));
}

TEST_F(GrpcServicesTest, PutAndGetStreamBlocksLargerThanAMessage) {
  GrpcOptions options;
  options.max_message_bytes = 1 << 20;
  options.max_put_bytes = 8 << 20;
  StartGrpc(options);
  auto peer = NewPeer();
  std::string block(5'000'000, '\0');
  for (size_t i = 0; i < block.size(); ++i) block[i] = static_cast<char>(i * 31 >> 3);
  const auto put = [&](uint64_t announced, size_t sent, const char* later_key = "") {
    auto context = peer->Context();
    v1::PutReply reply;
    auto writer = peer->kv->Put(context.get(), &reply);
    for (size_t at = 0; at < sent; at += 500'000) {
      v1::PutRequest piece;
      if (at == 0) {
        piece.set_engine_namespace("ns");
        piece.set_key("key");
        piece.set_total_bytes(announced);
      } else {
        piece.set_key(later_key);
      }
      piece.set_data(block.substr(at, 500'000));
      if (!writer->Write(piece)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  };
  EXPECT_EQ(put(block.size(), 1'000'000).error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_EQ(put(100, 1'000'000).error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_EQ(put(9 << 20, 500'000).error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_EQ(put(0, 0).error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_EQ(put(1'000'000, 1'000'000, "other").error_code(), grpc::INVALID_ARGUMENT);
  const grpc::Status status = put(block.size(), block.size(), "key");  // said again, the same
  ASSERT_TRUE(status.ok()) << status.error_message();

  auto context = peer->Context();
  v1::GetRequest get;
  get.set_engine_namespace("ns");
  get.set_key("key");
  auto reader = peer->kv->Get(context.get(), get);
  std::string read;
  v1::GetReply piece;
  while (reader->Read(&piece)) {
    if (read.empty()) {
      EXPECT_EQ(piece.total_bytes(), block.size());
    }
    read += piece.data();
  }
  const grpc::Status got = reader->Finish();
  EXPECT_TRUE(got.ok()) << got.error_message();
  EXPECT_TRUE(read == block) << read.size() << " bytes";
  get.set_key("other");
  context = peer->Context();
  reader = peer->kv->Get(context.get(), get);
  EXPECT_FALSE(reader->Read(&piece));
  EXPECT_EQ(reader->Finish().error_code(), grpc::NOT_FOUND);
}

TEST_F(GrpcServicesTest, AppendsStreamAndStopAtTheFirstError) {
  StartGrpc();
  auto peer = NewPeer();
  const uint64_t id = peer->Open();
  auto context = peer->Context();
  v1::AppendReply reply;
  auto writer = peer->kv->Append(context.get(), &reply);
  v1::AppendRequest append;
  append.set_context(id);
  append.set_kv_heads(2);
  append.mutable_range()->set_hi(3);
  append.set_k(std::string(3 * 2 * 64, 'k'));
  append.set_v(std::string(3 * 2 * 64, 'v'));
  EXPECT_TRUE(writer->Write(append));
  append.set_layer(1);
  EXPECT_TRUE(writer->Write(append));
  writer->WritesDone();
  ASSERT_TRUE(writer->Finish().ok());
  EXPECT_EQ(reply.tokens(), 6u);
  EXPECT_EQ(engine_.appended().size(), 2u);

  append.set_v(std::string(10, 'v'));
  context = peer->Context();
  writer = peer->kv->Append(context.get(), &reply);
  writer->Write(append);
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("384"));
}

TEST_F(GrpcServicesTest, AnOversizedMessageIsRefusedAndTheConnectionLives) {
  GrpcOptions options;
  options.max_message_bytes = 1 << 20;
  StartGrpc(options);
  auto peer = NewPeer();
  v1::ExistsRequest exists;
  exists.set_engine_namespace(std::string(2 << 20, 'x'));
  v1::ExistsReply reply;
  EXPECT_EQ(peer->kv->Exists(peer->Context().get(), exists, &reply).error_code(),
            grpc::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(peer->ListContexts().ok());
}

TEST_F(GrpcServicesTest, ClientsThatDoNotReadHoldUpNobody) {
  GrpcOptions options;
  options.threads = 2;
  options.max_calls_per_tenant = 32;
  StartGrpc(options);
  auto lazy = NewPeer();
  ASSERT_TRUE(engine_
                  .Put({lazy->session}, "ns", "big",
                       std::as_bytes(std::span<const char>(std::string(64 << 20, 'b'))),
                       std::nullopt)
                  .ok());
  // Far more unread streams than threads.
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::GetReply>>> readers;
  v1::GetRequest get;
  get.set_engine_namespace("ns");
  get.set_key("big");
  for (int i = 0; i < 8; ++i) {
    contexts.push_back(lazy->Context());
    readers.push_back(lazy->kv->Get(contexts.back().get(), get));
  }
  ASSERT_TRUE(Eventually([&] { return counters().grpc_calls >= 9; }));
  auto other = NewPeer();
  for (int i = 0; i < 200; ++i) {
    const grpc::Status status = other->ListContexts();
    ASSERT_TRUE(status.ok()) << i << ": " << status.error_message();
  }
  for (auto& context : contexts) context->TryCancel();
  for (auto& reader : readers) (void)reader->Finish();
}

TEST_F(GrpcServicesTest, AdminCallsNeedNoSessionAndDrainNeedsAnAdministrator) {
  StartGrpc();
  Peer peer(grpc_path(), geteuid());
  v1::StatusReply status;
  ASSERT_TRUE(peer.admin->Status(peer.Context().get(), v1::StatusRequest(), &status).ok());
  EXPECT_EQ(status.tenant(), tenant());
  v1::StatisticsReply statistics;
  ASSERT_TRUE(
      peer.admin->Statistics(peer.Context().get(), v1::StatisticsRequest(), &statistics).ok());
  EXPECT_GE(statistics.values().at("quarry_grpc_calls_total"), 1);
  v1::DrainReply drain;
  if (IsRoot()) {
    Peer stranger(grpc_path(), kOtherUser);
    EXPECT_EQ(
        stranger.admin->Drain(stranger.Context().get(), v1::DrainRequest(), &drain).error_code(),
        grpc::PERMISSION_DENIED);
    EXPECT_EQ(drain_requests_, 0);
  }
  EXPECT_TRUE(peer.admin->Drain(peer.Context().get(), v1::DrainRequest(), &drain).ok());
  EXPECT_EQ(drain_requests_, 1);
}

TEST_F(GrpcServicesTest, AuditsNeedASessionAndAreOfItsTenant) {
  StartGrpc();
  Peer peer(grpc_path(), geteuid());
  ASSERT_TRUE(peer.OpenSession());
  v1::AuditReply reply;
  ASSERT_TRUE(peer.admin->Audit(peer.Context().get(), v1::AuditRequest(), &reply).ok());
  ASSERT_EQ(reply.heads_size(), 1);
  EXPECT_EQ(reply.heads(0).model(), "model of " + tenant());
  grpc::ClientContext no_session;
  EXPECT_FALSE(peer.admin->Audit(&no_session, v1::AuditRequest(), &reply).ok());
}

TEST_F(GrpcServicesTest, WhileDrainingOnlyAdminCallsAreServed) {
  StartGrpc();
  auto peer = NewPeer();
  draining_ = true;
  EXPECT_EQ(peer->ListContexts().error_code(), grpc::UNAVAILABLE);
  Peer late(grpc_path(), geteuid());
  EXPECT_FALSE(late.OpenSession());
  EXPECT_EQ(late.session_status.error_code(), grpc::UNAVAILABLE);
  v1::StatusReply status;
  EXPECT_TRUE(late.admin->Status(late.Context().get(), v1::StatusRequest(), &status).ok());
  EXPECT_TRUE(status.draining());
}

TEST_F(GrpcServicesTest, LoopbackTcpBelongsToItsConfiguredTenantAndIsNoAdministrator) {
  GrpcOptions options;
  options.listen = "127.0.0.1:0";
  options.tcp_tenant = "local";
  StartGrpc(options);
  const std::string address = "127.0.0.1:" + std::to_string(listener_->port());
  Peer peer(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  ASSERT_TRUE(peer.OpenSession());
  EXPECT_EQ(peer.tenant, "local");
  v1::DrainReply drain;
  EXPECT_EQ(peer.admin->Drain(peer.Context().get(), v1::DrainRequest(), &drain).error_code(),
            grpc::PERMISSION_DENIED);
  auto unix_peer = NewPeer();
  EXPECT_EQ(peer.ListContexts(unix_peer->session).error_code(), grpc::UNAUTHENTICATED);

  // The port is taken: a second listener is refused.
  options.listen = address;
  options.socket.clear();
  const auto second = GrpcListener::Start(options, parts_, *tenants_);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(address));
}

TEST_F(GrpcServicesTest, ARemoteAddressWithoutTlsIsRefused) {
  GrpcOptions options;
  options.listen = "0.0.0.0:0";
  options.tcp_tenant = "local";
  tenants_ = std::make_unique<PeerTenants>(PeerTenantOptions(), geteuid());
  EXPECT_EQ(GrpcListener::Start(options, parts_, *tenants_).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(GrpcServicesTest, MutualTlsNamesTheTenantAndNothingElseGetsIn) {
  const TestAuthority authority("test authority"), stranger("somebody else's authority");
  const TestCertificate server = authority.Sign("localhost");
  const auto write = [&](const char* name, const std::string& text) {
    const std::string path = directory_.path() + "/" + name;
    std::ofstream(path) << text;
    return path;
  };
  GrpcOptions options;
  options.listen = "0.0.0.0:0";
  options.tls_certificate = write("server.pem", server.certificate);
  options.tls_key = write("server.key", server.key);
  options.tls_client_ca = write("ca.pem", authority.Pem());
  StartGrpc(options);
  const std::string address = "127.0.0.1:" + std::to_string(listener_->port());
  const auto connect = [&](const TestCertificate& client) {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = authority.Pem();
    ssl.pem_cert_chain = client.certificate;
    ssl.pem_private_key = client.key;
    return std::make_unique<Peer>(grpc::CreateChannel(address, grpc::SslCredentials(ssl)));
  };
  auto node = connect(authority.Sign("node-7"));
  ASSERT_TRUE(node->OpenSession()) << node->session_status.error_message();
  EXPECT_EQ(node->tenant, "node-7");
  EXPECT_TRUE(node->ListContexts().ok());
  // A session of another certificate's tenant is out of reach.
  auto other = connect(authority.Sign("node-8"));
  ASSERT_TRUE(other->OpenSession());
  EXPECT_EQ(other->ListContexts(node->session).error_code(), grpc::UNAUTHENTICATED);
  // A local user's tenant cannot be taken by certificate.
  auto user = connect(authority.Sign("uid-0"));
  EXPECT_FALSE(user->OpenSession());
  EXPECT_EQ(user->session_status.error_code(), grpc::UNAUTHENTICATED);
  // Another authority's certificate, none, and plain text do not connect.
  for (const TestCertificate& refused : {stranger.Sign("node-7"), TestCertificate{}}) {
    auto peer = connect(refused);
    EXPECT_FALSE(peer->OpenSession());
    EXPECT_EQ(peer->session_status.error_code(), grpc::UNAVAILABLE);
  }
  Peer plain(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  EXPECT_FALSE(plain.OpenSession());
  v1::DrainReply drain;
  EXPECT_EQ(node->admin->Drain(node->Context().get(), v1::DrainRequest(), &drain).error_code(),
            grpc::PERMISSION_DENIED);
}

TEST_F(GrpcServicesTest, MissingTlsFilesAreNamed) {
  GrpcOptions options;
  options.listen = "0.0.0.0:0";
  options.tls_certificate = options.tls_client_ca = "/dev/null";
  options.tls_key = "/nonexistent.key";
  tenants_ = std::make_unique<PeerTenants>(PeerTenantOptions(), geteuid());
  const auto listener = GrpcListener::Start(options, parts_, *tenants_);
  ASSERT_EQ(listener.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(listener.status().message()), HasSubstr("/nonexistent.key"));
}

TEST_F(GrpcServicesTest, ConnectionsAreLimited) {
  GrpcOptions options;
  options.max_connections = 2;
  StartGrpc(options);
  auto a = NewPeer();
  auto b = NewPeer();
  Peer c(grpc_path(), geteuid());
  EXPECT_FALSE(c.OpenSession());
  EXPECT_TRUE(Eventually([&] { return counters().grpc_connections_refused == 1; }));
  a.reset();
  EXPECT_TRUE(Eventually([&] { return Peer(grpc_path(), geteuid()).OpenSession(); }));
}

TEST_F(GrpcServicesTest, ManyConnectionsComeAndGoAndKeepTheirTenants) {
  if (!IsRoot()) GTEST_SKIP() << "needs root to connect as other users";
  StartGrpc();
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 60; ++i) {
        const uid_t user = 20000 + static_cast<uid_t>((t * 60 + i) % 7);
        Peer peer(grpc_path(), user);
        if (!peer.OpenSession() || peer.tenant != "uid-" + std::to_string(user)) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(Eventually([&] { return engine_.sessions().empty(); }));
}

}  // namespace
}  // namespace quarry::testing
