#pragma once

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fcntl.h>
#include <iterator>
#include <memory>
#include <optional>
#include <spawn.h>
#include <string>
#include <string_view>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace demo {

/// One line of a chart; x and y have the same length.
struct series {
  std::string name;
  std::vector<double> x;
  std::vector<double> y;
};

struct chart_options {
  std::string title;
  std::string x_label;
  std::string y_label;
  bool log_y = false;
  std::string program = "gnuplot";  // looked up in PATH
  std::string id = "chart";         // prefix of the ids in the SVG, different for each chart
};

/// Fewer points for the same curve: each is the mean of a run of neighbours of equal length.
///
/// Points that are not finite are left out of the means; a run of nothing else leaves no point.
[[nodiscard]] inline series thinned(const series& full, std::size_t most_points) {
  const auto count = std::min(full.x.size(), full.y.size());
  const auto run = std::max<std::size_t>(1, (count + most_points - 1) / most_points);
  series result{full.name, {}, {}};
  for (std::size_t begin = 0; begin < count; begin += run) {
    const auto end = std::min(begin + run, count);
    double x = 0;
    double y = 0;
    int finite = 0;
    for (auto i = begin; i < end; ++i) {
      if (!std::isfinite(full.x[i]) || !std::isfinite(full.y[i])) continue;
      x += full.x[i];
      y += full.y[i];
      ++finite;
    }
    if (finite == 0) continue;
    result.x.push_back(x / finite);
    result.y.push_back(y / finite);
  }
  return result;
}

namespace detail {

// A gnuplot string. All that could mean something to gnuplot (quotes, backslashes, and backquotes,
// which run commands) is written as an octal escape.
inline std::string gnuplot_string(std::string_view text) {
  constexpr std::string_view plain = " .,:;-_+/()";
  std::string quoted = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (std::isalnum(code) != 0 || code >= 0x80 || plain.find(c) != std::string_view::npos) {
      quoted += c;
    } else if (code < ' ') {
      quoted += ' ';
    } else {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\%03o", static_cast<unsigned>(code));
      quoted += escape;
    }
  }
  return quoted + "\"";
}

inline std::string gnuplot_script(const std::vector<series>& lines, const chart_options& options) {
  // Okabe and Ito's colours, which stay apart for colour-blind readers.
  constexpr const char* colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                     "#56b4e9", "#e69f00", "#000000"};
  std::string script =
      "set terminal svg size 820,380 noenhanced font 'sans-serif,13' background '#ffffff' name " +
      gnuplot_string(options.id) +
      "\nset encoding utf8\nset grid lc rgb '#dddddd'\nset key outside below noenhanced\n"
      "set title " +
      gnuplot_string(options.title) + "\nset xlabel " + gnuplot_string(options.x_label) +
      "\nset ylabel " + gnuplot_string(options.y_label) + "\n";
  if (options.log_y) script += "set logscale y\n";
  std::string plots;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const auto block = "$data" + std::to_string(i);
    script += block + " << END\n";
    for (std::size_t j = 0; j < lines[i].x.size(); ++j) {
      char row[64];
      std::snprintf(row, sizeof row, "%.9g %.9g\n", lines[i].x[j], lines[i].y[j]);
      script += row;
    }
    script += "END\n";
    plots += (i == 0 ? "plot " : ", ") + block + " using 1:2 with " +
             (lines[i].x.size() == 1 ? "points pt 7" : "lines lw 2") + " lc rgb '" +
             colours[i % std::size(colours)] + "' title " + gnuplot_string(lines[i].name);
  }
  return script + plots + "\n";
}

using file_handle = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

// The output of `gnuplot - < script`, empty where it cannot be started or fails. Unnamed temporary
// files carry the text both ways, so that neither side can block the other.
inline std::string run_gnuplot(const std::string& program, const std::string& script) {
  const file_handle in(std::tmpfile(), &std::fclose);
  const file_handle out(std::tmpfile(), &std::fclose);
  if (!in || !out) return {};
  if (std::fwrite(script.data(), 1, script.size(), in.get()) != script.size()) return {};
  std::rewind(in.get());

  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, ::fileno(in.get()), STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, ::fileno(out.get()), STDOUT_FILENO);
  ::posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  std::string name = program;
  std::string defaults = "-d";  // the user's own settings must not change the report
  std::string standard_input = "-";
  char* arguments[] = {name.data(), defaults.data(), standard_input.data(), nullptr};
  pid_t process = 0;
  const int failed =
      ::posix_spawnp(&process, name.c_str(), &actions, nullptr, arguments, ::environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) return {};
  int status = 0;
  while (::waitpid(process, &status, 0) < 0) {
    if (errno != EINTR) return {};
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return {};

  std::string text;
  std::rewind(out.get());
  char buffer[1 << 14];
  for (std::size_t n = 0; (n = std::fread(buffer, 1, sizeof buffer, out.get())) > 0;) {
    text.append(buffer, n);
  }
  return text;
}

}  // namespace detail

/// Draws lines with gnuplot and returns the `<svg>` element, ready to stand inside HTML.
///
/// @return nothing where gnuplot is missing or fails, or where no series has a finite point.
/// @cost one run of gnuplot, about 0.1 s; at most 800 points of a series are drawn.
[[nodiscard]] inline std::optional<std::string> draw_chart(const std::vector<series>& lines,
                                                           const chart_options& options) {
  std::vector<series> drawn;
  for (const auto& line : lines) {
    auto few = thinned(line, 800);
    if (!few.x.empty()) drawn.push_back(std::move(few));
  }
  if (drawn.empty()) return std::nullopt;
  const auto output = detail::run_gnuplot(options.program, detail::gnuplot_script(drawn, options));
  const auto begin = output.find("<svg");  // what is before it belongs to a file of its own
  const auto end = output.rfind("</svg>");
  if (begin == std::string::npos || end == std::string::npos || end < begin) return std::nullopt;
  return output.substr(begin, end + 6 - begin);
}

}  // namespace demo
