// The CUDA device's weights as codes, against double references, and weights that are streamed,
// against the same ones resident.
#include <cstring>
#include <functional>

#include "gpu/weights/codes.h"
#include "gpu/weights/pack_matrix.h"
#include "tests/gpu/cuda/layer_chain.h"

namespace quarry {
namespace {

struct Shape {
  size_t rows, out, in;
};

class CudaWeightCheck : public CudaDeviceCheck {
 protected:
  // `values` as codes, and what they stand for, rounded to `dtype` where `rounds`.
  std::vector<double> Decoded(const std::vector<std::byte>& stored, const MatrixLayout& layout,
                              DType dtype, bool rounds) {
    const HostMatrix matrix{stored, dtype, layout.rows};
    std::vector<std::byte> packed(layout.bytes());
    EXPECT_TRUE(PackMatrix(std::span(&matrix, 1), layout, "check", packed.data(), nullptr).ok());
    const auto* const scales =
        reinterpret_cast<const uint16_t*>(packed.data() + layout.scales_at());
    std::vector<float> values(layout.rows * layout.width);
    for (size_t r = 0; r < layout.rows; ++r) {
      DecodeRow(layout.form, packed.data() + r * layout.row_bytes(),
                scales + r * layout.scales_per_row(),
                std::span(values).subspan(r * layout.width, layout.width));
    }
    if (rounds) values = Rounded(values, layout.dtype);
    return {values.begin(), values.end()};
  }

