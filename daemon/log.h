// Structured logs on standard error: one line per event, key=value or JSON.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "absl/status/status.h"

namespace quarry {

struct LogOptions {
  std::string level = "info";  // debug, info, warning, error
  enum class Format { kText, kJson } format = Format::kText;
};

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// One key=value pair of a line. Text is escaped; numbers and booleans stand as they are.
struct LogField {
  template <typename T>
  requires std::is_arithmetic_v<T> LogField(std::string_view k, T v) : key(k), value(Number(v)) {}
  LogField(std::string_view k, std::string_view v) : key(k), value(v), text(true) {}
  LogField(std::string_view k, const char* v) : LogField(k, std::string_view(v)) {}
  LogField(std::string_view k, const std::string& v) : LogField(k, std::string_view(v)) {}
  LogField(std::string_view k, const absl::Status& v) : key(k), value(v.ToString()), text(true) {}

  std::string_view key;
  std::string value;
  bool text = false;

 private:
  template <typename T>
  static std::string Number(T v) {
    if constexpr (std::is_same_v<T, bool>) {
      return v ? "true" : "false";
    } else {
      return std::to_string(v);
    }
  }
};

// Starts the writer. Lines go through a bounded queue to one thread of its own, so that a
// blocked terminal never stops the poller; when the queue is full the oldest lines are dropped.
absl::Status StartLog(const LogOptions& options);
// Writes what is queued and stops the writer.
void StopLog();

// Any thread; never blocks. Before StartLog, lines are dropped.
void Log(LogLevel level, std::string_view event, std::initializer_list<LogField> fields = {});

// For events a client can cause at will: at most kClientEventsPerSecond lines a second of all
// clients together; the next line that passes says how many were left out.
inline constexpr uint32_t kClientEventsPerSecond = 20;
void LogClientEvent(LogLevel level, std::string_view event,
                    std::initializer_list<LogField> fields = {});

// The line without its time stamp, as Log writes it.
std::string FormatLogLine(LogOptions::Format format, LogLevel level, std::string_view event,
                          std::initializer_list<LogField> fields);

}  // namespace quarry
