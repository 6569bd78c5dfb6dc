#include "../../examples/distill/report.hpp"

#include "../../examples/distill/output_folder.hpp"
#include "../support/catch.hpp"
#include "demo_temporary_folder.hpp"

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using demo::escape_html;
using demo_test::temporary_folder;
using ssm_test::contains;

std::uint32_t big_endian(std::string_view bytes) {
  std::uint32_t value = 0;
  for (int i = 0; i < 4; ++i)
    value = (value << 8) | static_cast<std::uint8_t>(bytes[i]);
  return value;
}

struct decoded_png {
  std::vector<std::string> types;
  std::string header;
  std::string palette;
  std::string rows;  // each with its filter byte in front
};

// Reads the chunks and undoes the stored blocks, checking every length and checksum on the way.
decoded_png decode(std::string_view file) {
  decoded_png png;
  REQUIRE(file.substr(0, 8) == "\x89PNG\r\n\x1a\n");
  std::string stream;
  for (std::size_t at = 8; at < file.size();) {
    const auto size = big_endian(file.substr(at, 4));
    const auto type = file.substr(at + 4, 4);
    const auto data = file.substr(at + 8, size);
    REQUIRE(data.size() == size);
    REQUIRE(big_endian(file.substr(at + 8 + size, 4)) ==
            demo::crc32(file.substr(at + 4, 4 + size)));
    png.types.emplace_back(type);
    if (type == "IHDR") png.header = data;
    if (type == "PLTE") png.palette = data;
    if (type == "IDAT") stream += data;
    at += 12 + size;
  }
  REQUIRE((256 * static_cast<std::uint8_t>(stream[0]) + static_cast<std::uint8_t>(stream[1])) %
              31 ==
          0);
  const auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(stream[i]); };
  std::size_t at = 2;
  for (bool last = false; !last;) {
    last = byte(at) == 1;
    const auto size = static_cast<unsigned>(byte(at + 1) + 256 * byte(at + 2));
    const auto complement = static_cast<unsigned>(byte(at + 3) + 256 * byte(at + 4));
    REQUIRE(size + complement == 65535);
    png.rows += stream.substr(at + 5, size);
    at += 5 + size;
  }
  REQUIRE(stream.size() == at + 4);
  REQUIRE(big_endian(stream.substr(at)) == demo::adler32(png.rows));
  return png;
}

}  // namespace

TEST_CASE("examples/png: the checksums equal their published check values", "[examples][png]") {
  CHECK(demo::crc32("123456789") == 0xCBF43926u);
  CHECK(demo::adler32("Wikipedia") == 0x11E60398u);
}

TEST_CASE("examples/png: base64 equals the test vectors of RFC 4648", "[examples][png]") {
  CHECK(demo::base64("").empty());
  CHECK(demo::base64("f") == "Zg==");
  CHECK(demo::base64("fo") == "Zm8=");
  CHECK(demo::base64("foo") == "Zm9v");
  CHECK(demo::base64("foob") == "Zm9vYg==");
  CHECK(demo::base64("fooba") == "Zm9vYmE=");
  CHECK(demo::base64("foobar") == "Zm9vYmFy");
  CHECK(demo::base64("\xFB\xFF\xFE") == "+//+");
}

