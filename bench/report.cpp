#include "report.hpp"

#include <ssmlib/kernels/cpu/pack.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <stdexcept>

namespace bench {

namespace {

using row = std::vector<std::string>;

/// A table that is written aligned for people or as Markdown.
struct table {
  std::string title;
  row head;
  std::vector<row> rows;
};

std::size_t width_of(const table& t, std::size_t column) {
  std::size_t width = t.head[column].size();
  for (const row& r : t.rows)
    width = std::max(width, r[column].size());
  return width;
}
void write_line(std::ostream& out, const table& t, const row& cells, bool markdown) {
  for (std::size_t i = 0; i < cells.size(); ++i) {
    out << (markdown ? "| "
            : i > 0  ? "  "
                     : "")
        << std::left
        << std::setw(markdown || i + 1 == cells.size() ? 0 : static_cast<int>(width_of(t, i)))
        << cells[i] << (markdown ? " " : "");
  }
  out << (markdown ? "|\n" : "\n");
}
void write_table(std::ostream& out, const table& t, bool markdown) {
  if (t.rows.empty()) return;
  out << (markdown ? "### " : "\n") << t.title << (markdown ? "\n\n" : "\n");
  write_line(out, t, t.head, markdown);
  if (markdown) {
    for (std::size_t i = 0; i < t.head.size(); ++i)
      out << "|---";
    out << "|\n";
  }
  for (const row& r : t.rows)
    write_line(out, t, r, markdown);
  if (markdown) out << "\n";
}

std::string output_of(const char* command) {
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[256];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr)
      text += buffer;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n')
    text.pop_back();
  return text.empty() ? "unknown" : text;
}
std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown CPU";
}
std::string today() {
  char text[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}
std::string load() {
  double averages[1] = {};
  return getloadavg(averages, 1) == 1 ? digits(averages[0], 2) : "unknown";
}

table machine_table(const session& s) {
  const std::string source = std::string("git -C '") + SSMLIB_BENCH_SOURCE + "' ";
  return {"Run",
          {"what", "value"},
          {{"date", today()},
           {"CPU", cpu_model()},
           {"threads", std::to_string(s.options().threads)},
           {"compiler", __VERSION__},
           {"vector bytes", std::to_string(sizeof(ssm::simd::pack<float>))},
           {"commit", output_of((source + "describe --always --dirty 2>/dev/null").c_str())},
           {"command", s.options().command},
           {"repetitions", std::to_string(s.options().repetitions)},
           {"load average, this run included", load()}}};
}

table ceiling_table(const session& s, const ceilings& c) {
  const std::string all = std::to_string(s.options().threads) + " threads";
  table t{"Ceilings", {"what", "1 thread", all}, {}};
  const auto rate = [](double x, const char* unit) {
    return x > 0 ? digits(x / 1e9) + unit : std::string("-");
  };
  t.rows.push_back({"our GEMM, 1024^3 f32", rate(c.gemm_1, " GF/s"), rate(c.gemm_n, " GF/s")});
  t.rows.push_back({"OpenBLAS, 1024^3 f32", rate(c.blas_1, " GF/s"), rate(c.blas_n, " GF/s")});
  t.rows.push_back({"vector exp, in cache", "-", rate(c.exps, " G/s")});
  t.rows.push_back({"copy of 64 MiB, read + written", "-", rate(c.copy, " GB/s")});
  return t;
}

table sweep_table(const session& s, const ceilings& c) {
  table t{"Mixers: milliseconds (share of the ceiling), medians",
          {"mixer", "shape", "algorithm", "direction"},
          {}};
  std::vector<index_t> lengths;
  for (const series& x : s.all_series()) {
    for (const auto* list : {&x.lengths, &x.left_out})
      lengths.insert(lengths.end(), list->begin(), list->end());
  }
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  for (const index_t length : lengths)
    t.head.push_back("T = " + std::to_string(length));
  for (const series& x : s.all_series()) {
    row r{x.mixer, x.shape, x.algorithm, x.direction};
    for (const index_t length : lengths) {
      const timing time = s.time_of(x.name(length));
      r.push_back(time ? digits(1e3 * time.median) + " (" +
                             percent(share_of(s, c, x.name(length))) + ")"
                       : "left out");
    }
    t.rows.push_back(std::move(r));
  }
  return t;
}

/// What alg::automatic takes against what is fastest.
table crossover_table(const session& s) {
  table t{"Crossovers: milliseconds",
          {"mixer", "shape", "T", "algorithms", "automatic takes", "over the fastest"},
          {}};
  for (const crossover& x : s.crossovers()) {
    std::string times;
    double least = 0, chosen = 0;
    for (const std::string& algorithm : x.algorithms) {
      const timing time = s.time_of(x.name(algorithm));
      if (!time) continue;
      times += (times.empty() ? "" : ", ") + algorithm + " " + digits(1e3 * time.median);
      least = least == 0 ? time.median : std::min(least, time.median);
      if (algorithm == x.chosen) chosen = time.median;
    }
    if (least == 0 || chosen == 0) continue;
    t.rows.push_back({x.mixer, x.shape, std::to_string(x.length), times, x.chosen,
                      digits(chosen / least) + "x"});
  }
  return t;
}

/// How far apart the repetitions were: says whether the machine was quiet.
table spread_table(const session& s) {
  std::vector<double> spreads;
  for (const timed_case& c : s.cases()) {
    const timing t = s.time_of(c.name);
    if (t) spreads.push_back((t.most - t.least) / t.median);
  }
  table t{
      "Spread over the repetitions, (slowest - fastest) / median", {"of the cases", "spread"}, {}};
  if (spreads.empty()) return t;
  std::sort(spreads.begin(), spreads.end());
  t.rows.push_back({"median", percent(spreads[spreads.size() / 2])});
  t.rows.push_back({"90th percentile", percent(spreads[spreads.size() * 9 / 10])});
  return t;
}

table goal_table(const std::vector<goal_row>& rows) {
  table t{"Goals", {"what", "goal", "measured", "verdict"}, {}};
  const char* verdicts[] = {"met", "MISSED", "not measured", ""};
  for (const goal_row& r : rows) {
    t.rows.push_back({r.what, r.goal, r.measured, verdicts[static_cast<int>(r.verdict)]});
  }
  return t;
}

}  // namespace

void print_report(const session& s, const ceilings& c, const std::vector<goal_row>& rows) {
  const table tables[] = {machine_table(s),   ceiling_table(s, c), sweep_table(s, c),
                          crossover_table(s), spread_table(s),     goal_table(rows)};
  for (const table& t : tables)
    write_table(std::cout, t, false);
  if (s.options().markdown.empty()) return;
  std::ofstream file(s.options().markdown);
  for (const table& t : tables)
    write_table(file, t, true);
  if (!file.flush()) {
    throw std::runtime_error("cannot write '" + s.options().markdown +
                             "'; give a file in a folder that exists");
  }
}

}  // namespace bench
