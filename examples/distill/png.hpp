#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace demo {

/// CRC-32 as PNG, zip and Ethernet use it (polynomial 0xEDB88320, reflected).
[[nodiscard]] inline std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xFFFFFFFFu;
  for (const char c : bytes) {
    crc ^= static_cast<std::uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit)
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320u : 0u);
  }
  return ~crc;
}

/// Adler-32, the checksum of a zlib stream (RFC 1950).
[[nodiscard]] inline std::uint32_t adler32(std::string_view bytes) {
  std::uint32_t a = 1;
  std::uint32_t b = 0;
  for (const char c : bytes) {
    a = (a + static_cast<std::uint8_t>(c)) % 65521;
    b = (b + a) % 65521;
  }
  return (b << 16) | a;
}

/// Base64 with padding and without line breaks (RFC 4648, section 4).
[[nodiscard]] inline std::string base64(std::string_view bytes) {
  constexpr std::string_view digits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t group = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      group = (group << 8) | (i + j < bytes.size() ? static_cast<std::uint8_t>(bytes[i + j]) : 0u);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      const bool present = i + j <= bytes.size();  // n bytes of a group fill n + 1 digits
      text += present ? digits[(group >> (18 - 6 * j)) & 63] : '=';
    }
  }
  return text;
}

using rgb = std::array<std::uint8_t, 3>;

namespace detail {

inline void append_big_endian(std::string& out, std::uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8)
    out += static_cast<char>((value >> shift) & 255);
}

inline void append_png_chunk(std::string& out, std::string_view type, std::string_view data) {
  append_big_endian(out, static_cast<std::uint32_t>(data.size()));
  const std::string body = std::string(type) + std::string(data);
  out += body;
  append_big_endian(out, crc32(body));
}

// A zlib stream of stored blocks: pictures of a few hundred pixels a side need no compression.
inline std::string stored_zlib(std::string_view data) {
  constexpr std::size_t largest_block = 65535;
  std::string out = "\x78\x01";
  std::size_t begin = 0;
  do {
    const auto size = std::min(largest_block, data.size() - begin);
    out += static_cast<char>(begin + size == data.size() ? 1 : 0);
    for (const auto field : {size, ~size}) {
      out += static_cast<char>(field & 255);
      out += static_cast<char>((field >> 8) & 255);
    }
    out += data.substr(begin, size);
    begin += size;
  } while (begin < data.size());
  append_big_endian(out, adler32(data));
  return out;
}

}  // namespace detail

/// A PNG file of `width` x `height` palette indices, row by row from the top.
///
/// @throws std::invalid_argument  the sizes do not match, the palette has not 1 to 256 colours, or
///                                a pixel names a colour outside it.
/// @source PNG specification (W3C, 2003), colour type 3, bit depth 8.
[[nodiscard]] inline std::string encode_png(std::size_t width, std::size_t height,
                                            std::span<const std::uint8_t> pixels,
                                            std::span<const rgb> palette) {
  if (width == 0 || height == 0 || pixels.size() != width * height) {
    throw std::invalid_argument("encode_png: " + std::to_string(pixels.size()) + " pixels for " +
                                std::to_string(width) + " x " + std::to_string(height));
  }
  if (palette.empty() || palette.size() > 256) {
    throw std::invalid_argument("encode_png: the palette has " + std::to_string(palette.size()) +
                                " colours, wanted 1 to 256");
  }
  if (*std::max_element(pixels.begin(), pixels.end()) >= palette.size()) {
    throw std::invalid_argument("encode_png: a pixel names a colour outside the palette");
  }
  std::string header;
  detail::append_big_endian(header, static_cast<std::uint32_t>(width));
  detail::append_big_endian(header, static_cast<std::uint32_t>(height));
  header += std::string("\x08\x03\0\0\0", 5);  // 8 bits, palette, deflate, no filter, no interlace
  std::string colours;
  for (const auto& colour : palette) {
    for (const auto channel : colour)
      colours += static_cast<char>(channel);
  }
  std::string rows;
  rows.reserve(height * (width + 1));
  for (std::size_t row = 0; row < height; ++row) {
    rows += '\0';  // filter type: none
    for (const auto pixel : pixels.subspan(row * width, width))
      rows += static_cast<char>(pixel);
  }
  std::string file = "\x89PNG\r\n\x1a\n";
  detail::append_png_chunk(file, "IHDR", header);
  detail::append_png_chunk(file, "PLTE", colours);
  detail::append_png_chunk(file, "IDAT", detail::stored_zlib(rows));
  detail::append_png_chunk(file, "IEND", "");
  return file;
}

