// Pattern files: reading and writing (pattern.h).
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "gpu/sparse/pattern.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

using nlohmann::json;

constexpr const char* kFormat = "quarry.prefill-patterns.v1";
constexpr uint32_t kMostLayersOrHeads = 4096;

absl::Status Bad(const std::string& field, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("pattern file: ", field, " ", what));
}

// One object of the file, by the way to it.
class Object {
 public:
  static absl::StatusOr<Object> Of(const json& value, std::string way,
                                   const std::vector<std::string_view>& keys) {
    if (!value.is_object()) return Bad(way.empty() ? "the whole" : way, "is no object");
    Object out(value, std::move(way));
    for (const auto& [key, unused] : value.items()) {
      if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
        return Bad(out.Field(key), "is not known");
      }
    }
    return out;
  }

  bool Has(const char* key) const { return value_.contains(key); }
  std::string Field(std::string_view key) const {
    return way_.empty() ? std::string(key) : absl::StrCat(way_, ".", std::string(key));
  }
  absl::StatusOr<std::string> Text(const char* key) const {
    QUARRY_RETURN_IF_ERROR(Need(key));
    if (!value_[key].is_string()) return Bad(Field(key), "is no text");
    return value_[key].get<std::string>();
  }
  absl::StatusOr<uint32_t> Count(const char* key, uint32_t most) const {
    QUARRY_RETURN_IF_ERROR(Need(key));
    const json& v = value_[key];
    if (!v.is_number_integer()) return Bad(Field(key), "is no whole number");
    if (!v.is_number_unsigned() || v.get<uint64_t>() > most) {
      return Bad(Field(key), absl::StrCat(v.dump(), " is not from 0 to ", most));
    }
    return static_cast<uint32_t>(v.get<uint64_t>());
  }
  absl::StatusOr<double> Number(const char* key) const {
    QUARRY_RETURN_IF_ERROR(Need(key));
    if (!value_[key].is_number()) return Bad(Field(key), "is no number");
    return value_[key].get<double>();
  }

 private:
  Object(const json& value, std::string way) : value_(value), way_(std::move(way)) {}
  absl::Status Need(const char* key) const {
    return Has(key) ? absl::OkStatus() : Bad(Field(key), "is missing");
  }
  const json& value_;
  std::string way_;
};

absl::StatusOr<Pattern> ReadPattern(const json& value, const std::string& way,
                                    const std::string& name) {
  const auto object = [&](std::vector<std::string_view> keys) {
    keys.insert(keys.end(), {"pattern", "expected"});
    return Object::Of(value, way, keys);
  };
  if (name == "dense") {
    QUARRY_RETURN_IF_ERROR(object({}).status());
    return DensePattern{};
  }
  if (name == "a_shape") {
    QUARRY_ASSIGN_OR_RETURN(const Object o, object({"sinks", "local"}));
    AShapePattern p;
    QUARRY_ASSIGN_OR_RETURN(p.sinks, o.Count("sinks", kMostPatternCount));
    QUARRY_ASSIGN_OR_RETURN(p.local, o.Count("local", kMostPatternCount));
    return p;
  }
  if (name == "vertical_slash" && (value.contains("mass") || value.contains("max_tiles_share"))) {
    QUARRY_ASSIGN_OR_RETURN(const Object o, object({"mass", "max_tiles_share"}));
    VerticalSlashMassPattern p;
    QUARRY_ASSIGN_OR_RETURN(p.mass, o.Number("mass"));
    QUARRY_ASSIGN_OR_RETURN(p.max_tiles_share, o.Number("max_tiles_share"));
    return p;
  }
  if (name == "vertical_slash") {
    QUARRY_ASSIGN_OR_RETURN(const Object o, object({"columns", "slashes"}));
    VerticalSlashPattern p;
    QUARRY_ASSIGN_OR_RETURN(p.columns, o.Count("columns", kMostPatternCount));
    QUARRY_ASSIGN_OR_RETURN(p.slashes, o.Count("slashes", kMostPatternCount));
    return p;
  }
  if (name == "block_sparse") {
    QUARRY_ASSIGN_OR_RETURN(const Object o, object({"blocks"}));
    BlockSparsePattern p;
    QUARRY_ASSIGN_OR_RETURN(p.blocks, o.Count("blocks", kMostPatternCount));
    return p;
  }
  if (name == "block_scored") {
    QUARRY_ASSIGN_OR_RETURN(const Object o, object({"threshold"}));
    BlockScoredPattern p;
    QUARRY_ASSIGN_OR_RETURN(p.threshold, o.Number("threshold"));
    return p;
  }
  return Bad(way + ".pattern", absl::StrCat("\"", name.substr(0, 64), "\" is not known"));
}

