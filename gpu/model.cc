#include "gpu/model.h"

#include <openssl/evp.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/weights/matrix_layout.h"
#include "proto/check.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// Embedding rows on their way to the device at a time.
constexpr size_t kGatherBytes = size_t{16} << 20;

// SHA-256 over byte strings, each with its length first.
class FileDigest {
 public:
  FileDigest() : context_(EVP_MD_CTX_new()) {
    QUARRY_CHECK(context_ != nullptr && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1);
  }
  ~FileDigest() { EVP_MD_CTX_free(context_); }
  FileDigest(const FileDigest&) = delete;
  FileDigest& operator=(const FileDigest&) = delete;

  void Add(std::span<const std::byte> bytes) {
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bytes.size() >> (8 * i));
    EVP_DigestUpdate(context_, length, sizeof(length));
    EVP_DigestUpdate(context_, bytes.data(), bytes.size());
  }
  // False if there is no such file.
  bool AddFile(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) return false;
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    Add(std::as_bytes(std::span(text)));
    return true;
  }
  template <typename D>
  D Finish() {
    D out;
    unsigned int n = 0;
    QUARRY_CHECK(EVP_DigestFinal_ex(context_, out.bytes.data(), &n) == 1 && n == out.bytes.size());
    return out;
  }

 private:
  EVP_MD_CTX* context_;
};

// Rows of the head that are used together, each so many from the one before: they take about as
// much as a layer, for they share its memory where they are streamed. The same where they are not,
// so that products have the same shapes, and multiples that keep every tile at an aligned address.
uint32_t TileRows(const StoredMatrix& head, const Device& device, uint64_t layer_bytes) {
  constexpr uint64_t kMultiple = 128;
  const uint64_t rows = head.stacked.front().rows, bytes = UnitBytes(device, {head});
  const uint64_t tiles = (bytes + layer_bytes - 1) / layer_bytes;
  const uint64_t step = (rows + tiles - 1) / tiles;
  return static_cast<uint32_t>((step + kMultiple - 1) / kMultiple * kMultiple);
}

// Rows [lo, lo + rows) of a stored matrix.
StoredMatrix RowsOf(const StoredMatrix& m, size_t lo, size_t rows) {
  const HostMatrix& stored = m.stacked.front();
  const size_t row = stored.bytes.size() / stored.rows;
  StoredMatrix out = m;
  out.stacked = {{stored.bytes.subspan(lo * row, rows * row), stored.dtype, rows}};
  return out;
}

// The same of a plain matrix on the device, borrowed.
DeviceMatrix RowsOf(const DeviceMatrix& m, size_t lo, size_t rows) {
  const size_t row = m.width * DTypeBytes(m.dtype);
  return {DeviceBuffer(nullptr, m.data.raw() + lo * row, rows * row), m.dtype, rows, m.width};
}

uint64_t FreeBytes(const Device& device) {
  const DeviceStats stats = device.Stats();
  const uint64_t taken = stats.used_bytes + stats.overhead_bytes;
  return stats.capacity_bytes - std::min(stats.capacity_bytes, taken);
}

