// Attends that the card rings itself: what arrives in the slot, what becomes of the answers, that a
// wait which is given up ends, and what a round trip takes. A thread of the host is the daemon.
#include <sys/mman.h>

#include <functional>
#include <new>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/gpu/cuda/device_fixture.h"

namespace quarry {
namespace {

constexpr uint32_t kSlots = 4;

struct Shape {
  uint32_t rows, heads, kv_heads, head_dim;
};

// One slot and a ring, laid out as a client lays messages out.
class Channel {
 public:
  explicit Channel(const Shape& shape) {
    const auto align = [](uint64_t x) { return (x + 63) / 64 * 64; };
    layout_.rows = shape.rows;
    layout_.heads = shape.heads;
    layout_.head_dim = shape.head_dim;
    layout_.kv_bytes = uint64_t{shape.kv_heads} * shape.head_dim * 2;
    layout_.head_bytes = sizeof(shm::AttendHeader) + shape.rows * sizeof(shm::AttendRowPod);
    const uint64_t q_bytes = uint64_t{shape.heads} * shape.head_dim * 4;
    layout_.q = align(shm::kSlotPayload + layout_.head_bytes);
    layout_.k = layout_.q + align(q_bytes);
    layout_.v = layout_.k + align(layout_.kv_bytes);
    layout_.o = layout_.v + align(layout_.kv_bytes);
    layout_.lse = layout_.o + align(q_bytes);
    layout_.row_stride = layout_.lse + align(shape.heads * 4) - layout_.q;
    bytes_ = (kRingBytes + layout_.q + shape.rows * layout_.row_stride + 4095) / 4096 * 4096;
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    new (slot()) shm::SlotHeader();
  }
  ~Channel() { munmap(memory_, bytes_); }

  std::span<std::byte> memory() const { return {memory_, bytes_}; }
  const RungLayout& layout() const { return layout_; }
  std::byte* slot() const { return memory_ + kRingBytes; }
  shm::SlotHeader* header() const { return reinterpret_cast<shm::SlotHeader*>(slot()); }
  RungMessage Message(uint32_t i) const {
    RungMessage m;
    m.slot = slot();
    m.entry = reinterpret_cast<shm::SubmitEntry*>(memory_) + i % kSlots;
    m.sequence = i + 1;
    m.request_bytes = 12345 + i;
    m.slot_index = 3;
    m.answered_bit = 1 + i % 2;
    m.generation = (77 + i / 4) << 2 | m.answered_bit;
    return m;
  }

 private:
  static constexpr uint64_t kRingBytes = 4096;
  RungLayout layout_;
  uint64_t bytes_ = 0;
  std::byte* memory_ = nullptr;
};

class CudaRingCheck : public CudaDeviceCheck {
 protected:
  void Prepare(const Shape& shape, uint32_t messages) {
    mapping_ = HostMapping();
    shape_ = shape;
    messages_ = messages;
    channel_ = std::make_unique<Channel>(shape);
    auto mapping = device_->MapHost(channel_->memory());
    ASSERT_TRUE(mapping.ok()) << mapping.status();
    mapping_ = *std::move(mapping);
    const size_t q = size_t{shape.rows} * shape.heads * shape.head_dim;
    const size_t kv = size_t{shape.rows} * shape.kv_heads * shape.head_dim;
    q_ = Random(q);
    k_ = Stored(Random(kv), DType::kBf16);
    v_ = Stored(Random(kv), DType::kBf16);
    heads_.resize(messages * channel_->layout().head_bytes);
    for (std::byte& b : heads_) b = static_cast<std::byte>(random_());
    q_device_ = Put(q_);
    k_device_ = Put(k_);
    v_device_ = Put(v_);
    heads_device_ = Put(heads_);
    far_lse_device_ = Allocate(size_t{shape.rows} * shape.heads * sizeof(float));
    outcomes_ = Put(std::vector<std::byte>(messages * RungOutcomeBytes(shape.rows), kPoison));
    told_ = Allocate(messages * sizeof(RungMessage));
  }
  void TearDown() override {
    if (channel_ != nullptr) channel_->header()->done.store(~0u);  // whatever still waits
    mapping_ = HostMapping();
    CudaDeviceCheck::TearDown();
  }

