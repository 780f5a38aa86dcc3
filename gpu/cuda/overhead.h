// What CUDA itself takes of a card's memory. The driver only says what is taken of the whole card,
// so everything is told from differences; what other processes take or give back meanwhile is
// mistaken for ours.
#pragma once

#include <cstdint>

#include "gpu/cuda/arena.h"
#include "gpu/cuda/driver.h"

namespace quarry::cuda {

// Bytes taken of the current device, by everybody. 0 if the driver does not answer.
uint64_t TakenBytes();

// What a context takes: a second one is made on the device, and ended, for the current one was
// there before anything could be asked. Where none can be made (a card may be set so), everything
// that is taken of the card.
uint64_t ContextBytes(const Driver& driver, int device);

// What is taken by now beyond `before` becomes overhead of the arena's budget; returns it. CUDA
// keeps most of what it takes.
uint64_t CountOverhead(uint64_t before, Arena* arena);
// What has been given back by now of `before`, no more than `counted`, is overhead no longer.
void ReturnOverhead(uint64_t before, uint64_t counted, Arena* arena);

}  // namespace quarry::cuda