std::vector<uint64_t> BytesOf(const Device& device, std::span<const StoredUnit> units) {
  std::vector<uint64_t> out;
  for (const StoredUnit& unit : units) out.push_back(UnitBytes(device, unit));
  return out;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(const std::string& directory, Device* device,
                                                   const WeightOptions& options) {
  auto model = std::unique_ptr<Model>(new Model(device));
  QUARRY_ASSIGN_OR_RETURN(model->config_, LoadModelConfig(directory));
  QUARRY_ASSIGN_OR_RETURN(WeightFiles files, WeightFiles::Open(directory));
  model->name_ = std::filesystem::path(directory).lexically_normal().filename().string();
  FileDigest weights;
  weights.AddFile(directory + "/config.json");
  for (const auto& file : files.files()) weights.Add(file->file_bytes());
  if (options.form != WeightForm::kPlain) {
    weights.Add(std::as_bytes(std::span(WeightFormName(options.form))));
  }
  model->weights_digest_ = weights.Finish<WeightsDigest>();
  FileDigest tokenizer;
  bool any = false;
  for (const char* name : {"tokenizer.json", "tokenizer.model", "vocab.json"}) {
    any |= tokenizer.AddFile(absl::StrCat(directory, "/", name));
  }
  if (any) model->tokenizer_digest_ = tokenizer.Finish<TokenizerDigest>();

  QUARRY_ASSIGN_OR_RETURN(ModelTensors tensors, FindTensors(model->config_, files, options.form));
  QUARRY_ASSIGN_OR_RETURN(
      model->final_norm_,
      device->Load(tensors.final_norm.stacked, tensors.final_norm.width, tensors.final_norm.name));
  QUARRY_RETURN_IF_ERROR(model->Place(std::move(tensors), options));
  if (!model->table_on_device_) model->files_ = std::move(files);
  return model;
}

absl::Status Model::Place(ModelTensors tensors, const WeightOptions& options) {
  const uint64_t free = FreeBytes(*device_);
  std::vector<StoredUnit> units = std::move(tensors.layers);
  const std::vector<uint64_t> layer_bytes = BytesOf(*device_, units);
  const StoredMatrix& head = config_.tied_head ? tensors.embedding : tensors.head;
  uint64_t all = UnitBytes(*device_, {head});
  for (const uint64_t bytes : layer_bytes) all += bytes;
  if (!config_.tied_head) all += UnitBytes(*device_, {tensors.embedding});
  const uint64_t reserve = options.mode == WeightMode::kAuto ? options.reserve_bytes : 0;
  table_on_device_ = options.mode == WeightMode::kResident ||
                     (options.mode == WeightMode::kAuto && all <= free && reserve <= free - all);
  const uint32_t step =
      TileRows(head, *device_, *std::max_element(layer_bytes.begin(), layer_bytes.end()));
  const auto for_tiles = [&](const auto& f) {
    for (uint32_t lo = 0; lo < config_.vocab; lo += step) f(lo, std::min(step, config_.vocab - lo));
  };
  if (table_on_device_) {
    units.push_back({head});
    if (!config_.tied_head) units.push_back({tensors.embedding});
  } else {
    for_tiles([&](uint32_t lo, uint32_t rows) { units.push_back({RowsOf(head, lo, rows)}); });
    table_ = tensors.embedding.stacked.front();
  }
  const std::vector<uint64_t> bytes = BytesOf(*device_, units);
  QUARRY_ASSIGN_OR_RETURN(const Residence residence,
                          PlanResidence({bytes, options.mode, device_->Stats().capacity_bytes, free,
                                         options.reserve_bytes}));
  const bool spare = options.mode == WeightMode::kAuto;
  QUARRY_ASSIGN_OR_RETURN(
      store_, WeightStore::Create(device_, units, residence,
                                  spare ? std::optional(options.leave_free_bytes) : std::nullopt));
  for (size_t u = 0; u < units.size(); ++u) at_.push_back(store_->At(u));
  const auto only = [&](size_t unit) { return std::move(store_->Borrow(unit).front()); };
  for (uint32_t l = 0; l < config_.layers; ++l) layers_.push_back(LayerOf(store_->Borrow(l)));
  for_tiles([&](uint32_t lo, uint32_t rows) {
    const size_t unit = config_.layers + (table_on_device_ ? 0 : head_.size());
    head_.push_back({lo, table_on_device_ ? RowsOf(only(unit), lo, rows) : only(unit), unit});
  });
  if (table_on_device_) embedding_ = only(units.size() - 1);
  return absl::OkStatus();
}

const LayerWeights& Model::Layer(uint32_t layer) const {
  store_->Use(layer);
  if (TakeMove(layer)) layers_[layer] = LayerOf(store_->Borrow(layer));
  return layers_[layer];
}

const HeadTile& Model::Head(size_t tile) const {
  HeadTile& out = head_[tile];
  store_->Use(out.unit);
  if (TakeMove(out.unit)) out.weight = std::move(store_->Borrow(out.unit).front());
  return out;
}

bool Model::TakeMove(size_t unit) const {
  const std::byte* const now = store_->At(unit);
  return std::exchange(at_[unit], now) != now;
}

absl::Status Model::Embed(std::span<const uint32_t> tokens, float* y) const {
  if (table_on_device_) {
    device_->Embed(embedding_, tokens, y);
    return absl::OkStatus();
  }
  const size_t width = config_.hidden;
  const size_t step = std::max<size_t>(1, kGatherBytes / (width * sizeof(float)));
  std::vector<float> rows(std::min(step, tokens.size()) * width);
  for (size_t lo = 0; lo < tokens.size(); lo += step) {
    const size_t count = std::min(step, tokens.size() - lo);
    for (size_t i = 0; i < count; ++i) {
      const std::byte* const from =
          table_.bytes.data() + tokens[lo + i] * width * DTypeBytes(table_.dtype);
      for (size_t e = 0; e < width; ++e) rows[i * width + e] = LoadAsFloat(from, e, table_.dtype);
    }
    QUARRY_RETURN_IF_ERROR(
        device_->Upload(y + lo * width, std::as_bytes(std::span(rows).first(count * width))));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelSpec> Model::SpecFor(uint32_t max_tokens, DType kv_dtype) const {
  ModelSpec spec;
  spec.name = name_;
  spec.shape = {config_.layers, config_.heads, config_.kv_heads, config_.head_dim, kv_dtype};
  spec.weights = weights_digest_;
  spec.tokenizer = tokenizer_digest_;
  QUARRY_ASSIGN_OR_RETURN(spec.rope, RopeFor(config_, max_tokens));
  return spec;
}

}  // namespace quarry
