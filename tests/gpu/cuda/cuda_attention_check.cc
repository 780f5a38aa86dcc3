// The CUDA device's attention against a double reference.
#include "tests/gpu/cuda/device_fixture.h"

namespace quarry {
namespace {

struct Case {
  DType dtype;
  uint32_t heads, kv_heads, head_dim, first_token, rows, window;
  std::vector<TokenRange> held;
  bool aligned = true;

  std::string Name() const {
    std::string out = std::string(DTypeName(dtype)) + ", " + std::to_string(heads) + "/" +
                      std::to_string(kv_heads) + " heads of " + std::to_string(head_dim) +
                      ", rows [" + std::to_string(first_token) + ", +" + std::to_string(rows) +
                      "), window " + std::to_string(window) + ", tokens";
    for (const TokenRange& r : held) {
      out += " [" + std::to_string(r.lo) + ", " + std::to_string(r.hi) + ")";
    }
    return out;
  }
};

class CudaAttentionCheck : public CudaDeviceCheck {
 protected:
  // One side of a part's K and V: [kv_head][token][head_dim], a head's stride apart.
  using Values = std::vector<float>;

  void Run(const Case& c) {
    SCOPED_TRACE(c.Name());
    const size_t vector = c.head_dim * DTypeBytes(c.dtype);
    const size_t unit = c.aligned ? 16 : DTypeBytes(c.dtype);
    // Every part in a memory that is poisoned but for it, so that what is read beside it shows.
    std::vector<Values> keys, values;
    std::vector<DeviceBuffer> memory;
    std::vector<DeviceKv> parts;
    for (const TokenRange& range : c.held) {
      const size_t elements = size_t{c.kv_heads} * range.size() * c.head_dim;
      const size_t stride = range.size() * vector + unit * Below(40);
      const void* at[2];
      for (auto* side : {&keys, &values}) {
        const Values& v = side->emplace_back(Rounded(Random(elements, 1.5f), c.dtype));
        const size_t skip = unit * (1 + Below(20));
        std::vector<std::byte> bytes(skip + c.kv_heads * stride + 4096, kPoison);
        const std::vector<std::byte> stored = Stored(v, c.dtype);
        for (uint32_t h = 0; h < c.kv_heads; ++h) {
          std::memcpy(bytes.data() + skip + h * stride, stored.data() + h * range.size() * vector,
                      range.size() * vector);
        }
        memory.push_back(Put(bytes));
        at[side == &values] = memory.back().raw() + skip;
      }
      parts.push_back({at[0], at[1], stride, range});
    }
    const size_t width = size_t{c.heads} * c.head_dim;
    const Values q = Random(c.rows * width, 2.0f);
    const DeviceBuffer q_at = Put(q), o_at = Output(q.size()),
                       lse_at = Output(size_t{c.rows} * c.heads);
    const DeviceAttention a{parts,         c.dtype,       c.heads,        c.kv_heads,
                            c.head_dim,    c.first_token, c.rows,         c.window,
                            q_at.floats(), o_at.floats(), lse_at.floats()};
    device_->Attend(a);
    const Values o = Get(o_at), lse = Get(lse_at);
    Compare(c, a, Rounded(q, c.dtype), keys, values, o, lse);
  }

  static void Compare(const Case& c, const DeviceAttention& a, const Values& q,
                      const std::vector<Values>& keys, const std::vector<Values>& values,
                      const Values& o, const Values& lse) {
    const double limit = c.dtype == DType::kBf16 ? 1e-2 : c.dtype == DType::kFp16 ? 2e-3 : 5e-5;
    std::vector<std::string> wrong(size_t{c.rows} * c.heads);
    std::vector<double> errors(wrong.size());
    ForAll(wrong.size(), [&](size_t i) {
      const auto r = static_cast<uint32_t>(i / c.heads), h = static_cast<uint32_t>(i % c.heads);
      const uint32_t kv_head = h / (c.heads / c.kv_heads);
      const TokenRange visible = a.Visible(r);
      double sum = 0, largest = -INFINITY;
      std::vector<double> want(c.head_dim, 0.0);
      for (size_t p = 0; p < c.held.size(); ++p) {
        const TokenRange seen = Intersect(c.held[p], visible);
        for (uint32_t t = seen.lo; t < seen.hi; ++t) {
          const size_t at = (size_t{kv_head} * c.held[p].size() + t - c.held[p].lo) * c.head_dim;
          double z = 0;
          for (uint32_t d = 0; d < c.head_dim; ++d) {
            z += double{q[i * c.head_dim + d]} * keys[p][at + d];
          }
          z /= std::sqrt(double{1} * c.head_dim);
          const double now = std::max(largest, z), shrink = std::exp(largest - now);
          const double weight = std::exp(z - now);
          largest = now;
          sum = sum * shrink + weight;
          for (uint32_t d = 0; d < c.head_dim; ++d) {
            want[d] = want[d] * shrink + weight * values[p][at + d];
          }
        }
      }
      const std::span<const float> got = std::span(o).subspan(i * c.head_dim, c.head_dim);
      if (sum == 0) {
        const bool zeros = std::all_of(got.begin(), got.end(), [](float x) { return x == 0; });
        if (!zeros || lse[i] != -INFINITY) wrong[i] = "not empty: lse " + std::to_string(lse[i]);
        return;
      }
      for (double& x : want) x /= sum;
      errors[i] = Error<double>(got, want);
      const double off = std::abs(lse[i] - (largest + std::log(sum)));
      if (!(errors[i] <= limit)) wrong[i] = "error of o " + std::to_string(errors[i]);
      if (!(off <= 2e-4)) wrong[i] += " error of lse " + std::to_string(off);
    });
    size_t count = 0;
    for (size_t i = 0; i < wrong.size(); ++i) {
      if (wrong[i].empty() || ++count > 5) continue;
      ADD_FAILURE() << "row " << i / c.heads << " head " << i % c.heads << ": " << wrong[i];
    }
    EXPECT_EQ(count, 0u) << "of " << wrong.size() << " answers";
    worst_[static_cast<int>(c.dtype)] = std::max(worst_[static_cast<int>(c.dtype)],
                                                 *std::max_element(errors.begin(), errors.end()));
  }

