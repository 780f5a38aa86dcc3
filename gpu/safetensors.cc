#include "gpu/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr uint64_t kMaxElements = uint64_t{1} << 48;

uint64_t ElementBytes(TensorDType dtype) {
  switch (dtype) {
    case TensorDType::kBf16:
    case TensorDType::kFp16:
      return 2;
    case TensorDType::kFp32:
    case TensorDType::kInt32:
      return 4;
    case TensorDType::kInt64:
      return 8;
  }
  return 0;
}

constexpr std::pair<std::string_view, TensorDType> kDTypeNames[] = {
    {"BF16", TensorDType::kBf16},  {"F16", TensorDType::kFp16},  {"F32", TensorDType::kFp32},
    {"I32", TensorDType::kInt32},  {"I64", TensorDType::kInt64}};

std::optional<TensorDType> DTypeOf(std::string_view name) {
  for (const auto& [known, dtype] : kDTypeNames) {
    if (name == known) return dtype;
  }
  return std::nullopt;
}

std::string_view NameOf(TensorDType dtype) {
  for (const auto& [name, known] : kDTypeNames) {
    if (dtype == known) return name;
  }
  return "?";
}

absl::Status Bad(const std::string& path, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
}

// A JSON parser that refuses what nlohmann would silently merge: a name given twice.
absl::StatusOr<nlohmann::json> ParseJson(const std::string& path, std::string_view text) {
  std::vector<std::set<std::string>> names;
  std::string duplicate;
  const auto watch = [&](int, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    if (event == nlohmann::json::parse_event_t::object_start) names.emplace_back();
    if (event == nlohmann::json::parse_event_t::object_end) names.pop_back();
    if (event == nlohmann::json::parse_event_t::key &&
        !names.back().insert(value.get<std::string>()).second) {
      duplicate = value.get<std::string>();
    }
    return true;
  };
  nlohmann::json json = nlohmann::json::parse(text.begin(), text.end(), watch, false);
  if (json.is_discarded() || !json.is_object()) return Bad(path, "not a JSON object");
  if (!duplicate.empty()) return Bad(path, absl::StrCat("the name ", duplicate, " stands twice"));
  return json;
}

bool IsCount(const nlohmann::json& x) { return x.is_number_unsigned(); }

// The entry of one tensor, checked against the size of the data behind the header.
absl::StatusOr<TensorView> ParseTensor(const std::string& path, const std::string& name,
                                       const nlohmann::json& entry,
                                       std::span<const std::byte> data) {
  const auto bad = [&](const std::string& what) {
    return Bad(path, absl::StrCat("tensor ", name, ": ", what));
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
      !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
      !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2) {
    return bad("needs dtype, shape and two data_offsets");
  }
  TensorView tensor;
  const std::string dtype = entry["dtype"].get<std::string>();
  const std::optional<TensorDType> known = DTypeOf(dtype);
  if (!known) return bad(absl::StrCat("dtype ", dtype, " is not BF16, F16, F32, I32 or I64"));
  tensor.dtype = *known;
  uint64_t elements = 1;
  for (const nlohmann::json& d : entry["shape"]) {
    if (!IsCount(d)) return bad("a dimension is not a count");
    const uint64_t size = d.get<uint64_t>();
    if (size != 0 && elements > kMaxElements / size) return bad("the shape is too large");
    elements *= size;
    tensor.shape.push_back(size);
  }
  const nlohmann::json& offsets = entry["data_offsets"];
  if (!IsCount(offsets[0]) || !IsCount(offsets[1])) return bad("data_offsets are not counts");
  const uint64_t lo = offsets[0].get<uint64_t>(), hi = offsets[1].get<uint64_t>();
  if (lo > hi || hi > data.size()) {
    return bad(absl::StrCat("bytes [", lo, ", ", hi, ") of ", data.size()));
  }
  if (hi - lo != elements * ElementBytes(tensor.dtype)) {
    return bad(absl::StrCat(hi - lo, " bytes for ", elements, " elements of ", dtype));
  }
  tensor.bytes = data.subspan(lo, hi - lo);
  return tensor;
}

}  // namespace

uint64_t TensorView::elements() const {
  uint64_t n = 1;
  for (uint64_t d : shape) n *= d;
  return n;
}

float TensorView::at(uint64_t i) const {
  switch (dtype) {
    case TensorDType::kBf16:
      return LoadAsFloat(bytes.data(), i, DType::kBf16);
    case TensorDType::kFp16:
      return LoadAsFloat(bytes.data(), i, DType::kFp16);
    case TensorDType::kFp32:
      return LoadAsFloat(bytes.data(), i, DType::kFp32);
    case TensorDType::kInt32:
    case TensorDType::kInt64:
      return static_cast<float>(integer(i));
  }
  return 0;
}

int64_t TensorView::integer(uint64_t i) const {
  if (dtype == TensorDType::kInt32) {
    int32_t x;
    std::memcpy(&x, bytes.data() + i * sizeof(x), sizeof(x));
    return x;
  }
  int64_t x;
  std::memcpy(&x, bytes.data() + i * sizeof(x), sizeof(x));
  return x;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  auto file = std::unique_ptr<SafetensorsFile>(new SafetensorsFile);
  file->path_ = path;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  struct stat info {};
  void* at = MAP_FAILED;
  if (fstat(fd, &info) == 0 && info.st_size > 0) {
    at = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
  }
  close(fd);
  if (at == MAP_FAILED)
    return Bad(path, absl::StrCat("cannot be mapped, ", info.st_size, " bytes"));
  file->file_ = {static_cast<const std::byte*>(at), static_cast<size_t>(info.st_size)};
  QUARRY_RETURN_IF_ERROR(file->Parse());
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (!file_.empty()) munmap(const_cast<std::byte*>(file_.data()), file_.size());
}