  void Check(const Shape& s, WeightForm form, DType dtype) {
    const std::string where = std::string(WeightFormName(form)) + " " +
                              std::string(DTypeName(dtype)) + " " + std::to_string(s.rows) + "x" +
                              std::to_string(s.out) + "x" + std::to_string(s.in);
    const std::vector<std::byte> stored = Stored(Random(s.out * s.in, 0.02f), dtype);
    const HostMatrix matrix{stored, dtype, s.out};
    auto weights = device_->Load(std::span(&matrix, 1), s.in, "check", form);
    ASSERT_TRUE(weights.ok()) << weights.status();
    ASSERT_EQ(weights->form, form);
    const bool few = s.rows <= 8;  // the codes themselves
    const std::vector<double> w = Decoded(stored, LayoutOf(*weights), dtype, !few);
    const std::vector<float> x = Random(s.rows * s.in), before = Random(s.rows * s.out);
    const std::vector<float> rounded = Rounded(x, weights->dtype);
    const DeviceBuffer in = Put(x), added = Put(before), over = Output(s.rows * s.out);
    device_->MatMul(in.floats(), *weights, over.floats(), s.rows, Device::Output::kOverwrite);
    device_->MatMul(in.floats(), *weights, added.floats(), s.rows, Device::Output::kAccumulate);
    std::vector<double> want(s.rows * s.out), sum(want.size());
    ForAll(s.rows, [&](size_t r) {
      for (size_t o = 0; o < s.out; ++o) {
        double total = 0;
        for (size_t i = 0; i < s.in; ++i) total += rounded[r * s.in + i] * w[o * s.in + i];
        want[r * s.out + o] = total;
        sum[r * s.out + o] = total + before[r * s.out + o];
      }
    });
    const double limit = few ? 1e-4 : 1e-3;  // of sums alone
    EXPECT_LE(WorstRow(Get(over), want, s.out), limit) << where;
    std::vector<float> accumulated(before.size());
    ASSERT_TRUE(
        device_->Download(std::as_writable_bytes(std::span(accumulated)), added.raw()).ok());
    EXPECT_LE(WorstRow(accumulated, sum, s.out), limit) << where;
  }
};

TEST_F(CudaWeightCheck, ProductsWithCodesAgree) {
  // The last one's weights are widened in pieces.
  const Shape shapes[] = {{1, 8, 16},     {1, 1000, 512},   {2, 96, 72},     {3, 513, 129},
                          {7, 33, 1},     {8, 4096, 2048},  {5, 17, 14336},  {9, 33, 40},
                          {64, 640, 640}, {300, 200, 1111}, {4097, 65, 136}, {20, 9000, 2048}};
  for (const WeightForm form : {WeightForm::kInt8, WeightForm::kInt4}) {
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
      for (const Shape& shape : shapes) Check(shape, form, dtype);
    }
  }
}

TEST_F(CudaWeightCheck, UnalignedActivationsAreMultipliedToo) {
  const size_t rows = 3, in = 256, out = 40;
  const std::vector<float> x = Random(rows * in + 1), w = Random(out * in);
  const HostMatrix matrix{std::as_bytes(std::span(w)), DType::kFp32, out};
  auto weights = device_->Load(std::span(&matrix, 1), in, "check", WeightForm::kInt4);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const DeviceBuffer all = Put(x), same = Put(std::vector<float>(x.begin() + 1, x.end()));
  const DeviceBuffer a = Output(rows * out), b = Output(rows * out);
  device_->MatMul(all.floats() + 1, *weights, a.floats(), rows, Device::Output::kOverwrite);
  device_->MatMul(same.floats(), *weights, b.floats(), rows, Device::Output::kOverwrite);
  EXPECT_EQ(Get(a), Get(b));
}

TEST_F(CudaWeightCheck, UploadsBesideOperationsAreOrderedByWaiting) {
  const size_t n = size_t{8} << 20;
  auto host = device_->AllocateHost(2 * n * sizeof(float), "check");
  ASSERT_TRUE(host.ok()) << host.status();
  auto* const values = reinterpret_cast<float*>(host->bytes().data());
  for (size_t i = 0; i < 2 * n; ++i) values[i] = static_cast<float>(random_() % 4096);
  const DeviceBuffer slot = Allocate(n * sizeof(float));
  const DeviceBuffer first = Output(n), second = Output(n);
  // The second upload may begin only when the first copy has read the slot, whose reading comes
  // behind much work.
  const DeviceMatrix w = Load(Random(size_t{4096} * 4096), 4096, DType::kBf16);
  const DeviceBuffer x = Put(Random(size_t{4096} * 4096)), y = Allocate(x.bytes());
  for (int i = 0; i < 20; ++i) {
    device_->MatMul(x.floats(), w, y.floats(), 4096, Device::Output::kOverwrite);
  }
  const auto bytes = host->bytes();
  device_->WaitFor(device_->StartUpload(slot.raw(), bytes.first(n * sizeof(float))));
  device_->Copy({first.raw(), 0, slot.raw(), 0, n * sizeof(float), 1});
  const Device::UploadTicket last = device_->StartUpload(slot.raw(), bytes.last(n * sizeof(float)));
  device_->MatMul(x.floats(), w, y.floats(), 4096, Device::Output::kOverwrite);
  device_->WaitFor(last);
  device_->Copy({second.raw(), 0, slot.raw(), 0, n * sizeof(float), 1});
  const std::vector<float> a = Get(first), b = Get(second);
  EXPECT_EQ(0, std::memcmp(a.data(), values, n * sizeof(float)));
  EXPECT_EQ(0, std::memcmp(b.data(), values + n, n * sizeof(float)));
}

TEST_F(CudaWeightCheck, DownloadsBesideOperationsAreOrderedByWaiting) {
  const size_t n = size_t{8} << 20, bytes = n * sizeof(float);
  auto host = device_->AllocateHost(2 * bytes, "check");
  ASSERT_TRUE(host.ok()) << host.status();
  const std::vector<float> values = Random(2 * n);
  const DeviceBuffer both = Put(values), slot = Allocate(bytes);
  const DeviceMatrix w = Load(Random(size_t{4096} * 4096), 4096, DType::kBf16);
  const DeviceBuffer x = Put(Random(size_t{4096} * 4096)), y = Output(size_t{4096} * 4096);
  const auto work = [&] {
    for (int i = 0; i < 20; ++i) {
      device_->MatMul(x.floats(), w, y.floats(), 4096, Device::Output::kOverwrite);
    }
  };
  // What is downloaded first is written behind much work, and written over behind the download.
  work();
  device_->Copy({slot.raw(), 0, both.raw(), 0, bytes, 1});
  const auto first = device_->StartDownload(host->bytes().first(bytes), slot.raw());
  device_->WaitForDownload(first);
  device_->Copy({slot.raw(), 0, both.raw() + bytes, 0, bytes, 1});
  const auto second = device_->StartDownload(host->bytes().last(bytes), slot.raw());
  work();  // beside it
  ASSERT_TRUE(device_->FinishDownload(first).ok());
  EXPECT_EQ(0, std::memcmp(host->bytes().data(), values.data(), bytes));
  ASSERT_TRUE(device_->FinishDownload(second).ok());
  EXPECT_EQ(0, std::memcmp(host->bytes().data(), values.data(), 2 * bytes));
  Get(y);
}

TEST_F(CudaWeightCheck, StreamedLayersGiveWhatResidentOnesGiveToTheBit) {
  constexpr size_t kLayers = 7, kHidden = 1536, kInner = 4096;
  for (const WeightForm form : {WeightForm::kPlain, WeightForm::kInt8, WeightForm::kInt4}) {
    const ChainWeights weights(kLayers, kHidden, kInner, form, &random_);
    for (const size_t rows : {1, 300}) {
      const std::vector<float> x = Random(rows * kHidden);
      std::vector<float> want;
      for (const size_t streamed : {size_t{0}, size_t{4}, kLayers}) {
        const uint64_t before = device_->Stats().used_bytes;
        LayerChain chain(device_, weights, streamed);
        ASSERT_TRUE(chain.status().ok()) << chain.status();
        EXPECT_GE(device_->Stats().used_bytes - before, chain.residence().device_bytes());
        if (streamed == kLayers) {
          EXPECT_LT(chain.residence().device_bytes(), kLayers * weights.unit_bytes(*device_) / 3);
        }
        std::vector<float> got;
        // Several passes, as prefill and decode take them.
        for (int pass = 0; pass < 3; ++pass) {
          const DeviceBuffer states = Put(x);
          chain.Run(states.floats(), rows);
          std::vector<float> out(x.size());
          ASSERT_TRUE(device_->Download(std::as_writable_bytes(std::span(out)), states.raw()).ok());
          got.insert(got.end(), out.begin(), out.end());
        }
        ASSERT_TRUE(std::all_of(got.begin(), got.end(), [](float v) { return std::isfinite(v); }));
        if (streamed == 0) want = got;
        EXPECT_EQ(0, std::memcmp(want.data(), got.data(), got.size() * sizeof(float)))
            << WeightFormName(form) << ", " << rows << " rows, " << streamed << " streamed";
      }
    }
  }
}

// A device of its own, for its budget.
TEST_F(CudaWeightCheck, StreamedLayersStayWhileNobodyWantsTheirMemory) {
  constexpr size_t kLayers = 7, kHidden = 1536, kInner = 4096, kRows = 3;
  constexpr uint64_t kBudget = uint64_t{1} << 30, kLeaveFree = uint64_t{64} << 20;
  auto made = MakeCudaDevice({.capacity_bytes = kBudget});
  ASSERT_TRUE(made.ok()) << made.status();
  Device& own = **made;
  const ChainWeights weights(kLayers, kHidden, kInner, WeightForm::kPlain, &random_);
  const std::vector<float> x = Random(kRows * kHidden);
  const auto states = own.Allocate(x.size() * sizeof(float), "states");
  ASSERT_TRUE(states.ok()) << states.status();
  const auto pass = [&](const std::function<void()>& run) {
    EXPECT_TRUE(own.Upload(states->raw(), std::as_bytes(std::span(x))).ok());
    run();
    std::vector<float> out(x.size());
    EXPECT_TRUE(own.Download(std::as_writable_bytes(std::span(out)), states->raw()).ok());
    return out;
  };
  std::vector<float> want;
  {
    LayerChain resident(&own, weights, 0);
    ASSERT_TRUE(resident.status().ok()) << resident.status();
    want = pass([&] { resident.Run(states->floats(), kRows); });
  }
  LayerChain chain(&own, weights, kLayers, kLeaveFree);
  ASSERT_TRUE(chain.status().ok()) << chain.status();
  const auto run = [&] { chain.Run(states->floats(), kRows); };
  const uint64_t unit = weights.unit_bytes(own), all = (kLayers - 2) * unit;
  EXPECT_EQ(pass(run), want);
  ASSERT_EQ(chain.store().spare_bytes(), all);
  const uint64_t moves = chain.store().moves();
  EXPECT_EQ(pass(run), want);
  ASSERT_EQ(chain.store().moves(), moves);
  // Nothing comes any more: a pass can be recorded.
  {
    const auto recording = own.Record(run);
    ASSERT_TRUE(recording.ok()) << recording.status();
    for (int i = 0; i < 3; ++i) EXPECT_EQ(pass([&] { own.Replay(**recording); }), want);
  }
  EXPECT_EQ(chain.store().moves(), moves);
  // Who wants memory gets it, at whatever time, and the others are streamed again.
  for (uint64_t bytes = unit / 2; bytes < kBudget; bytes += unit + unit / 3) {
    const DeviceStats before = own.Stats();
    const uint64_t others = before.used_bytes + before.overhead_bytes - chain.store().spare_bytes();
    if (bytes + others + unit > kBudget) break;  // one may be in use, or be in the way
    const auto wanted = own.Allocate(bytes, "somebody else's");
    ASSERT_TRUE(wanted.ok()) << wanted.status();
    std::vector<std::byte> pattern(bytes, std::byte{0x5a});
    ASSERT_TRUE(own.Upload(wanted->raw(), pattern).ok());
    for (int i = 0; i < 3; ++i) EXPECT_EQ(pass(run), want) << bytes;
    std::vector<std::byte> read(bytes);
    ASSERT_TRUE(own.Download(read, wanted->raw()).ok());
    EXPECT_EQ(read, pattern) << bytes;
    const DeviceStats stats = own.Stats();
    EXPECT_LE(stats.used_bytes + stats.overhead_bytes, kBudget);
    EXPECT_LE(stats.mapped_bytes + stats.overhead_bytes, kBudget);
  }
  for (int i = 0; i < 2; ++i) EXPECT_EQ(pass(run), want);
  EXPECT_EQ(chain.store().spare_bytes(), all);
}

// On a device of its own: of the shared one all memory may be mapped, before libraries took theirs.
TEST_F(CudaWeightCheck, StreamedLayersStayInsideTheBudget) {
  constexpr size_t kLayers = 7, kHidden = 1536, kInner = 4096, kRows = 300;
  auto own = MakeCudaDevice({.capacity_bytes = uint64_t{1} << 30});
  ASSERT_TRUE(own.ok()) << own.status();
  const ChainWeights weights(kLayers, kHidden, kInner, WeightForm::kPlain, &random_);
  LayerChain chain(own->get(), weights, kLayers);
  ASSERT_TRUE(chain.status().ok()) << chain.status();
  const std::vector<float> x = Random(kRows * kHidden);
  auto states = (*own)->Allocate(x.size() * sizeof(float), "states");
  ASSERT_TRUE(states.ok()) << states.status();
  ASSERT_TRUE((*own)->Upload(states->raw(), std::as_bytes(std::span(x))).ok());
  chain.Run(states->floats(), kRows);
  std::vector<float> out(x.size());
  ASSERT_TRUE((*own)->Download(std::as_writable_bytes(std::span(out)), states->raw()).ok());
  const DeviceStats stats = (*own)->Stats();
  EXPECT_GT(stats.peak_bytes, x.size() * sizeof(float));
  EXPECT_LE(stats.peak_bytes + stats.overhead_bytes, stats.capacity_bytes);
  EXPECT_LE(stats.mapped_bytes + stats.overhead_bytes, stats.capacity_bytes);
}

}  // namespace
}  // namespace quarry
