#pragma once

#include <ssmlib/base/error.hpp>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace ssm {

/// Element types of a safetensors file.
enum class dtype { f64, f32, f16, bf16, i64, i32, i16, i8, u64, u32, u16, u8, boolean };

/// One tensor of a safetensors file: its bytes are [begin, end) of the file's data.
struct safetensors_entry {
  std::string name;
  dtype type = dtype::f32;
  std::vector<index_t> extents;  ///< empty for a scalar
  std::uint64_t begin = 0, end = 0;

  [[nodiscard]] index_t size() const {
    index_t n = 1;
    for (const index_t e : extents)
      n *= e;
    return n;
  }
};

/// What the header of a safetensors file says: the tensors in the order of their bytes.
struct safetensors_header {
  std::vector<safetensors_entry> entries;
  std::map<std::string, std::string> metadata;
};

namespace detail {

struct dtype_info {
  dtype type;
  std::string_view name;
  std::size_t bytes;
};
inline constexpr dtype_info dtype_table[] = {
    {dtype::f64, "F64", 8},     {dtype::f32, "F32", 4}, {dtype::f16, "F16", 2},
    {dtype::bf16, "BF16", 2},   {dtype::i64, "I64", 8}, {dtype::i32, "I32", 4},
    {dtype::i16, "I16", 2},     {dtype::i8, "I8", 1},   {dtype::u64, "U64", 8},
    {dtype::u32, "U32", 4},     {dtype::u16, "U16", 2}, {dtype::u8, "U8", 1},
    {dtype::boolean, "BOOL", 1}};
[[nodiscard]] constexpr const dtype_info& info_of(dtype type) {
  return dtype_table[static_cast<int>(type)];
}

/// Extents and their products stay far from overflow.
inline constexpr std::uint64_t largest_extent = std::uint64_t{1} << 48;

/// @throws io_error  the text is not the header of a file with that many bytes of data.
[[nodiscard]] safetensors_header parse_safetensors_header(std::string_view text,
                                                          std::uint64_t data_bytes,
                                                          const std::string& file);
/// @throws value_error  a name that is not UTF-8.
[[nodiscard]] std::string format_safetensors_header(const safetensors_header& header);

}  // namespace detail
}  // namespace ssm
