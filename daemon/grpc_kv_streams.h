// The streamed methods of quarry.v1.KvStore. Included by daemon/grpc_*.cc only.
#pragma once

#include "daemon/grpc_calls.h"

namespace quarry {

// Each message is one append; the stream stops at the first that fails.
grpc::ServerReadReactor<v1::AppendRequest>* NewAppendStream(const GrpcShared& shared,
                                                            grpc::CallbackServerContext* context,
                                                            v1::AppendReply* reply);
// Collects the data of one block, at most max_put_bytes, then puts it.
grpc::ServerReadReactor<v1::PutRequest>* NewPutStream(const GrpcShared& shared,
                                                      grpc::CallbackServerContext* context,
                                                      v1::PutReply* reply);
// One block in pieces.
grpc::ServerWriteReactor<v1::GetReply>* NewGetStream(const GrpcShared& shared,
                                                     grpc::CallbackServerContext* context,
                                                     const v1::GetRequest* request);

}  // namespace quarry
