// An engine pairs with a daemon over gRPC. The part between the marks stands in README.md.
#include <cstdio>
#include <string>

// [README
#include <grpcpp/grpcpp.h>

#include "quarry/v1/kv_store.grpc.pb.h"

// What part of a prompt need not be computed again? `target`: unix:PATH, or host:port.
grpc::Status LongestPrefix(const std::string& target, const quarry::v1::OpenRequest& prompt,
                           uint32_t* tokens) {
  auto stub = quarry::v1::KvStore::NewStub(
      grpc::CreateChannel(target, grpc::InsecureChannelCredentials()));
  // The session lives as long as this stream; contexts and leases end with it.
  grpc::ClientContext session_context, context;
  quarry::v1::SessionRequest hello;
  hello.set_client_name("my-engine");
  auto session = stub->Session(&session_context, hello);
  quarry::v1::SessionReply id;
  if (!session->Read(&id)) return session->Finish();

  context.AddMetadata("quarry-session", std::to_string(id.session()));
  quarry::v1::LongestPrefixRequest request;
  *request.mutable_open() = prompt;
  quarry::v1::LongestPrefixReply reply;
  grpc::Status status = stub->LongestPrefix(&context, request, &reply);
  *tokens = reply.tokens();
  session_context.TryCancel();
  session->Finish();
  return status;
}
// README]

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  quarry::v1::OpenRequest prompt;
  quarry::v1::ModelSpec& model = *prompt.mutable_model();
  model.set_name("example");
  model.mutable_shape()->set_layers(1);
  model.mutable_shape()->set_heads(4);
  model.mutable_shape()->set_kv_heads(2);
  model.mutable_shape()->set_head_dim(64);
  model.mutable_shape()->set_dtype(quarry::v1::DTYPE_FP32);
  model.set_weights_digest(std::string(32, '\1'));
  model.set_tokenizer_digest(std::string(32, '\0'));
  model.mutable_rope()->set_rotary_dim(64);
  model.mutable_rope()->set_attention_scale(1);
  model.mutable_rope()->set_dtype(quarry::v1::DTYPE_FP32);
  for (int i = 0; i < 32; ++i) model.mutable_rope()->add_inv_freq(0.5f);
  for (int i = 0; i < 300; ++i) prompt.add_tokens(7);
  prompt.set_max_tokens(4096);
  uint32_t tokens = 0;
  grpc::Status status = LongestPrefix(std::string("unix:") + argv[1], prompt, &tokens);
  std::printf("%u tokens are cached %s\n", tokens, status.error_message().c_str());
  // cpp_engine left one block of this prompt behind.
  return status.ok() && tokens == 256 ? 0 : 1;
}
