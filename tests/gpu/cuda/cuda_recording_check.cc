// Operations that the card keeps and replays: they do as when they are called, for tokens that it
// is told by its memory, and what they take while they run stays theirs.
#include "absl/strings/str_cat.h"
#include "tests/gpu/cuda/device_fixture.h"

namespace quarry {
namespace {

// What a layer of decode does between its products, and one of these.
struct Layer {
  uint32_t rows, heads, kv_heads, head_dim, first;  // tokens of the first part
  DType dtype;
};
constexpr uint32_t kRoom = 400;

class CudaRecordingCheck : public CudaDeviceCheck {
 protected:
  struct Memory {
    DeviceBuffer x, k, v, room_k, room_v, o, lse, y;
  };
  Memory Fill(const Layer& l) {
    const size_t q = size_t{l.rows} * l.heads * l.head_dim;
    const size_t kv = size_t{l.rows} * l.kv_heads * l.head_dim;
    const size_t room = size_t{l.kv_heads} * kRoom * l.head_dim;
    Memory m{Put(x_),
             Put(Stored(kv_, l.dtype)),
             Put(Stored(kv_, l.dtype)),
             Put(Stored(room_, l.dtype)),
             Put(Stored(room_, l.dtype)),
             Output(q),
             Output(size_t{l.rows} * l.heads),
             Put(std::vector<float>(size_t{l.rows} * kOut))};
    EXPECT_EQ(room_.size(), room);
    EXPECT_EQ(kv_.size(), kv);
    return m;
  }
  // Without `placed` the operations are told where things lie.
  void Call(const Layer& l, const Memory& m, const DeviceMatrix& w, const DevicePlace& at,
            const DevicePlace* placed) {
    const size_t vector = l.head_dim * DTypeBytes(l.dtype);
    const size_t skip = placed != nullptr ? 0 : at.kv_slot * vector;
    std::vector<DeviceKv> parts;
    if (l.first > 0) {
      parts.push_back({first_k_.raw(), first_v_.raw(), l.first * vector, {0, l.first}});
    }
    parts.push_back({m.room_k.raw() + skip,
                     m.room_v.raw() + skip,
                     kRoom * vector,
                     {at.kv_lo, at.first_token + l.rows}});
    device_->Rope(
        {m.x.floats(), at.first_token, l.rows, l.heads, l.head_dim, inv_freq_, 1.5f, placed});
    device_->StoreKv({m.k.raw(), m.v.raw(), m.room_k.raw(), m.room_v.raw(), kRoom * vector, vector,
                      l.rows, l.kv_heads, at.kv_slot + at.first_token - at.kv_lo, placed});
    DeviceAttention a;
    a.parts = parts;
    a.dtype = l.dtype;
    a.heads = l.heads;
    a.kv_heads = l.kv_heads;
    a.head_dim = l.head_dim;
    a.first_token = at.first_token;
    a.rows = l.rows;
    a.q = m.x.floats();
    a.o = m.o.floats();
    a.lse = m.lse.floats();
    a.place = placed;
    device_->Attend(a);
    device_->MatMul(m.o.floats(), w, m.y.floats(), l.rows, Device::Output::kAccumulate);
  }
  std::vector<float> Floats(const DeviceBuffer& from) {
    std::vector<float> out(from.bytes() / 4);
    EXPECT_TRUE(device_->Download(std::as_writable_bytes(std::span(out)), from.raw()).ok());
    return out;
  }

