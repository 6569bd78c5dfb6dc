#pragma once

#include "chart.hpp"
#include "png.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace demo {

/// Text made safe for HTML, as content and as attribute value.
///
/// Generated text may be any bytes: what is not UTF-8, and control characters other than tabs and
/// line feeds, become U+FFFD.
[[nodiscard]] inline std::string escape_html(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  for (std::size_t i = 0; i < text.size();) {
    const auto c = byte(i);
    // Lengths by lead byte; the second byte's range excludes overlong forms and surrogates.
    std::size_t length = 1;
    std::uint8_t low = 0x80;
    std::uint8_t high = 0xBF;
    if (c >= 0xC2 && c <= 0xDF) length = 2;
    if (c >= 0xE0 && c <= 0xEF) length = 3;
    if (c >= 0xF0 && c <= 0xF4) length = 4;
    if (c == 0xE0) low = 0xA0;
    if (c == 0xED) high = 0x9F;
    if (c == 0xF0) low = 0x90;
    if (c == 0xF4) high = 0x8F;
    bool valid = c < 0x80 ? (c >= ' ' && c != 127) || c == '\n' || c == '\t'
                          : length > 1 && i + length <= text.size();
    for (std::size_t j = 1; valid && j < length; ++j) {
      valid = byte(i + j) >= low && byte(i + j) <= high;
      low = 0x80;
      high = 0xBF;
    }
    if (!valid) {
      out += "\xEF\xBF\xBD";
      ++i;
      continue;
    }
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += text.substr(i, length);
    }
    i += length;
  }
  return out;
}

/// A matrix to be shown as a picture, row by row.
struct matrix_picture {
  std::string caption;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::vector<float> values;
};

/// Builds a self-contained HTML page: no script, and nothing that is fetched from elsewhere.
///
/// All text is escaped. Sections appear in the order of the calls.
class report {
 public:
  /// @param title    the page's title and first heading.
  /// @param about    one line under it: device, date, commit.
  /// @param gnuplot  the program that draws the charts.
  explicit report(std::string title, std::string about = {}, std::string gnuplot = "gnuplot")
      : title_(std::move(title)), about_(std::move(about)), gnuplot_(std::move(gnuplot)) {}

  /// @param level  2 for a section, 3 for a part of one.
  void heading(std::string_view text, int level = 2) {
    const auto tag = "h" + std::to_string(std::clamp(level, 2, 6)) + ">";
    body_ += "<" + tag + escape_html(text) + "</" + tag + "\n";
  }

  void paragraph(std::string_view text) { body_ += "<p>" + escape_html(text) + "</p>\n"; }

  /// A table with the first column as names and the others aligned to the right.
  ///
  /// @throws std::invalid_argument  a row has not as many cells as there are columns.
  void table(const std::vector<std::string>& columns,
             const std::vector<std::vector<std::string>>& rows) {
    body_ += "<div class=\"wide\"><table>\n<tr>";
    for (const auto& name : columns)
      body_ += "<th>" + escape_html(name) + "</th>";
    body_ += "</tr>\n";
    for (const auto& row : rows) {
      if (row.size() != columns.size()) {
        throw std::invalid_argument("report::table: a row has " + std::to_string(row.size()) +
                                    " cells, wanted " + std::to_string(columns.size()));
      }
      body_ += "<tr>";
      for (const auto& cell : row)
        body_ += "<td>" + escape_html(cell) + "</td>";
      body_ += "</tr>\n";
    }
    body_ += "</table></div>\n";
  }

  /// Curves drawn by gnuplot; where it is missing, a note that says so and a table of values.
  void chart(std::string title, std::string x_label, std::string y_label,
             const std::vector<series>& lines, bool log_y = false) {
    const chart_options options{std::move(title),   std::move(x_label),
                                std::move(y_label), log_y,
                                gnuplot_,           "chart" + std::to_string(++charts_)};
    if (const auto svg = draw_chart(lines, options)) {
      body_ += "<figure class=\"chart\">" + *svg + "</figure>\n";
      return;
    }
    heading(options.title, 3);
    paragraph("This chart was not drawn: " + gnuplot_ +
              " is not installed, failed, or had no values; the table samples the curves.");
    std::vector<std::vector<std::string>> rows;
    for (const auto& line : lines) {
      const auto few = thinned(line, 10);
      for (std::size_t i = 0; i < few.x.size(); ++i) {
        rows.push_back({few.name, number(few.x[i]), number(few.y[i])});
      }
    }
    table({"curve", options.x_label, options.y_label}, rows);
  }