  DeviceRing Ring(uint32_t i, float* o, float* lse) const {
    DeviceRing ring;
    ring.layout = channel_->layout();
    ring.message = channel_->Message(i);
    ring.head = heads_device_.raw() + i * ring.layout.head_bytes;
    ring.q = q_device_.floats();
    ring.k = k_device_.raw();
    ring.v = v_device_.raw();
    ring.o = o;
    ring.lse = lse;
    ring.far_lse = far_lse_device_.floats();
    ring.outcome = outcomes_.raw() + i * RungOutcomeBytes(shape_.rows);
    if (i > 0) {
      ring.before = outcomes_.raw() + (i - 1) * RungOutcomeBytes(shape_.rows);
      ring.before_generation = channel_->Message(i - 1).generation;
    }
    return ring;
  }
  // All messages, each into an o and lse of its own, to be replayed for those that Tell tells.
  std::unique_ptr<DeviceRecording> Record(std::span<const DeviceBuffer> o,
                                          std::span<const DeviceBuffer> lse) {
    auto recording = device_->Record([&] {
      for (uint32_t i = 0; i < messages_; ++i) {
        DeviceRing ring = Ring(i, o[i % o.size()].floats(), lse[i % lse.size()].floats());
        ring.at = reinterpret_cast<const RungMessage*>(told_.raw()) + i;
        device_->Ring(ring);
        device_->TakeAnswer(ring);
      }
    });
    EXPECT_TRUE(recording.ok()) << recording.status();
    return recording.ok() ? *std::move(recording) : nullptr;
  }
  // The messages of the token whose first one is `first`, a multiple of their number.
  void Tell(uint32_t first) {
    std::vector<RungMessage> messages;
    for (uint32_t i = 0; i < messages_; ++i) messages.push_back(channel_->Message(first + i));
    ASSERT_TRUE(device_->Upload(told_.raw(), std::as_bytes(std::span(messages))).ok());
    channel_->header()->done.store(0);
  }
  // As a daemon's poller: whether message i came before `deadline`.
  bool Await(uint32_t i, absl::Duration deadline = absl::Seconds(20)) const {
    const RungMessage message = channel_->Message(i);
    const absl::Time end = absl::Now() + deadline;
    while (message.entry->sequence.load(std::memory_order_acquire) != message.sequence) {
      if (absl::Now() > end) return false;
    }
    return true;
  }
  // Whether the slot and the ring hold what message i is.
  void ExpectSent(uint32_t i) const {
    const RungMessage message = channel_->Message(i);
    const RungLayout& layout = channel_->layout();
    EXPECT_EQ(message.entry->slot, message.slot_index);
    EXPECT_EQ(message.entry->opcode, static_cast<uint16_t>(shm::Opcode::kAttend));
    EXPECT_EQ(message.entry->flags, 0);
    EXPECT_EQ(message.entry->request_bytes, message.request_bytes);
    EXPECT_EQ(message.entry->generation, message.generation);
    EXPECT_EQ(message.entry->reserved, 0u);
    EXPECT_EQ(std::memcmp(channel_->slot() + shm::kSlotPayload,
                          heads_.data() + i % messages_ * layout.head_bytes, layout.head_bytes),
              0);
    const size_t q_bytes = size_t{layout.heads} * layout.head_dim * 4;
    for (uint32_t r = 0; r < layout.rows; ++r) {
      const std::byte* const row = channel_->slot() + r * layout.row_stride;
      EXPECT_EQ(std::memcmp(row + layout.q,
                            reinterpret_cast<const std::byte*>(q_.data()) + r * q_bytes, q_bytes),
                0);
      EXPECT_EQ(std::memcmp(row + layout.k, k_.data() + r * layout.kv_bytes, layout.kv_bytes), 0);
      EXPECT_EQ(std::memcmp(row + layout.v, v_.data() + r * layout.kv_bytes, layout.kv_bytes), 0);
    }
  }
  // Answers message i with these; `change` alters the pods and the message's status.
  void Answer(uint32_t i, std::span<const float> o, std::span<const float> lse,
              const std::function<void(std::vector<shm::AttendAnswerPod>*, uint32_t* status)>&
                  change) const {
    const RungLayout& layout = channel_->layout();
    std::vector<shm::AttendAnswerPod> pods(layout.rows);
    const size_t width = size_t{layout.heads} * layout.head_dim;
    for (uint32_t r = 0; r < layout.rows; ++r) {
      std::byte* const row = channel_->slot() + r * layout.row_stride;
      std::memcpy(row + layout.o, o.data() + r * width, width * 4);
      std::memcpy(row + layout.lse, lse.data() + size_t{r} * layout.heads, layout.heads * 4);
      pods[r].generation = channel_->Message(i).generation;
      pods[r].tokens_attended = 1000 * i + r;
    }
    uint32_t status = 0;
    if (change) change(&pods, &status);
    std::memcpy(channel_->slot() + shm::kSlotPayload, pods.data(),
                pods.size() * sizeof(shm::AttendAnswerPod));
    channel_->header()->status = status;
    channel_->header()->done.store(channel_->Message(i).generation, std::memory_order_release);
  }

