// The functions of libquarry_sentencepiece.so: SentencePiece behind plain C, so that it can be
// loaded apart from everything else. Debian's library carries a Protobuf of its own under
// Protobuf's own names; in one process with gRPC's the two would take each other's functions.
#pragma once

#include <cstddef>

namespace quarry {

// Error texts and results are the module's memory, valid until the model's next call.
struct SentencePieceModule {
  // Null with *error set on failure. One thread at a time per model.
  void* (*load)(const char* path, const char** error);
  void (*destroy)(void* model);
  // Null on success.
  const char* (*encode)(void* model, const char* text, size_t bytes, const int** ids,
                        size_t* count);
  const char* (*decode)(void* model, const int* ids, size_t count, const char** text,
                        size_t* bytes);
  int (*bos_id)(const void* model);  // negative: none
};

// The module's one symbol: a SentencePieceModule.
inline constexpr char kSentencePieceSymbol[] = "quarry_sentencepiece";
inline constexpr char kSentencePieceFile[] = "libquarry_sentencepiece.so";

}  // namespace quarry
