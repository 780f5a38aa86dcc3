// The only file that knows toml++.
#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "daemon/config.h"
#include "daemon/config_keys.h"
#include "proto/status_macros.h"
#include "toml++/toml.h"

namespace quarry {
namespace {

constexpr size_t kMaxConfigBytes = size_t{1} << 20;

absl::string_view View(std::string_view s) { return {s.data(), s.size()}; }

std::string Shown(const toml::node& node) {
  std::ostringstream out;
  node.visit([&](const auto& value) { out << value; });
  return out.str();
}

// Takes each known key out of the table; what is left over is unknown.
class Reader {
 public:
  explicit Reader(const toml::table& root) : root_(root) {}

  void Text(std::string_view key, std::string& out) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    if (const auto text = node->value_exact<std::string>()) {
      out = *text;
    } else {
      Bad(key, *node, "must be a string");
    }
  }
  void LevelName(std::string_view key, std::string& out) { Text(key, out); }

  void Flag(std::string_view key, bool& out) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    if (const auto flag = node->value_exact<bool>()) {
      out = *flag;
    } else {
      Bad(key, *node, "must be true or false");
    }
  }

  void Count(std::string_view key, uint32_t& out, uint32_t min, uint32_t max) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    const auto number = node->value_exact<int64_t>();
    if (number && *number >= int64_t{min} && *number <= int64_t{max}) {
      out = static_cast<uint32_t>(*number);
    } else {
      Bad(key, *node, absl::StrCat("must be an integer from ", min, " to ", max));
    }
  }

  void Number(std::string_view key, double& out, double min, double max) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    const auto number = node->is_number() ? node->value<double>() : std::nullopt;
    if (number && *number >= min && *number <= max) {
      out = *number;
    } else {
      Bad(key, *node, absl::StrCat("must be a number from ", min, " to ", max));
    }
  }

  void Bytes(std::string_view key, uint64_t& out, uint64_t min, uint64_t max) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    absl::StatusOr<uint64_t> bytes = absl::InvalidArgumentError("");
    if (const auto number = node->value_exact<int64_t>(); number && *number >= 0) {
      bytes = static_cast<uint64_t>(*number);
    } else if (const auto text = node->value_exact<std::string>()) {
      bytes = ParseBytes(*text);
    }
    if (bytes.ok() && *bytes >= min && *bytes <= max) {
      out = *bytes;
    } else {
      Bad(key, *node,
          absl::StrCat("must be a size from \"", PrintBytes(min), "\" to \"", PrintBytes(max),
                       "\", as an integer of bytes or a string with B, KiB, MiB, GiB or TiB"));
    }
  }

  void Mode(std::string_view key, mode_t& out) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    const auto text = node->value_exact<std::string>();
    mode_t mode = 0;
    bool octal = text && !text->empty() && text->size() <= 4;
    for (size_t i = 0; octal && i < text->size(); ++i) {
      octal = (*text)[i] >= '0' && (*text)[i] <= '7';
      mode = mode * 8 + static_cast<mode_t>((*text)[i] - '0');
    }
    if (octal) {
      out = mode;
    } else {
      Bad(key, *node, "must be a string with an octal file mode, e.g. \"0660\"");
    }
  }

  template <typename E>
  void Choice(std::string_view key, E& out, std::initializer_list<std::string_view> names) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    const auto text = node->value_exact<std::string>();
    std::string allowed;
    for (size_t i = 0; i < names.size(); ++i) {
      const std::string_view name = names.begin()[i];
      if (text && *text == name) {
        out = static_cast<E>(i);
        return;
      }
      absl::StrAppend(&allowed, allowed.empty() ? "\"" : " or \"", View(name), "\"");
    }
    Bad(key, *node, absl::StrCat("must be ", allowed));
  }

  void Users(std::string_view key, std::map<uid_t, std::string>& out) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    const toml::table* table = node->as_table();
    if (table == nullptr) return Bad(key, *node, "must be a table of user id = \"tenant\"");
    out.clear();
    for (const auto& [name, value] : *table) {
      uid_t uid = 0;
      const auto tenant = value.value_exact<std::string>();
      if (!absl::SimpleAtoi(View(name.str()), &uid) || !tenant) {
        return Bad(absl::StrCat(View(key), ".", View(name.str())), value,
                   "must be numeric user id = \"tenant\"");
      }
      out[uid] = *tenant;
    }
  }

  void UserSet(std::string_view key, std::set<uid_t>& out) {
    const toml::node* node = Find(key);
    if (node == nullptr) return;
    const toml::array* array = node->as_array();
    if (array == nullptr) return Bad(key, *node, "must be an array of user ids");
    out.clear();
    for (const toml::node& entry : *array) {
      const auto uid = entry.value_exact<int64_t>();
      if (!uid || *uid < 0 || *uid > UINT32_MAX) return Bad(key, entry, "must be a user id");
      out.insert(static_cast<uid_t>(*uid));
    }
  }

  // The first wrong value, else the first unknown key.
  absl::Status Finish() const {
    QUARRY_RETURN_IF_ERROR(status_);
    for (const auto& [section, node] : root_) {
      bool known_section = false;
      const std::string prefix = absl::StrCat(View(section.str()), ".");
      for (const std::string& key : known_) known_section |= key.rfind(prefix, 0) == 0;
      if (!known_section) return Unknown(section.str(), node);
      const toml::table* table = node.as_table();
      if (table == nullptr) {
        return Wrong(section.str(), node,
                     absl::StrCat("must be a table, [", View(section.str()), "]"));
      }
      for (const auto& [name, value] : *table) {
        const std::string key = absl::StrCat(prefix, View(name.str()));
        if (!known_.contains(key)) return Unknown(key, value);
      }
    }
    return absl::OkStatus();
  }

 private:
  const toml::node* Find(std::string_view key) {
    known_.insert(std::string(key));
    const size_t dot = key.find('.');
    const toml::node* section = root_.get(key.substr(0, dot));
    const toml::table* table = section == nullptr ? nullptr : section->as_table();
    return table == nullptr ? nullptr : table->get(key.substr(dot + 1));
  }

  void Bad(std::string_view key, const toml::node& node, std::string_view why) {
    status_.Update(Wrong(key, node, why));
  }
  static absl::Status Unknown(std::string_view key, const toml::node& node) {
    return Wrong(key, node, "unknown key");
  }
  static absl::Status Wrong(std::string_view key, const toml::node& node, std::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat(
        "line ", node.source().begin.line, ": ", View(key), " = ", Shown(node), ": ", View(why)));
  }

  const toml::table& root_;
  std::set<std::string> known_;
  absl::Status status_;
};