/// A matrix as a picture: what the colours stand for, and the PNG file.
struct heat_map {
  std::string png;
  double limit = 0.0;     // the value drawn in the strongest colour
  bool has_sign = false;  // red below zero, blue above; otherwise white is zero
};

namespace detail {

// 255 colours from red over white to blue, white in the middle, and magenta for not-a-number.
inline std::vector<rgb> heat_palette() {
  constexpr rgb white = {255, 255, 255};
  constexpr std::array<rgb, 3> blues = {white, {90, 150, 210}, {8, 29, 88}};
  constexpr std::array<rgb, 3> reds = {white, {239, 120, 90}, {103, 0, 13}};
  const auto at = [](const std::array<rgb, 3>& stops, double x) {
    const auto& from = stops[x < 0.5 ? 0 : 1];
    const auto& to = stops[x < 0.5 ? 1 : 2];
    const double part = x < 0.5 ? 2 * x : 2 * x - 1;
    rgb colour{};
    for (std::size_t i = 0; i < 3; ++i) {
      colour[i] = static_cast<std::uint8_t>(std::lround(from[i] + part * (to[i] - from[i])));
    }
    return colour;
  };
  std::vector<rgb> palette;
  for (int i = -127; i <= 127; ++i)
    palette.push_back(at(i < 0 ? reds : blues, std::abs(i) / 127.0));
  palette.push_back({255, 0, 255});
  return palette;
}

}  // namespace detail

/// Draws a matrix with one pixel an element; colours grow with the square root of the size.
///
/// The root lets the small entries of an attention matrix be seen beside its large ones. Elements
/// that are not finite are magenta. Above 256 rows or columns, pixels are means of square blocks.
/// @param values  (rows x cols), row by row.
/// @param limit   the size drawn in the strongest colour; 0 takes the largest of this matrix.
/// @throws std::invalid_argument  the matrix is empty or its sizes do not match.
[[nodiscard]] inline heat_map draw_heat_map(std::size_t rows, std::size_t cols,
                                            std::span<const float> values, double limit = 0.0) {
  if (rows == 0 || cols == 0 || values.size() != rows * cols) {
    throw std::invalid_argument("draw_heat_map: " + std::to_string(values.size()) +
                                " values for a matrix of (" + std::to_string(rows) + " x " +
                                std::to_string(cols) + ")");
  }
  const auto block = (std::max(rows, cols) + 255) / 256;
  const auto height = (rows + block - 1) / block;
  const auto width = (cols + block - 1) / block;
  std::vector<double> means(height * width);
  for (std::size_t i = 0; i < height; ++i) {
    for (std::size_t j = 0; j < width; ++j) {
      const auto row_end = std::min(rows, (i + 1) * block);
      const auto col_end = std::min(cols, (j + 1) * block);
      double sum = 0;
      for (auto r = i * block; r < row_end; ++r) {
        for (auto c = j * block; c < col_end; ++c)
          sum += static_cast<double>(values[r * cols + c]);
      }
      means[i * width + j] =
          sum / static_cast<double>((row_end - i * block) * (col_end - j * block));
    }
  }
  heat_map result;
  for (const double v : means) {
    if (std::isfinite(v)) result.limit = std::max(result.limit, std::fabs(v));
    if (std::isfinite(v) && v < 0) result.has_sign = true;
  }
  if (limit > 0) result.limit = limit;
  std::vector<std::uint8_t> pixels;
  for (const double v : means) {
    const double size = result.limit > 0 ? std::min(1.0, std::fabs(v) / result.limit) : 0.0;
    const auto step = std::isfinite(v) ? std::lround(127 * std::sqrt(size)) : 128;
    pixels.push_back(
        static_cast<std::uint8_t>(std::isfinite(v) && v < 0 ? 127 - step : 127 + step));
  }
  result.png = encode_png(width, height, pixels, detail::heat_palette());
  return result;
}

}  // namespace demo