  Shape shape_;
  uint32_t messages_ = 0;
  std::unique_ptr<Channel> channel_;
  HostMapping mapping_;
  std::vector<float> q_;
  std::vector<std::byte> k_, v_, heads_;
  DeviceBuffer q_device_, k_device_, v_device_, heads_device_, outcomes_, far_lse_device_, told_;
};

TEST_F(CudaRingCheck, AnswersAreMergedWhereTheyCount) {
  for (const Shape& shape : {Shape{1, 32, 8, 128}, Shape{5, 6, 3, 96}, Shape{64, 8, 8, 64},
                             Shape{2, 5, 1, 10}, Shape{3, 4, 4, 256}}) {
    SCOPED_TRACE(absl::StrCat(shape.rows, " rows, ", shape.heads, " heads of ", shape.head_dim));
    ASSERT_NO_FATAL_FAILURE(Prepare(shape, 4));
    const size_t vectors = size_t{shape.rows} * shape.heads, n = vectors * shape.head_dim;
    std::vector<float> o = Random(n), lse = Random(vectors, 4);
    lse[0] = -INFINITY;  // a window that is empty
    std::vector<std::vector<float>> far_o, far_lse;
    std::vector<DeviceBuffer> o_device, lse_device;
    for (uint32_t i = 0; i < messages_; ++i) {
      far_o.push_back(Random(n));
      far_lse.push_back(Random(vectors, 4));
      far_lse[i][vectors - 1] = -INFINITY;
      o_device.push_back(Put(o));
      lse_device.push_back(Put(lse));
    }
    for (uint32_t i = 0; i < messages_; ++i) {  // uploads would wait for answers
      device_->Ring(Ring(i, o_device[i].floats(), lse_device[i].floats()));
      device_->TakeAnswer(Ring(i, o_device[i].floats(), lse_device[i].floats()));
    }
    // Message 1: its last row is refused. 2: another generation in the first. 3: refused.
    for (uint32_t i = 0; i < messages_; ++i) {
      ASSERT_TRUE(Await(i));
      ExpectSent(i);
      Answer(i, far_o[i], far_lse[i],
             [&](std::vector<shm::AttendAnswerPod>* pods, uint32_t* status) {
               if (i == 1) pods->back().status = 3;
               if (i == 2) pods->front().generation ^= 4;
               if (i == 3) *status = 9;
             });
    }
    std::vector<std::byte> seen(messages_ * RungOutcomeBytes(shape.rows));
    ASSERT_TRUE(device_->Download(seen, outcomes_.raw()).ok());
    for (uint32_t i = 0; i < messages_; ++i) {
      const std::byte* const outcome = seen.data() + i * RungOutcomeBytes(shape.rows);
      RungOutcome head;
      std::memcpy(&head, outcome, sizeof(head));
      EXPECT_EQ(head.done, channel_->Message(i).generation);
      EXPECT_EQ(head.status, i == 3 ? 9u : 0u);
      std::vector<float> got(n), got_lse(vectors);
      ASSERT_TRUE(
          device_->Download(std::as_writable_bytes(std::span(got)), o_device[i].raw()).ok());
      ASSERT_TRUE(
          device_->Download(std::as_writable_bytes(std::span(got_lse)), lse_device[i].raw()).ok());
      double worst = 0;
      for (size_t v = 0; v < vectors; ++v) {
        const auto row = static_cast<uint32_t>(v / shape.heads);
        shm::AttendAnswerPod pod;
        std::memcpy(&pod, outcome + sizeof(head) + row * sizeof(pod), sizeof(pod));
        EXPECT_EQ(pod.tokens_attended, 1000 * i + row);
        const bool counts = i != 3 && !(i == 1 && row + 1 == shape.rows) && !(i == 2 && row == 0);
        const double near = lse[v], far = counts ? double{far_lse[i][v]} : -INFINITY;
        const double largest = std::max(near, far);
        const double a = std::exp(near - largest), b = std::exp(far - largest);
        if (std::isinf(largest)) {
          EXPECT_EQ(got_lse[v], -INFINITY);
          EXPECT_EQ(std::memcmp(&got[v * shape.head_dim], &o[v * shape.head_dim],
                                shape.head_dim * sizeof(float)),
                    0);
          continue;
        }
        EXPECT_NEAR(got_lse[v], largest + std::log(a + b), 1e-4);
        for (uint32_t d = 0; d < shape.head_dim; ++d) {
          const size_t at = v * shape.head_dim + d;
          const double want = (a * o[at] + b * far_o[i][at]) / (a + b);
          worst = std::max(worst, std::abs(got[at] - want));
        }
      }
      EXPECT_LT(worst, 1e-5) << "message " << i;
    }
  }
}

TEST_F(CudaRingCheck, AWaitThatIsGivenUpEnds) {
  const Shape shape{1, 32, 8, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape, 3));
  const size_t n = size_t{shape.heads} * shape.head_dim;
  const std::vector<float> o = Random(n), lse = Random(shape.heads);
  const DeviceBuffer o_device = Put(o), lse_device = Put(lse);
  for (uint32_t i = 0; i < 3; ++i) {
    device_->Ring(Ring(i, o_device.floats(), lse_device.floats()));
    device_->TakeAnswer(Ring(i, o_device.floats(), lse_device.floats()));
  }
  ASSERT_TRUE(Await(0));
  EXPECT_FALSE(Await(1, absl::Milliseconds(50)));  // it waits
  channel_->header()->done.store(~0u);
  std::vector<std::byte> seen(3 * RungOutcomeBytes(1));
  ASSERT_TRUE(device_->Download(seen, outcomes_.raw()).ok());  // and ends, with those behind it
  for (uint32_t i = 0; i < 3; ++i) {
    RungOutcome head;
    std::memcpy(&head, seen.data() + i * RungOutcomeBytes(1), sizeof(head));
    EXPECT_EQ(head.done, ~0u);
  }
  EXPECT_FALSE(Await(1, absl::ZeroDuration())) << "submitted behind what was given up";
  std::vector<float> got(n);
  ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(got)), o_device.raw()).ok());
  EXPECT_EQ(got, o);
}

