#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <ostream>
#include <string>
#include <string_view>
#include <unistd.h>
#include <utility>

namespace demo {

/// Whether standard error is a terminal that understands a line being drawn again.
[[nodiscard]] inline bool error_stream_is_terminal() {
  const char* kind = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) != 0 && kind != nullptr && std::string_view(kind) != "dumb";
}

/// A length of time for people: "8 s", "1:05", "2:00:09".
[[nodiscard]] inline std::string duration_text(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0 || seconds > 1e9) return "?";
  const auto whole = static_cast<long>(std::lround(seconds));
  if (whole < 60) return std::to_string(whole) + " s";
  char text[32];
  if (whole < 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return text;
}

/// A rate or count with three figures that mean something: "0.52", "87.1", "1.93k", "24.0M".
[[nodiscard]] inline std::string short_number(double value) {
  if (!std::isfinite(value)) return "?";
  const char* suffix = "";
  for (const char* next : {"k", "M", "G"}) {
    if (std::fabs(value) < 999.5) break;
    value /= 1000;
    suffix = next;
  }
  const double size = std::fabs(value);
  char text[32];
  std::snprintf(text, sizeof text, "%.*f%s",
                size < 9.995   ? 2
                : size < 99.95 ? 1
                               : 0,
                value, suffix);
  return text;
}

struct progress_options {
  std::string unit = "bytes";  // of the counts, in the rate
  std::int64_t first = 0;      // what an earlier run had done already
  bool terminal = error_stream_is_terminal();
  double redraw_seconds = 0.1;  // between two drawings of the line on a terminal
  double line_seconds = 15.0;   // between two plain lines
  std::size_t width = 79;       // columns of the drawn line
  std::ostream* stream = &std::cerr;
  std::function<double()> clock = [] {  // seconds from any fixed moment
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  };
};

/// Shows how far a stage is: one line drawn again and again on a terminal, else a line now and
/// then.
///
/// The rate is the mean since the start; the time left assumes that it stays so. The destructor
/// ends a drawn line, so that an error message starts on its own line.
class progress {
 public:
  /// @param stage  what is going on, first on the line.
  /// @param total  the count at which the stage is finished, more than 0.
  progress(std::string stage, std::int64_t total, progress_options options = {})
      : stage_(std::move(stage)),
        total_(total),
        options_(std::move(options)),
        start_(options_.clock()),
        last_shown_(start_) {}

  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() {
    if (drawn_) *options_.stream << '\n' << std::flush;
  }

  /// Says that `done` of the total are done; a loss that is not a number is left out.
  void update(std::int64_t done, double loss = std::nan("")) {
    if (finished_) return;
    done_ = done;
    loss_ = loss;
    const double now = options_.clock();
    const double wait = options_.terminal ? options_.redraw_seconds : options_.line_seconds;
    if (now - last_shown_ < wait) return;
    last_shown_ = now;
    show(line(now - start_, false));
  }

  /// Shows the last state once more with the time that the stage took; only the first call counts.
  void finish() {
    if (std::exchange(finished_, true)) return;
    show(line(options_.clock() - start_, true));
    if (std::exchange(drawn_, false)) *options_.stream << '\n' << std::flush;
  }

 private:
  [[nodiscard]] std::string line(double elapsed, bool last) const {
    const auto done_now = static_cast<double>(done_ - options_.first);
    const double rate = elapsed > 0 ? done_now / elapsed : 0.0;
    const auto percent = total_ > 0 ? 100 * done_ / total_ : 100;
    std::string text = stage_ + "  " + std::to_string(percent) + " %";
    if (std::isfinite(loss_)) {
      char loss[32];
      std::snprintf(loss, sizeof loss, "  loss %.4f", loss_);
      text += loss;
    }
    if (rate > 0) text += "  " + short_number(rate) + " " + options_.unit + "/s";
    if (last) {
      text += "  took " + duration_text(elapsed);
    } else if (rate > 0) {
      text += "  " + duration_text(static_cast<double>(total_ - done_) / rate) + " left";
    }
    return text;
  }

  void show(std::string text) {
    if (!options_.terminal) {
      *options_.stream << text << '\n' << std::flush;
      return;
    }
    if (text.size() > options_.width) text.resize(options_.width);
    *options_.stream << '\r' << text << "\x1b[K" << std::flush;  // erases the rest of the old line
    drawn_ = true;
  }

  std::string stage_;
  std::int64_t total_;
  progress_options options_;
  double start_;
  double last_shown_;
  std::int64_t done_ = 0;
  double loss_ = std::nan("");
  bool drawn_ = false;
  bool finished_ = false;
};

}  // namespace demo