  static void TearDownTestSuite() {
    if (!Shared().ok()) return;
    std::printf("largest relative error of o: bf16 %.2e, fp16 %.2e, fp32 %.2e\n", worst_[1],
                worst_[2], worst_[3]);
  }
  static inline double worst_[4] = {};
};

TEST_F(CudaAttentionCheck, OneTile) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const uint32_t head_dim : {64u, 96u, 128u}) {
      Run({dtype, 1, 1, head_dim, 63, 1, 0, {{0, 64}}});
      Run({dtype, 1, 1, head_dim, 0, 1, 0, {{0, 1}}});
      Run({dtype, 2, 2, head_dim, 0, 64, 0, {{0, 64}}});
      Run({dtype, 8, 2, head_dim, 0, 32, 0, {{0, 32}}});
    }
  }
}

TEST_F(CudaAttentionCheck, PrefillsAndDecodesOfAllShapes) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const uint32_t head_dim : {64u, 96u, 128u}) {
      for (const uint32_t group : {1u, 4u, 8u}) {
        Run({dtype, 2 * group, 2, head_dim, 0, 300, 0, {{0, 300}}});
        Run({dtype, 2 * group, 2, head_dim, 4999, 1, 0, {{0, 5000}}});
        Run({dtype, 2 * group, 2, head_dim, 1000, 77, 0, {{0, 128}, {500, 1077}}});
        Run({dtype, group, 1, head_dim, 3000, 131, 700, {{0, 128}, {2100, 3131}}});
      }
    }
  }
}

// Enough rows that nobody splits their keys: Hopper attends them by a kernel of its own.
TEST_F(CudaAttentionCheck, PrefillsThatFillACard) {
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    for (const uint32_t head_dim : {64u, 96u, 128u}) {
      Run({dtype, 32, 8, head_dim, 0, 1500, 0, {{0, 1500}}});
      Run({dtype, 32, 4, head_dim, 1 + Below(300), 700, 0, {{0, 1200}}});
      Run({dtype, 24, 24, head_dim, Below(300), 900 + Below(200), 0, {{0, 1500}}});
    }
  }
}

TEST_F(CudaAttentionCheck, RowsThatSeeNothingAreEmpty) {
  for (const DType dtype : {DType::kBf16, DType::kFp32}) {
    Run({dtype, 8, 2, 128, 10, 3, 0, {}});
    Run({dtype, 8, 2, 128, 90, 33, 20, {{0, 16}, {95, 123}}});  // row 0 sees nothing
    Run({dtype, 4, 4, 64, 10, 200, 0, {{100, 210}}});           // the first 90 rows
    Run({dtype, 4, 1, 96, 4000, 1, 100, {{0, 3000}}});
    Run({dtype, 4, 1, 96, 0, 5, 0, {{7, 7}, {9, 9}}});  // empty parts
  }
}

TEST_F(CudaAttentionCheck, ManyParts) {
  for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    for (const uint32_t count : {3u, 64u, 65u, 150u}) {
      std::vector<TokenRange> held;
      uint32_t token = 0;
      for (uint32_t p = 0; p < count; ++p) {
        token += Below(20);
        held.push_back({token, token + 1 + Below(30)});
        token = held.back().hi;
      }
      Run({dtype, 8, 2, 128, token - 40, 40, 0, held});
      Run({dtype, 8, 2, 96, token + 5, 1, 0, held});
    }
  }
}

TEST_F(CudaAttentionCheck, OtherShapesTakeThePlainKernel) {
  Run({DType::kBf16, 4, 2, 80, 200, 33, 0, {{0, 233}}});
  Run({DType::kFp16, 4, 2, 16, 200, 33, 50, {{0, 233}}});
  Run({DType::kBf16, 2, 1, 512, 200, 3, 0, {{0, 203}}});
  Run({DType::kFp32, 6, 3, 256, 90, 40, 0, {{0, 130}}});
  Run({DType::kBf16, 8, 2, 128, 300, 20, 0, {{0, 100}, {110, 320}}, false});
  Run({DType::kFp16, 8, 8, 64, 300, 1, 0, {{0, 100}, {110, 301}}, false});
}

TEST_F(CudaAttentionCheck, RandomShapes) {
  const DType dtypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};
  const uint32_t head_dims[] = {64, 96, 128}, groups[] = {1, 2, 3, 4, 7, 8};
  for (int i = 0; i < 60; ++i) {
    Case c;
    c.dtype = dtypes[Below(5) % 3];
    c.head_dim = head_dims[Below(3)];
    c.kv_heads = 1 + Below(3);
    c.heads = c.kv_heads * groups[Below(6)];
    c.rows = Below(3) == 0 ? 1 + Below(4) : 1 + Below(300);
    const uint32_t tokens = 1 + Below(i % 4 == 0 ? 5000 : 700);
    c.first_token = tokens > c.rows ? tokens - c.rows : Below(100);
    c.window = Below(3) == 0 ? 1 + Below(tokens) : 0;
    if (Below(2) == 0) {
      c.held = {{0, tokens}};
    } else {
      const uint32_t x = Below(tokens), y = x + Below(tokens - x);
      c.held = {{0, x}, {y, tokens}};
    }
    Run(c);
  }
}

}  // namespace
}  // namespace quarry