// A line of the text, counted from 1, for errors of what is not TOML to name its key.
std::string LineOf(std::string_view text, uint32_t number) {
  constexpr size_t kMostShown = 100;
  for (; number > 1 && !text.empty(); --number) {
    text.remove_prefix(std::min(text.size(), text.find('\n') + 1));
  }
  const absl::string_view line = absl::StripAsciiWhitespace(View(text.substr(0, text.find('\n'))));
  return absl::CHexEscape(line.substr(0, kMostShown));
}

absl::Status At(std::string_view origin, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(View(origin), ": ", status.message()));
}

}  // namespace

absl::StatusOr<Config> ParseConfig(std::string_view text, std::string_view origin) {
  toml::table root;
  try {
    root = toml::parse(text, origin);
  } catch (const toml::parse_error& error) {
    const uint32_t line = error.source().begin.line;
    return At(origin, absl::InvalidArgumentError(absl::StrCat(
                          "line ", line, ": ", LineOf(text, line), ": ",
                          View(error.description()))));
  }
  Config config = DefaultConfig();
  Reader reader(root);
  VisitConfigKeys(reader, config);
  if (absl::Status status = reader.Finish(); !status.ok()) return At(origin, status);
  if (absl::Status status = ValidateConfig(config); !status.ok()) return At(origin, status);
  return config;
}

absl::StatusOr<Config> ReadConfig(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("cannot read the configuration file ", path));
  }
  // A directory opens too, and only reading fails; a device may never end.
  std::string text(kMaxConfigBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad() || (file.fail() && !file.eof())) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot read the configuration file ", path, ": not a regular file?"));
  }
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kMaxConfigBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the configuration file ", path,
                                                   " has more than ", kMaxConfigBytes, " bytes"));
  }
  return ParseConfig(text, path);
}

}  // namespace quarry