TEST_F(CudaRingCheck, ReplaysSendTheNextTokensMessagesUntilOneIsGivenUp) {
  for (const Shape& shape : {Shape{1, 32, 8, 128}, Shape{5, 6, 3, 96}}) {
    constexpr uint32_t kMessages = 4;
    ASSERT_NO_FATAL_FAILURE(Prepare(shape, kMessages));
    const size_t vectors = size_t{shape.rows} * shape.heads, n = vectors * shape.head_dim;
    const std::vector<float> same(vectors, 0.5f), window = Random(n);
    std::vector<DeviceBuffer> o, lse;
    for (uint32_t i = 0; i < kMessages; ++i) {
      o.push_back(Put(window));
      lse.push_back(Put(same));
    }
    const std::unique_ptr<DeviceRecording> recording = Record(o, lse);
    ASSERT_NE(recording, nullptr);
    EXPECT_FALSE(Await(0, absl::Milliseconds(20))) << "rung while it was recorded";
    const auto expect = [&](uint32_t i, const std::vector<float>& want) {
      std::vector<float> got(n);
      ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(got)), o[i].raw()).ok());
      EXPECT_LT(Error<float>(got, want), 1e-6);
    };
    for (uint32_t token = 0; token < 4; ++token) {
      const bool answers = token < 3;
      for (uint32_t i = 0; i < kMessages; ++i) {
        ASSERT_TRUE(device_->Upload(o[i].raw(), std::as_bytes(std::span(window))).ok());
        ASSERT_TRUE(device_->Upload(lse[i].raw(), std::as_bytes(std::span(same))).ok());
      }
      ASSERT_NO_FATAL_FAILURE(Tell(token * kMessages));
      device_->Replay(*recording);
      const std::vector<float> far = Random(n);
      for (uint32_t i = 0; i < (answers ? kMessages : 1); ++i) {
        ASSERT_TRUE(Await(token * kMessages + i));
        ExpectSent(token * kMessages + i);
        if (answers) Answer(token * kMessages + i, far, same, nullptr);
      }
      if (!answers) {
        EXPECT_FALSE(Await(token * kMessages + 1, absl::Milliseconds(50))) << "it waits";
        channel_->header()->done.store(~0u);
      }
      std::vector<std::byte> seen(kMessages * RungOutcomeBytes(shape.rows));
      ASSERT_TRUE(device_->Download(seen, outcomes_.raw()).ok());
      std::vector<float> merged(n);
      for (size_t i = 0; i < n; ++i) merged[i] = (window[i] + far[i]) / 2;
      for (uint32_t i = 0; i < kMessages; ++i) {
        RungOutcome head;
        std::memcpy(&head, seen.data() + i * RungOutcomeBytes(shape.rows), sizeof(head));
        const uint32_t generation = channel_->Message(token * kMessages + i).generation;
        EXPECT_EQ(head.done, answers ? generation : ~0u);
        expect(i, answers ? merged : window);
      }
      EXPECT_FALSE(Await(token * kMessages + kMessages, absl::ZeroDuration()));
    }
    EXPECT_FALSE(Await(3 * kMessages + 1, absl::ZeroDuration())) << "behind what was given up";
  }
}