absl::StatusOr<HeadPattern> ReadHead(const json& value, const std::string& way) {
  if (!value.is_object()) return Bad(way, "is no object");
  if (!value.contains("pattern")) return Bad(way + ".pattern", "is missing");
  if (!value["pattern"].is_string()) return Bad(way + ".pattern", "is no text");
  HeadPattern out;
  QUARRY_ASSIGN_OR_RETURN(out.pattern,
                          ReadPattern(value, way, value["pattern"].get<std::string>()));
  if (absl::Status s = ValidatePattern(out.pattern); !s.ok()) {
    return Bad(absl::StrCat(way, ".", std::string(s.message())), "");
  }
  if (!value.contains("expected")) return out;
  QUARRY_ASSIGN_OR_RETURN(
      const Object o, Object::Of(value["expected"], way + ".expected", {"tiles_share", "error"}));
  for (auto [key, to] : {std::pair{"tiles_share", &out.tiles_share}, {"error", &out.error}}) {
    QUARRY_ASSIGN_OR_RETURN(*to, o.Number(key));
    if (!(*to >= 0) || !std::isfinite(*to)) return Bad(o.Field(key), "is below 0 or not finite");
  }
  return out;
}

json HeadOf(const HeadPattern& head) {
  json out = {{"pattern", PatternName(head.pattern)}};
  if (const auto* p = std::get_if<AShapePattern>(&head.pattern)) {
    out["sinks"] = p->sinks;
    out["local"] = p->local;
  } else if (const auto* p = std::get_if<VerticalSlashPattern>(&head.pattern)) {
    out["columns"] = p->columns;
    out["slashes"] = p->slashes;
  } else if (const auto* p = std::get_if<VerticalSlashMassPattern>(&head.pattern)) {
    out["mass"] = p->mass;
    out["max_tiles_share"] = p->max_tiles_share;
  } else if (const auto* p = std::get_if<BlockSparsePattern>(&head.pattern)) {
    out["blocks"] = p->blocks;
  } else if (const auto* p = std::get_if<BlockScoredPattern>(&head.pattern)) {
    out["threshold"] = p->threshold;
  }
  if (head.tiles_share >= 0 && head.error >= 0) {
    out["expected"] = {{"tiles_share", head.tiles_share}, {"error", head.error}};
  }
  return out;
}

}  // namespace