absl::Status SafetensorsFile::Parse() {
  if (file_.size() < 8) return Bad(path_, absl::StrCat("only ", file_.size(), " bytes long"));
  uint64_t header_bytes;
  std::memcpy(&header_bytes, file_.data(), 8);
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_.size() - 8) {
    return Bad(path_,
               absl::StrCat("a header of ", header_bytes, " bytes in a file of ", file_.size()));
  }
  const std::string_view text(reinterpret_cast<const char*>(file_.data()) + 8, header_bytes);
  QUARRY_ASSIGN_OR_RETURN(nlohmann::json json, ParseJson(path_, text));
  const std::span<const std::byte> data = file_.subspan(8 + header_bytes);
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return Bad(path_, "__metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (value.is_string()) metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    QUARRY_ASSIGN_OR_RETURN(TensorView tensor, ParseTensor(path_, name, entry, data));
    const uint64_t lo = static_cast<uint64_t>(tensor.bytes.data() - data.data());
    spans.emplace_back(lo, lo + tensor.bytes.size());
    tensors_.emplace(name, std::move(tensor));
  }
  std::sort(spans.begin(), spans.end());
  uint64_t end = 0;
  for (const auto& [lo, hi] : spans) {
    if (lo != end) {
      return Bad(path_,
                 absl::StrCat("tensors overlap or leave a hole at byte ", std::min(lo, end)));
    }
    end = hi;
  }
  if (end != data.size()) {
    return Bad(path_, absl::StrCat("tensors end at byte ", end, " of ", data.size()));
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorView> SafetensorsFile::Find(std::string_view name) const {
  auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(path_, ": no tensor ", std::string(name)));
  }
  return it->second;
}

absl::Status WriteSafetensors(const std::string& path,
                              std::span<const std::pair<std::string, TensorView>> tensors,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::json header = {{"__metadata__", metadata}};
  uint64_t end = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t bytes = tensor.elements() * ElementBytes(tensor.dtype);
    if (bytes != tensor.bytes.size()) {
      return Bad(path, absl::StrCat("tensor ", name, ": ", tensor.bytes.size(), " bytes for ",
                                    tensor.elements(), " elements"));
    }
    header[name] = {{"dtype", NameOf(tensor.dtype)},
                    {"shape", tensor.shape},
                    {"data_offsets", {end, end + bytes}}};
    end += bytes;
  }
  // Bytes that are no UTF-8 are replaced rather than thrown at.
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // tensors begin at a multiple of 8
  const uint64_t header_bytes = text.size();
  const std::string part = path + ".part";
  std::ofstream out(part, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  out << text;
  for (const auto& [name, tensor] : tensors) {
    out.write(reinterpret_cast<const char*>(tensor.bytes.data()),
              static_cast<std::streamsize>(tensor.bytes.size()));
  }
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(part, path, error);
  if (out && !error) return absl::OkStatus();
  std::filesystem::remove(part, error);
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written, ", end, " bytes"));
}

absl::StatusOr<WeightFiles> WeightFiles::Open(const std::string& directory) {
  WeightFiles out;
  std::set<std::string> names;
  const std::string index_path = directory + "/model.safetensors.index.json";
  nlohmann::json weight_map;
  if (std::filesystem::exists(index_path)) {
    std::ifstream in(index_path);
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    QUARRY_ASSIGN_OR_RETURN(nlohmann::json index, ParseJson(index_path, text));
    weight_map = index.value("weight_map", nlohmann::json());
    if (!weight_map.is_object() || weight_map.empty()) return Bad(index_path, "no weight_map");
    for (const auto& [tensor, file] : weight_map.items()) {
      if (!file.is_string() || file.get<std::string>().find('/') != std::string::npos) {
        return Bad(index_path, absl::StrCat("tensor ", tensor, " names no file of this folder"));
      }
      names.insert(file.get<std::string>());
    }
  } else {
    names.insert("model.safetensors");
  }
  for (const std::string& name : names) {
    QUARRY_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                            SafetensorsFile::Open(directory + "/" + name));
    for (const auto& [tensor, view] : file->tensors()) {
      if (!out.where_.emplace(tensor, file.get()).second) {
        return Bad(file->path(), absl::StrCat("tensor ", tensor, " is in another file too"));
      }
    }
    out.files_.push_back(std::move(file));
  }
  if (!weight_map.is_null()) {
    for (const auto& [tensor, file] : weight_map.items()) {
      const auto found = out.where_.find(tensor);
      const std::string name = file.get<std::string>();
      if (found == out.where_.end() || found->second->path() != directory + "/" + name) {
        return Bad(index_path, absl::StrCat("tensor ", tensor, " is not in ", name));
      }
    }
  }
  return out;
}

absl::StatusOr<TensorView> WeightFiles::Find(std::string_view name) const {
  auto it = where_.find(name);
  if (it == where_.end()) {
    return absl::NotFoundError(absl::StrCat("the model has no tensor ", std::string(name)));
  }
  return it->second->Find(name);
}

}  // namespace quarry