  static constexpr size_t kOut = 64;
  std::vector<float> x_, kv_, room_, inv_freq_;
  DeviceBuffer first_k_, first_v_;
};

TEST_F(CudaRecordingCheck, ReplaysAreTheOperationsForOtherTokens) {
  for (const Layer& l :
       {Layer{1, 32, 8, 128, 128, DType::kBf16}, Layer{4, 6, 2, 64, 0, DType::kFp16},
        Layer{1, 4, 4, 96, 5, DType::kBf16}, Layer{2, 6, 3, 10, 7, DType::kBf16},
        Layer{1, 80, 1, 64, 16, DType::kBf16}, Layer{3, 4, 2, 256, 9, DType::kFp32}}) {
    SCOPED_TRACE(absl::StrCat(l.rows, " rows, ", l.heads, " heads of ", l.head_dim));
    const size_t width = size_t{l.heads} * l.head_dim;
    x_ = Random(l.rows * width);
    kv_ = Random(size_t{l.rows} * l.kv_heads * l.head_dim);
    room_ = Random(size_t{l.kv_heads} * kRoom * l.head_dim);
    inv_freq_ = Random(l.head_dim / 2);
    first_k_ = Put(Stored(Random(size_t{l.kv_heads} * l.first * l.head_dim + 1), l.dtype));
    first_v_ = Put(Stored(Random(size_t{l.kv_heads} * l.first * l.head_dim + 1), l.dtype));
    const DeviceMatrix w = Load(Random(kOut * width), kOut, DType::kBf16);
    const Memory replayed = Fill(l), called = Fill(l);
    const DevicePlace first{320, 20, 3};
    // Also loads what is loaded late.
    Call(l, replayed, w, first, nullptr);
    Call(l, called, w, first, nullptr);
    const DeviceBuffer place = Allocate(sizeof(DevicePlace));
    const uint64_t used = device_->Stats().used_bytes;
    auto recording = device_->Record(
        [&] { Call(l, replayed, w, first, reinterpret_cast<const DevicePlace*>(place.raw())); });
    ASSERT_TRUE(recording.ok()) << recording.status();
    EXPECT_EQ(Floats(replayed.x), Floats(called.x)) << "run while it was recorded";
    // As long a window, so that the work is cut up in the same way.
    for (const uint32_t moved : {0u, 1u, 7u, 50u}) {
      const DevicePlace at{first.first_token + moved, first.kv_lo + moved, moved % 40};
      ASSERT_TRUE(device_->Upload(place.raw(), std::as_bytes(std::span(&at, 1))).ok());
      device_->Replay(**recording);
      // Whoever takes memory now must not get what the next replay writes to.
      const DeviceBuffer others = Put(std::vector<std::byte>(1 << 20, kPoison));
      device_->Replay(**recording);
      Call(l, called, w, at, nullptr);
      Call(l, called, w, at, nullptr);
      std::vector<std::byte> kept(others.bytes());
      ASSERT_TRUE(device_->Download(kept, others.raw()).ok());
      EXPECT_TRUE(std::ranges::all_of(kept, [](std::byte b) { return b == kPoison; }));
      EXPECT_EQ(Floats(replayed.x), Floats(called.x));
      EXPECT_EQ(Floats(replayed.room_k), Floats(called.room_k));
      EXPECT_EQ(Get(replayed.lse), Get(called.lse));
      EXPECT_EQ(Get(replayed.o), Get(called.o));
      EXPECT_EQ(Floats(replayed.y), Floats(called.y));
    }
    recording->reset();
    EXPECT_EQ(device_->Stats().used_bytes, used) << "the recording's memory";
  }
}

// By one launch where they are alike; the last shape has no kernel that takes several.
TEST_F(CudaRecordingCheck, RowsOfSeveralSequencesAreAsThoseOfEach) {
  struct Shape {
    uint32_t heads, kv_heads, head_dim;
    DType dtype;
  };
  constexpr uint32_t kTokens = 1200;  // of a part's memory: enough to be split
  for (const Shape& s : {Shape{32, 8, 128, DType::kBf16}, Shape{6, 2, 64, DType::kFp16},
                         Shape{4, 4, 96, DType::kBf16}, Shape{6, 3, 40, DType::kBf16}}) {
    for (const uint32_t members : {1u, 3u, 8u, 40u}) {
      SCOPED_TRACE(absl::StrCat(members, " of ", s.heads, " heads of ", s.head_dim));
      const size_t q = size_t{s.heads} * s.head_dim, kv = size_t{s.kv_heads} * s.head_dim;
      const size_t vector = s.head_dim * DTypeBytes(s.dtype);
      const std::vector<float> inv_freq = Random(s.head_dim / 2);
      const DeviceBuffer k = Put(Stored(Random(members * kv), s.dtype));
      const DeviceBuffer v = Put(Stored(Random(members * kv), s.dtype));
      const std::vector<float> rows = Random(members * q);
      const std::vector<std::byte> room = Stored(Random(members * kv * kTokens), s.dtype);
      const std::vector<std::byte> first = Stored(Random(members * kv * kTokens), s.dtype);
      const DeviceBuffer first_k = Put(first), first_v = Put(first);
      std::vector<DevicePlace> places;
      std::vector<uint32_t> firsts;  // tokens of the first part; 0: there is none
      for (uint32_t m = 0; m < members; ++m) {
        firsts.push_back(m % 3 == 0 ? 0 : 1 + Below(128));
        const uint32_t lo = 200 + Below(100);
        places.push_back({lo + Below(1000), lo, Below(100)});
      }
      const DeviceBuffer told = Put(std::as_bytes(std::span(places)));
      const auto* const place = reinterpret_cast<const DevicePlace*>(told.raw());
      struct Results {
        DeviceBuffer x, room_k, room_v, o, lse;
      };
      const auto run = [&](bool together) {
        Results r{Put(rows), Put(room), Put(room), Output(members * q),
                  Output(size_t{members} * s.heads)};
        std::vector<DeviceKvStore> stores;
        std::vector<std::vector<DeviceKv>> parts(members);
        std::vector<DeviceAttention> attentions;
        for (uint32_t m = 0; m < members; ++m) {
          const size_t at = m * kv * kTokens * DTypeBytes(s.dtype), stride = kTokens * vector;
          stores.push_back({k.raw() + m * s.kv_heads * vector, v.raw() + m * s.kv_heads * vector,
                            r.room_k.raw() + at, r.room_v.raw() + at, stride, vector, 1, s.kv_heads,
                            0, place + m});
          if (firsts[m] > 0) {
            parts[m].push_back({first_k.raw() + at, first_v.raw() + at, stride, {0, firsts[m]}});
          }
          parts[m].push_back({r.room_k.raw() + at,
                              r.room_v.raw() + at,
                              stride,
                              {places[m].kv_lo, places[m].first_token + 1}});
          DeviceAttention a;
          a.parts = parts[m];
          a.dtype = s.dtype;
          a.heads = s.heads;
          a.kv_heads = s.kv_heads;
          a.head_dim = s.head_dim;
          a.first_token = places[m].first_token;
          a.rows = 1;
          a.q = r.x.floats() + m * q;
          a.o = r.o.floats() + m * q;
          a.lse = r.lse.floats() + size_t{m} * s.heads;
          a.place = place + m;
          attentions.push_back(a);
        }
        if (together) {
          device_->Rope(
              {r.x.floats(), 0, members, s.heads, s.head_dim, inv_freq, 1.5f, place, true});
          device_->StoreKvEach(stores);
          device_->AttendEach(attentions);
          return r;
        }
        for (uint32_t m = 0; m < members; ++m) {
          device_->Rope(
              {r.x.floats() + m * q, 0, 1, s.heads, s.head_dim, inv_freq, 1.5f, place + m});
          device_->StoreKv(stores[m]);
          device_->Attend(attentions[m]);
        }
        return r;
      };
      const Results alone = run(false), together = run(true);
      EXPECT_EQ(Floats(together.x), Floats(alone.x));
      EXPECT_EQ(Floats(together.room_k), Floats(alone.room_k));
      EXPECT_EQ(Floats(together.room_v), Floats(alone.room_v));
      // The work is cut up in other ways: weights are rounded beside other maxima.
      const double rounding = s.dtype == DType::kBf16 ? 0x1p-8 : 0x1p-11;
      EXPECT_LE(WorstRow(Get(together.o), Get(alone.o), s.head_dim), rounding);
      const std::vector<float> lse = Get(together.lse), want = Get(alone.lse);
      for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(lse[i], want[i], 1e-4) << i;
    }
  }
}

// Other programs on the card would be mistaken for it, but for a few MiB.
TEST_F(CudaRecordingCheck, RecordingsThatHaveGoneTakeNothing) {
  const std::vector<float> values = Random(1024);
  const DeviceBuffer from = Put(values), to = Output(values.size());
  const auto make = [&] {
    auto recording = device_->Record([&] {
      for (int i = 0; i < 1000; ++i) device_->Copy({to.raw(), 0, from.raw(), 0, 4096, 1});
    });
    ASSERT_TRUE(recording.ok()) << recording.status();
    device_->Replay(**recording);
    EXPECT_EQ(Get(to), values);
  };
  make();
  const uint64_t once = device_->Stats().overhead_bytes;
  for (int i = 0; i < 50; ++i) make();
  EXPECT_LE(device_->Stats().overhead_bytes, once + (8 << 20));
}

TEST_F(CudaRecordingCheck, WhatCannotBeRecordedIsNamedAndLeavesTheDeviceAsItWas) {
  const DeviceBuffer o = Output(1024), lse = Output(8);
  DeviceAttention a;  // no parts to find the place in
  a.heads = a.kv_heads = 1;
  a.head_dim = 64;
  a.rows = 1;
  a.q = a.o = o.floats();
  a.lse = lse.floats();
  a.place = reinterpret_cast<const DevicePlace*>(o.raw());
  const absl::Status refused = device_->Record([&] { device_->Attend(a); }).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  EXPECT_NE(std::string(refused.message()).find("Attend: 0 parts"), std::string::npos) << refused;
  const std::vector<float> from = Random(1024);
  const DeviceBuffer in = Put(from), out = Output(1024);
  device_->Copy({out.raw(), 0, in.raw(), 0, 4096, 1});
  EXPECT_EQ(Get(out), from);
}

}  // namespace
}  // namespace quarry
