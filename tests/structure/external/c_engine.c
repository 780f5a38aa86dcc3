/* An engine pairs with a daemon in C. The part between the marks stands in README.md. */
// [README
#include <stdio.h>

#include "client/quarry.h"

/* Keeps an engine's own block under the engine's own key, and reads it back without a copy. */
static quarry_code keep_block(const char* socket, const void* data, size_t bytes) {
  quarry_client* client;
  quarry_code code = quarry_connect(socket, "my-engine", 0, 0, &client);
  if (code != 0) {
    fprintf(stderr, "%s\n", quarry_last_error());
    return code;
  }
  code = quarry_put(client, "my-engine/llama-8b/fp16", "block-7", 7, data, bytes);
  quarry_block* block;
  if (code == 0) code = quarry_lease(client, "my-engine/llama-8b/fp16", "block-7", 7, &block);
  if (code == 0) {
    size_t leased;
    const void* mapped = quarry_block_data(block, &leased); /* stays until the release */
    printf("%zu bytes at %p\n", leased, mapped);
    quarry_block_release(block);
  }
  if (code != 0) fprintf(stderr, "%s\n", quarry_last_error()); /* 5, not found, is a miss */
  quarry_disconnect(client);
  return code;
}
// README]

int main(int argc, char** argv) {
  static const char data[65536] = "K and V";
  if (argc != 2) return 2;
  return keep_block(argv[1], data, sizeof(data));
}