absl::StatusOr<PatternFile> ParsePatterns(std::string_view text) {
  // Of a key that stands twice the parser would keep the last one, silently.
  std::vector<std::vector<std::string>> open;
  std::string twice;
  const auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) open.emplace_back();
    if (event == json::parse_event_t::object_end) open.pop_back();
    if (event == json::parse_event_t::key) {
      const auto key = parsed.get<std::string>();
      for (const std::string& known : open.back()) {
        if (known == key) twice = key;
      }
      open.back().push_back(key);
    }
    return true;
  };
  const json whole = json::parse(text, watch, /*allow_exceptions=*/false);
  if (whole.is_discarded()) return Bad("the whole", "is not JSON");
  if (!twice.empty()) return Bad(twice, "stands twice in one object");
  QUARRY_ASSIGN_OR_RETURN(
      const Object o, Object::Of(whole, "", {"format", "model", "layers", "heads", "patterns"}));
  QUARRY_ASSIGN_OR_RETURN(const std::string format, o.Text("format"));
  if (format != kFormat) return Bad("format", absl::StrCat("is not \"", kFormat, "\""));
  PatternFile out;
  QUARRY_ASSIGN_OR_RETURN(out.model, o.Text("model"));
  QUARRY_ASSIGN_OR_RETURN(out.layers, o.Count("layers", kMostLayersOrHeads));
  QUARRY_ASSIGN_OR_RETURN(out.heads, o.Count("heads", kMostLayersOrHeads));
  if (out.layers == 0) return Bad("layers", "is 0");
  if (out.heads == 0) return Bad("heads", "is 0");
  if (!o.Has("patterns")) return Bad("patterns", "is missing");
  const json& layers = whole["patterns"];
  if (!layers.is_array()) return Bad("patterns", "is no array");
  if (layers.size() != out.layers) {
    return Bad("patterns", absl::StrCat("has ", layers.size(), " layers of ", out.layers));
  }
  for (uint32_t l = 0; l < out.layers; ++l) {
    const std::string way = absl::StrCat("patterns[", l, "]");
    if (!layers[l].is_array()) return Bad(way, "is no array");
    if (layers[l].size() != out.heads) {
      return Bad(way, absl::StrCat("has ", layers[l].size(), " heads of ", out.heads));
    }
    for (uint32_t h = 0; h < out.heads; ++h) {
      QUARRY_ASSIGN_OR_RETURN(HeadPattern head,
                              ReadHead(layers[l][h], absl::StrCat(way, "[", h, "]")));
      out.patterns.push_back(std::move(head));
    }
  }
  return out;
}

std::string WritePatterns(const PatternFile& file) {
  // A name that is no UTF-8 is written with replacements.
  const std::string model = json(file.model).dump(-1, ' ', false, json::error_handler_t::replace);
  std::string out = absl::StrCat("{\"format\": \"", kFormat, "\",\n \"heads\": ", file.heads,
                                 ",\n \"layers\": ", file.layers, ",\n \"model\": ", model,
                                 ",\n \"patterns\": [");
  for (uint32_t l = 0; l < file.layers; ++l) {
    absl::StrAppend(&out, l == 0 ? "\n  [" : ",\n  [");
    for (uint32_t h = 0; h < file.heads; ++h) {
      absl::StrAppend(&out, h == 0 ? "" : ",\n   ", HeadOf(file.At(l, h)).dump());
    }
    absl::StrAppend(&out, "]");
  }
  absl::StrAppend(&out, "]}\n");
  return out;
}

absl::StatusOr<PatternFile> LoadPatterns(const std::string& path) {
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  // A directory opens, and only reading fails.
  if (!in || !(text << in.rdbuf())) {
    return absl::ErrnoToStatus(errno != 0 ? errno : EIO, absl::StrCat("cannot read ", path));
  }
  absl::StatusOr<PatternFile> file = ParsePatterns(text.str());
  if (file.ok()) return file;
  return absl::Status(file.status().code(),
                      absl::StrCat(path, ": ", std::string(file.status().message())));
}

absl::Status SavePatterns(const PatternFile& file, const std::string& path) {
  const std::string part = path + ".part";
  errno = 0;
  std::ofstream out(part, std::ios::binary | std::ios::trunc);
  out << WritePatterns(file);
  out.close();
  // A reader sees the whole file or the one before it.
  if (out && std::rename(part.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const int error = errno != 0 ? errno : EIO;
  std::remove(part.c_str());
  return absl::ErrnoToStatus(error, absl::StrCat("cannot write ", path));
}

}  // namespace quarry
