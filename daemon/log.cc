#include "daemon/log.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "spdlog/async.h"
#include "spdlog/async_logger.h"
#include "spdlog/sinks/base_sink.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace quarry {
namespace {

constexpr size_t kQueueLines = 8192;

struct Writer {
  std::shared_ptr<spdlog::details::thread_pool> pool;
  std::shared_ptr<spdlog::async_logger> logger;
  LogOptions::Format format = LogOptions::Format::kText;
};
// Set by StartLog before other threads exist, cleared by StopLog after they have gone.
std::atomic<Writer*> writer{nullptr};

std::string_view LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "info";
}

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

// Quoted with JSON's escapes; control bytes and bytes above ASCII never reach a terminal raw.
void AppendQuoted(std::string* out, std::string_view text) {
  out->push_back('"');
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out->push_back('\\');
      out->push_back(c);
    } else if (c == '\n') {
      out->append("\\n");
    } else if (byte < 0x20 || byte >= 0x7f) {
      absl::StrAppendFormat(out, "\\u%04x", byte);
    } else {
      out->push_back(c);
    }
  }
  out->push_back('"');
}

bool NeedsQuotes(std::string_view text) {
  if (text.empty()) return true;
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte <= 0x20 || byte >= 0x7f || c == '"' || c == '=' || c == '\\') return true;
  }
  return false;
}

std::string TextLine(LogLevel level, std::string_view event,
                     std::initializer_list<LogField> fields) {
  std::string line;
  line.append("level=").append(LevelName(level)).append(" event=");
  AppendQuoted(&line, event);
  for (const LogField& field : fields) {
    line.append(" ").append(field.key).append("=");
    if (field.text && NeedsQuotes(field.value)) {
      AppendQuoted(&line, field.value);
    } else {
      line.append(field.value);
    }
  }
  return line;
}

std::string JsonLine(LogLevel level, std::string_view event,
                     std::initializer_list<LogField> fields) {
  std::string line = "\"level\":";
  AppendQuoted(&line, LevelName(level));
  line.append(",\"event\":");
  AppendQuoted(&line, event);
  for (const LogField& field : fields) {
    line.push_back(',');
    AppendQuoted(&line, field.key);
    line.push_back(':');
    if (field.text || field.value == "nan" || field.value == "inf" || field.value == "-inf") {
      AppendQuoted(&line, field.value);
    } else {
      line.append(field.value);
    }
  }
  line.push_back('}');
  return line;
}

// Allows kClientEventsPerSecond lines in each second.
class EventLimit {
 public:
  // Returns whether the line may pass and how many were held back before it.
  bool Admit(uint64_t* held_back) {
    const std::lock_guard lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    if (now - second_start_ >= std::chrono::seconds(1)) {
      second_start_ = now;
      passed_ = 0;
    }
    if (passed_ >= kClientEventsPerSecond) {
      ++held_back_;
      return false;
    }
    ++passed_;
    *held_back = held_back_;
    held_back_ = 0;
    return true;
  }

 private:
  std::mutex mutex_;
  std::chrono::steady_clock::time_point second_start_{};
  uint32_t passed_ = 0;
  uint64_t held_back_ = 0;
};

// Passes a library's lines on to Log.
class ForwardingSink final : public spdlog::sinks::base_sink<std::mutex> {
 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    const LogLevel level = message.level >= spdlog::level::err    ? LogLevel::kError
                           : message.level == spdlog::level::warn ? LogLevel::kWarning
                           : message.level == spdlog::level::info ? LogLevel::kInfo
                                                                  : LogLevel::kDebug;
    Log(level, {message.payload.data(), message.payload.size()});
  }
  void flush_() override {}
};

}  // namespace

std::string FormatLogLine(LogOptions::Format format, LogLevel level, std::string_view event,
                          std::initializer_list<LogField> fields) {
  return format == LogOptions::Format::kJson ? JsonLine(level, event, fields)
                                             : TextLine(level, event, fields);
}

absl::Status StartLog(const LogOptions& options) {
  if (writer.load() != nullptr) return absl::FailedPreconditionError("the log is already started");
  auto fresh = std::make_unique<Writer>();
  fresh->format = options.format;
  fresh->pool = std::make_shared<spdlog::details::thread_pool>(kQueueLines, 1);
  fresh->logger = std::make_shared<spdlog::async_logger>(
      "quarryd", std::make_shared<spdlog::sinks::stderr_sink_mt>(), fresh->pool,
      spdlog::async_overflow_policy::overrun_oldest);
  fresh->logger->set_level(spdlog::level::from_str(options.level));
  fresh->logger->flush_on(spdlog::level::debug);
  fresh->logger->set_pattern(options.format == LogOptions::Format::kJson
                                 ? "{\"time\":\"%Y-%m-%dT%H:%M:%S.%fZ\",%v"
                                 : "time=%Y-%m-%dT%H:%M:%S.%fZ %v",
                             spdlog::pattern_time_type::utc);
  writer.store(fresh.release());
  // What storage and the engine log by themselves becomes a line like any other.
  auto library = std::make_shared<spdlog::logger>("library", std::make_shared<ForwardingSink>());
  library->set_level(ToSpdlog(LogLevel::kDebug));
  spdlog::set_default_logger(std::move(library));
  return absl::OkStatus();
}

void StopLog() {
  std::unique_ptr<Writer> last(writer.exchange(nullptr));
  if (last == nullptr) return;
  last->logger->flush();
  last->logger.reset();
  last->pool.reset();  // joins the writer after the queue is empty
}

void Log(LogLevel level, std::string_view event, std::initializer_list<LogField> fields) {
  Writer* current = writer.load(std::memory_order_acquire);
  if (current == nullptr || !current->logger->should_log(ToSpdlog(level))) return;
  const std::string line = FormatLogLine(current->format, level, event, fields);
  current->logger->log(ToSpdlog(level), spdlog::string_view_t(line.data(), line.size()));
}

void LogClientEvent(LogLevel level, std::string_view event,
                    std::initializer_list<LogField> fields) {
  static EventLimit& limit = *new EventLimit();
  uint64_t held_back = 0;
  if (!limit.Admit(&held_back)) return;
  if (held_back > 0) Log(LogLevel::kWarning, "client events left out", {{"count", held_back}});
  Log(level, event, fields);
}

}  // namespace quarry