TEST_CASE("examples/png: a picture decodes to its pixels", "[examples][png]") {
  const auto [width, height] =
      GENERATE(table<std::size_t, std::size_t>({{1, 1}, {7, 3}, {254, 257}, {300, 400}}));
  const std::vector<demo::rgb> palette = {{255, 0, 0}, {0, 255, 0}, {0, 0, 255}};
  std::vector<std::uint8_t> pixels(width * height);
  for (std::size_t i = 0; i < pixels.size(); ++i)
    pixels[i] = static_cast<std::uint8_t>(i * i % 3);

  const auto png = decode(demo::encode_png(width, height, pixels, palette));
  CHECK(png.types == std::vector<std::string>{"IHDR", "PLTE", "IDAT", "IEND"});
  CHECK(big_endian(png.header) == width);
  CHECK(big_endian(png.header.substr(4)) == height);
  CHECK(png.header.substr(8) == std::string("\x08\x03\0\0\0", 5));
  CHECK(png.palette == std::string("\xFF\0\0\0\xFF\0\0\0\xFF", 9));
  REQUIRE(png.rows.size() == height * (width + 1));
  std::size_t wrong = 0;
  for (std::size_t row = 0; row < height; ++row) {
    const auto* line = &png.rows[row * (width + 1)];
    wrong += line[0] != 0;
    for (std::size_t col = 0; col < width; ++col) {
      wrong += static_cast<std::uint8_t>(line[1 + col]) != pixels[row * width + col];
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("examples/png: sizes and colours that do not fit are refused", "[examples][png][error]") {
  const std::vector<demo::rgb> palette(2);
  const std::vector<std::uint8_t> pixels = {0, 1, 2, 0};
  CHECK_THROWS_WITH(demo::encode_png(3, 2, pixels, palette), contains("4 pixels for 3 x 2"));
  CHECK_THROWS_WITH(demo::encode_png(2, 2, pixels, palette), contains("outside the palette"));
  CHECK_THROWS_WITH(demo::draw_heat_map(2, 3, std::vector<float>(5)), contains("(2 x 3)"));
}

TEST_CASE("examples/png: a heat map shows zero white, sizes stronger, signs and bad values apart",
          "[examples][png]") {
  const float bad = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values = {0.0f, 4.0f, 1.0f, -4.0f, -1.0f, bad};
  const auto map = demo::draw_heat_map(2, 3, values);
  CHECK(map.limit == 4.0);
  CHECK(map.has_sign);
  const auto png = decode(map.png);
  const auto colour = [&](std::size_t row, std::size_t col) {
    const auto index = static_cast<std::uint8_t>(png.rows[row * 4 + 1 + col]);
    return png.palette.substr(3u * index, 3);
  };
  CHECK(colour(0, 0) == "\xFF\xFF\xFF");
  CHECK(colour(0, 1) == "\x08\x1D\x58");
  CHECK(colour(1, 0) == std::string("\x67\0\x0D", 3));
  CHECK(colour(1, 2) == std::string("\xFF\0\xFF", 3));
  CHECK(png.rows[0 * 4 + 3] - 127 == 64 - 256);  // sqrt(1 / 4) of 127 steps above white
  CHECK(127 - png.rows[1 * 4 + 2] == 64);
}

TEST_CASE("examples/png: a large matrix is reduced to means of blocks", "[examples][png]") {
  std::vector<float> values(512 * 512, 0.0f);
  values[0] = values[1] = values[512] = values[513] = 8.0f;
  const auto map = demo::draw_heat_map(512, 512, values);
  CHECK(map.limit == 8.0);
  CHECK(big_endian(decode(map.png).header) == 256);
}

TEST_CASE("examples/report: text is escaped in every place", "[examples][report]") {
  demo::report r("<t&>", "<about>");
  r.heading("<h>");
  r.paragraph("<p1>");
  r.table({"<c>"}, {{"<d>"}});
  r.code("<ct>", "<x y='1' z=\"2\">");
  r.matrix("<m>", 1, 1, std::vector<float>{1.0f}, "\"><script>");
  const auto page = r.html();
  for (const char* raw :
       {"<t&>", "<about>", "<h>", "<p1>", "<c>", "<d>", "<ct>", "<x", "<m>", "<script"}) {
    CAPTURE(raw);
    CHECK(page.find(raw) == std::string::npos);
  }
  CHECK(page.find("&lt;x y=&#39;1&#39; z=&quot;2&quot;&gt;") != std::string::npos);
  CHECK(page.find("<title>&lt;t&amp;&gt;</title>") != std::string::npos);
}

TEST_CASE("examples/report: bytes that are not UTF-8 become replacement characters",
          "[examples][report]") {
  const std::string mark = "\xEF\xBF\xBD";
  CHECK(escape_html("a\xC3\xA4\xE6\x97\xA5\xF0\x9F\x98\x80\n\tz") ==
        "a\xC3\xA4\xE6\x97\xA5\xF0\x9F\x98\x80\n\tz");
  CHECK(escape_html("\xFFz\x80") == mark + "z" + mark);
  CHECK(escape_html(std::string("a\0b\x7F", 4)) == "a" + mark + "b" + mark);
  CHECK(escape_html("\xE6\x97") == mark + mark);                        // cut off
  CHECK(escape_html("\xC0\xAF") == mark + mark);                        // overlong
  CHECK(escape_html("\xED\xA0\x80") == mark + mark + mark);             // a surrogate
  CHECK(escape_html("\xF4\x90\x80\x80") == mark + mark + mark + mark);  // beyond U+10FFFF
}

TEST_CASE("examples/report: the page fetches nothing and runs nothing", "[examples][report]") {
  demo::report r("title");
  r.chart("loss", "step", "bits", {{"teacher", {0, 1, 2}, {3, 2, 1}}});
  r.gallery("g", {"a", "b"}, {{{"x", 2, 2, {1, 2, 3, 4}}, {"y", 2, 2, {1, 2, 3, 4}}}});
  const auto page = r.html();
  for (const char* part : {"<script", "<link", "<iframe", "<object", "@import", "url(http",
                           "src=\"http", "<!DOCTYPE svg"}) {
    CAPTURE(part);
    CHECK(page.find(part) == std::string::npos);
  }
  std::size_t sources = 0;
  for (auto at = page.find("src="); at != std::string::npos; at = page.find("src=", at + 1)) {
    ++sources;
    CHECK(page.compare(at, 27, "src=\"data:image/png;base64,") == 0);
  }
  CHECK(sources == 2);
}

TEST_CASE("examples/report: the pictures of a row share one scale", "[examples][report]") {
  demo::report shared("t");
  shared.gallery("g", {}, {{{"", 1, 1, {1.0f}}, {"", 1, 1, {4.0f}}}});
  const auto half = demo::base64(demo::draw_heat_map(1, 1, std::vector<float>{1.0f}, 4.0).png);
  CHECK(shared.html().find(half) != std::string::npos);
}

TEST_CASE("examples/report: a row of another length than the columns is refused",
          "[examples][report][error]") {
  demo::report r("t");
  CHECK_THROWS_WITH(r.table({"a", "b"}, {{"1"}}), contains("a row has 1 cells, wanted 2"));
}

TEST_CASE("examples/report: without gnuplot a chart says so and becomes a table",
          "[examples][report]") {
  demo::report r("t", "", "no-such-gnuplot");
  r.chart("loss", "step", "bits", {{"teacher", {10, 20}, {3.25, 1.5}}});
  const auto page = r.html();
  CHECK(page.find("This chart was not drawn: no-such-gnuplot is not installed") !=
        std::string::npos);
  CHECK(page.find("<td>teacher</td><td>20</td><td>1.5</td>") != std::string::npos);
}

TEST_CASE("examples/chart: gnuplot gets every name literally", "[examples][report]") {
  if (std::system("gnuplot --version >/dev/null 2>&1") != 0) {
    WARN("skipped: gnuplot is not installed");
    return;
  }
  const auto svg =
      demo::draw_chart({{"it's_a {b} <c>\nd", {1, 2}, {3, 4}}},
                       {.title = "'\"`exit`\\n; exit; #", .x_label = "x", .y_label = "y"});
  REQUIRE(svg);
  CHECK(svg->starts_with("<svg"));
  CHECK(svg->ends_with("</svg>"));
  CHECK(svg->find("_a {b} &lt;c") != std::string::npos);
  CHECK(svg->find("`exit`\\n; exit; #") != std::string::npos);
}

TEST_CASE("examples/chart: a chart without finite values is not drawn", "[examples][report]") {
  const double bad = std::numeric_limits<double>::quiet_NaN();
  CHECK_FALSE(demo::draw_chart({{"a", {1, 2}, {bad, bad}}, {"b", {}, {}}}, {}));
}

TEST_CASE("examples/chart: thinning takes means of equal runs and skips bad values",
          "[examples][report]") {
  const double bad = std::numeric_limits<double>::quiet_NaN();
  const auto few = demo::thinned({"a", {0, 1, 2, 3, 4, 5, 6}, {2, 4, 6, bad, bad, bad, 9}}, 4);
  CHECK(few.x == std::vector<double>{0.5, 2, 6});
  CHECK(few.y == std::vector<double>{3, 6, 9});
}

TEST_CASE("examples/output_folder: an output folder is created, or refused in one sentence",
          "[examples][output_folder]") {
  const temporary_folder folder;
  demo::require_writable_folder(folder.path() / "a" / "b");
  CHECK(std::filesystem::is_empty(folder.path() / "a" / "b"));
  const auto blocker = folder.add("file", "");
  CHECK_THROWS_AS(demo::require_writable_folder(blocker), demo::usage_error);
  CHECK_THROWS_WITH(demo::require_writable_folder(blocker / "out"), contains("cannot be created"));
  CHECK_THROWS_AS(demo::require_writable_folder("/proc"), demo::usage_error);
}
