// A small random model without attention: x += down * SwiGlu(gate_up * norm(x)), layer by layer.
// Its weights are resident or streamed.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gpu/weights/weight_store.h"
#include "tests/gpu/cuda/device_fixture.h"

namespace quarry {

class ChainWeights {
 public:
  // bf16, or codes of such.
  ChainWeights(size_t layers, size_t hidden, size_t inner, WeightForm form, std::mt19937_64* random)
      : hidden_(hidden), inner_(inner) {
    for (size_t l = 0; l < layers; ++l) {
      StoredUnit& unit = units_.emplace_back();
      unit.push_back(Make("norm", 1, hidden, 1.0f, WeightForm::kPlain, random));
      unit.push_back(Make("gate_up", 2 * inner, hidden, 0.02f, form, random));
      unit.push_back(Make("down", hidden, inner, 0.02f, form, random));
    }
  }
  size_t hidden() const { return hidden_; }
  size_t inner() const { return inner_; }
  const std::vector<StoredUnit>& units() const { return units_; }
  uint64_t unit_bytes(const Device& device) const { return UnitBytes(device, units_.front()); }

 private:
  StoredMatrix Make(const char* name, size_t rows, size_t width, float size, WeightForm form,
                    std::mt19937_64* random) {
    std::vector<std::byte>& bytes = bytes_.emplace_back(rows * width * 2);
    std::uniform_real_distribution<float> uniform(-2 * size, 2 * size);
    // A few values, repeated at another place in every row: making all takes too long.
    std::vector<uint16_t> values(4099);
    for (uint16_t& v : values) v = FloatToBf16(uniform(*random));
    for (size_t i = 0; i < rows * width; ++i) {
      std::memcpy(bytes.data() + 2 * i, &values[(i + i / width * 61) % values.size()], 2);
    }
    return {name, {{bytes, DType::kBf16, rows}}, width, form};
  }

  const size_t hidden_, inner_;
  std::vector<StoredUnit> units_;
  std::vector<std::vector<std::byte>> bytes_;
};

class LayerChain {
 public:
  // `streamed` of its layers are; leave_free as the store's.
  LayerChain(Device* device, const ChainWeights& weights, size_t streamed,
             std::optional<uint64_t> leave_free = std::nullopt)
      : device_(*device), weights_(weights) {
    const size_t layers = weights.units().size();
    const uint64_t bytes = weights.unit_bytes(*device);
    Residence residence;
    for (size_t l = 0; l < layers; ++l) {
      const bool goes = (l + 1) * streamed / layers > l * streamed / layers;
      residence.streamed.push_back(goes);
      (goes ? residence.streamed_bytes : residence.resident_bytes) += bytes;
    }
    residence.slots = static_cast<uint32_t>(std::min<size_t>(2, streamed));
    residence.slot_bytes = streamed > 0 ? bytes : 0;
    auto store = WeightStore::Create(device, weights.units(), residence, leave_free);
    status_ = store.status();
    if (store.ok()) store_ = *std::move(store);
  }
  const absl::Status& status() const { return status_; }
  const WeightStore& store() const { return *store_; }
  const Residence& residence() const { return store_->residence(); }

  // x [rows][hidden], in place.
  void Run(float* x, size_t rows) {
    const size_t hidden = weights_.hidden(), inner = weights_.inner();
    if (norm_.bytes() < rows * hidden * 4) {
      norm_ = Memory(rows * hidden);
      gate_up_ = Memory(rows * 2 * inner);
      activated_ = Memory(rows * inner);
    }
    for (size_t l = 0; l < weights_.units().size(); ++l) {
      store_->Use(l);
      const std::vector<DeviceMatrix> w = store_->Borrow(l);
      device_.RmsNorm(x, w[0], 1e-5f, norm_.floats(), rows);
      device_.MatMul(norm_.floats(), w[1], gate_up_.floats(), rows, Device::Output::kOverwrite);
      device_.SwiGlu(gate_up_.floats(), activated_.floats(), rows, inner);
      device_.MatMul(activated_.floats(), w[2], x, rows, Device::Output::kAccumulate);
    }
  }

 private:
  DeviceBuffer Memory(size_t floats) {
    auto out = device_.Allocate(floats * sizeof(float), "chain");
    EXPECT_TRUE(out.ok()) << out.status();
    return out.ok() ? *std::move(out) : DeviceBuffer();
  }

  Device& device_;
  const ChainWeights& weights_;
  std::unique_ptr<WeightStore> store_;
  absl::Status status_;
  DeviceBuffer norm_, gate_up_, activated_;
};

}  // namespace quarry
