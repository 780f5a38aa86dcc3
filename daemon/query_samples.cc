#include "daemon/query_samples.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "daemon/spread_bits.h"
#include "proto/half.h"

namespace quarry {
namespace {

constexpr uint32_t kWorthALook = 32;  // positions, and each power of two above
constexpr size_t kLeastRoom = 8;      // positions

uint64_t NextRenewal() {
  static std::atomic<uint64_t> renewals{0};
  return renewals.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace

QuerySamples::QuerySamples(const KvShape& shape, uint32_t capacity,
                           std::shared_ptr<SampleMemory> memory)
    : shape_(shape),
      capacity_(capacity),
      memory_(std::move(memory)),
      heads_(size_t{shape.layers} * shape.kv_heads),
      drift_(heads_.size()) {}

QuerySamples::~QuerySamples() {
  absl::MutexLock lock(&mutex_);
  for (const Head& head : heads_) memory_->GiveBack(2 * head.q.capacity());
}

bool QuerySamples::Grow(Head* head) {
  const size_t room = head->q.capacity() / floats();
  if (Kept(*head) == room) {
    const size_t more = std::min<size_t>(std::max(kLeastRoom, 2 * room), capacity_);
    if (!memory_->Take(2 * (more - room) * floats())) return false;
    head->q.reserve(more * floats());
  }
  head->q.resize(head->q.size() + floats());
  return true;
}

bool QuerySamples::Add(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads, const float* q) {
  absl::MutexLock lock(&mutex_);
  return AddLocked(layer, first_kv_head, kv_heads, q);
}

bool QuerySamples::TryAdd(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads,
                          const float* q) {
  if (!mutex_.TryLock()) return false;
  const bool worth = AddLocked(layer, first_kv_head, kv_heads, q);
  mutex_.Unlock();
  return worth;
}

bool QuerySamples::AddLocked(uint32_t layer, uint32_t first_kv_head, uint32_t kv_heads,
                             const float* q) {
  bool worth = false;
  for (uint32_t h = 0; h < kv_heads; ++h, q += floats()) {
    Head& head = heads_[size_t{layer} * shape_.kv_heads + first_kv_head + h];
    // Reservoir sampling: each position has the same chance to be kept. The draw depends on nothing
    // but how many came before, so that equal calls keep equal samples.
    uint64_t place = head.seen < capacity_ ? head.seen : SpreadBits(head.seen) % (head.seen + 1);
    ++head.seen;
    most_seen_ = std::max(most_seen_, head.seen);
    // Those that lag are waited for no longer.
    worth |= h == 0 && head.seen == capacity_ + 1;
    if (place >= capacity_) continue;
    if (const uint32_t kept = Kept(head); place >= kept) {
      if (Grow(&head)) {
        place = kept;
      } else if (kept > 0) {
        place %= kept;
      } else {
        continue;
      }
    }
    std::transform(q, q + floats(), head.q.begin() + static_cast<ptrdiff_t>(place * floats()),
                   FloatToBf16);
    worth |= h == 0 && head.seen <= capacity_ && head.seen >= kWorthALook &&
             std::has_single_bit(head.seen);
  }
  if (!renewing_ || !IsRenewed()) return worth;
  renewing_ = false;
  renewal_.store(NextRenewal(), std::memory_order_release);
  return true;
}

bool QuerySamples::NoteFit(uint32_t layer, uint32_t kv_head, IndexFit fit) {
  absl::MutexLock lock(&mutex_);
  // Until they are learned again there is nothing new to find.
  if (renewing_ || !drift_.Note(size_t{layer} * shape_.kv_heads + kv_head, fit)) return false;
  renewing_ = true;
  for (Head& head : heads_) head.seen = 0;
  most_seen_ = 0;
  return true;
}

bool QuerySamples::IsRenewed() const {
  for (const Head& head : heads_) {
    if (head.seen < Renewed() && !Lags(head)) return false;
  }
  return true;
}

uint32_t QuerySamples::LeastKept(uint32_t layer) const {
  absl::MutexLock lock(&mutex_);
  uint32_t least = capacity_, of_all = capacity_;
  bool all_lag = true;
  for (uint32_t h = 0; h < shape_.kv_heads; ++h) {
    const Head& head = heads_[size_t{layer} * shape_.kv_heads + h];
    of_all = std::min(of_all, Kept(head));
    if (Lags(head)) continue;
    all_lag = false;
    least = std::min(least, Kept(head));
  }
  return all_lag ? of_all : least;
}

std::vector<float> QuerySamples::Scaled(uint32_t layer, uint32_t kv_head) const {
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  absl::MutexLock lock(&mutex_);
  const Head& head = heads_[size_t{layer} * shape_.kv_heads + kv_head];
  std::vector<float> out(head.q.size());
  std::transform(head.q.begin(), head.q.end(), out.begin(),
                 [scale](uint16_t x) { return Bf16ToFloat(x) * scale; });
  return out;
}

}  // namespace quarry