  /// One matrix as a picture; see draw_heat_map for the colours.
  void matrix(std::string_view title, std::size_t rows, std::size_t cols,
              std::span<const float> values, std::string_view caption) {
    gallery(title, {}, {{{std::string(caption), rows, cols, {values.begin(), values.end()}}}});
  }

  /// Rows of pictures side by side, such as teacher, before stage 1 and after it.
  ///
  /// The pictures of a row share one colour scale, so that they can be compared by eye.
  /// @param columns  the headings over the columns, or none.
  void gallery(std::string_view title, const std::vector<std::string>& columns,
               const std::vector<std::vector<matrix_picture>>& rows) {
    heading(title, 3);
    body_ += "<div class=\"wide\"><table class=\"gallery\">\n";
    if (!columns.empty()) {
      body_ += "<tr>";
      for (const auto& name : columns)
        body_ += "<th>" + escape_html(name) + "</th>";
      body_ += "</tr>\n";
    }
    bool has_sign = false;
    for (const auto& row : rows) {
      double limit = 0;
      for (const auto& p : row) {
        const auto map = draw_heat_map(p.rows, p.cols, p.values);
        limit = std::max(limit, map.limit);
        has_sign = has_sign || map.has_sign;
      }
      body_ += "<tr>";
      for (const auto& p : row)
        body_ += "<td>" + figure(p, limit) + "</td>";
      body_ += "</tr>\n";
    }
    body_ += "</table></div>\n<p class=\"note\">White is zero, ";
    body_ += has_sign ? "blue is positive, red is negative; " : "dark blue the largest; ";
    body_ +=
        "one colour scale for each row of pictures, growing with the square root so that small "
        "entries show. Magenta marks values that are not finite.</p>\n";
  }

  /// Text in a fixed-width font, such as a sample that a model wrote.
  void code(std::string_view title, std::string_view text) {
    heading(title, 3);
    body_ += "<pre>" + escape_html(text) + "</pre>\n";
  }

  /// The whole page.
  [[nodiscard]] std::string html() const {
    std::string page =
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>";
    page += escape_html(title_) + "</title>\n<style>" + std::string(style) + "</style>\n</head>\n";
    page += "<body>\n<h1>" + escape_html(title_) + "</h1>\n";
    if (!about_.empty()) page += "<p class=\"note\">" + escape_html(about_) + "</p>\n";
    return page + body_ + "</body>\n</html>\n";
  }

 private:
  static constexpr std::string_view style = R"(
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5d6671;
  --line: #d7dce1; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #15191e; --soft: #9aa4af;
  --line: #343c45; --panel: #1e242b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
.note { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.gallery th, .gallery td { text-align: center; border: 0; padding: .3rem .6rem .3rem 0; }
figure { margin: 0; }
figure img { width: 16rem; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .85rem; text-align: center; }
.chart { margin: 1rem 0; }
.chart svg { max-width: 100%; height: auto; background: #ffffff; }
pre { background: var(--panel); border: 1px solid var(--line); padding: .75rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
)";

  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.4g", value);
    return text;
  }

  static std::string figure(const matrix_picture& p, double limit) {
    const auto map = draw_heat_map(p.rows, p.cols, p.values, limit);
    const auto caption = escape_html(p.caption);
    return "<figure><img alt=\"" + caption + "\" src=\"data:image/png;base64," + base64(map.png) +
           "\"><figcaption>" + caption + "</figcaption></figure>";
  }

  std::string title_;
  std::string about_;
  std::string gnuplot_;
  std::string body_;
  int charts_ = 0;
};

}  // namespace demo
