// Layers of a sequence as traces, to measure retrieval on.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "gpu/query_recorder.h"
#include "gpu/sequence.h"

namespace quarry {

// Writes each layer of the recorder, which the sequence ran with, to DIRECTORY/layer-<two
// digits>.safetensors: K and V of all the sequence's tokens in the context's dtype, the prompt's
// sampled queries and all decoded ones. Takes one layer's memory twice. Unavailable names a file
// that cannot be written.
absl::Status DumpTraces(Sequence& sequence, const QueryRecorder& recorder, const std::string& model,
                        const std::string& directory);

}  // namespace quarry