// What a layer's round trip takes beside the daemon's work, which is nothing here: the card's
// message, the wait, the answer, the merge; called one by one, and replayed. In turns with as many
// empty merges.
TEST_F(CudaRingCheck, DISABLED_RoundTripTiming) {
  for (const Shape& shape : {Shape{1, 32, 8, 128}, Shape{1, 32, 32, 96}, Shape{8, 32, 8, 128}}) {
    constexpr uint32_t kMessages = 64;
    ASSERT_NO_FATAL_FAILURE(Prepare(shape, kMessages));
    const size_t vectors = size_t{shape.rows} * shape.heads, n = vectors * shape.head_dim;
    const std::vector<float> far_o = Random(n), far_lse = Random(vectors);
    const DeviceBuffer o = Put(Random(n)), lse = Put(Random(vectors));
    const DeviceBuffer other_o = Put(far_o), other_lse = Put(far_lse);
    const std::unique_ptr<DeviceRecording> recording = Record(std::span(&o, 1), std::span(&lse, 1));
    ASSERT_NE(recording, nullptr);
    // Microseconds of each of kMessages, until the last one has been done.
    const auto time = [&](const auto& call) {
      const absl::Time begun = absl::Now();
      call();
      float back;
      EXPECT_TRUE(device_->Download(std::as_writable_bytes(std::span(&back, 1)), lse.raw()).ok());
      return absl::ToDoubleMicroseconds(absl::Now() - begun) / kMessages;
    };
    const auto time_rings = [&](const auto& call) {
      Tell(0);
      std::thread daemon([&] {
        for (uint32_t i = 0; i < kMessages; ++i) {
          if (!Await(i)) return;
          Answer(i, far_o, far_lse, nullptr);
        }
      });
      const double us = time(call);
      daemon.join();
      // The next round's entries begin as these did.
      std::memset(channel_->memory().data(), 0, kSlots * sizeof(shm::SubmitEntry));
      return us;
    };
    std::vector<double> called, replayed, merges;
    for (int round = 0; round < 20; ++round) {
      called.push_back(time_rings([&] {
        for (uint32_t i = 0; i < kMessages; ++i) {
          device_->Ring(Ring(i, o.floats(), lse.floats()));
          device_->TakeAnswer(Ring(i, o.floats(), lse.floats()));
        }
      }));
      replayed.push_back(time_rings([&] { device_->Replay(*recording); }));
      merges.push_back(time([&] {
        for (uint32_t i = 0; i < kMessages; ++i) {
          device_->Merge(o.floats(), lse.floats(), other_o.floats(), other_lse.floats(), vectors,
                         shape.head_dim);
        }
      }));
    }
    for (std::vector<double>* us : {&called, &replayed, &merges}) std::ranges::sort(*us);
    std::printf(
        "%u rows of %u heads of %u: a round trip %.1f us (least %.1f, most %.1f), replayed %.1f us "
        "(least %.1f, most %.1f), a merge alone %.1f\n",
        shape.rows, shape.heads, shape.head_dim, called[10], called.front(), called.back(),
        replayed[10], replayed.front(), replayed.back(), merges[10]);
  }
}

}  // namespace
}  // namespace quarry
