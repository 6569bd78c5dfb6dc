#pragma once

#include <ssmlib/io/atomic_file.hpp>
#include <ssmlib/io/safetensors_header.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

static_assert(std::endian::native == std::endian::little,
              "ssm: safetensors files are little-endian; this machine is not");

namespace ssm {

namespace detail {

/// IEEE binary16, exactly.
[[nodiscard]] inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h >> 15) << 31;
  const std::uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const std::uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

template <Element T>
inline constexpr dtype dtype_of = std::same_as<T, float>          ? dtype::f32
                                  : std::same_as<T, double>       ? dtype::f64
                                  : std::same_as<T, bf16>         ? dtype::bf16
                                  : std::same_as<T, std::int32_t> ? dtype::i32
                                                                  : dtype::i64;

/// f(stored) with a value of the type that the file's bytes have; halves come widened.
template <class F>
void with_stored(dtype type, const unsigned char* bytes, F&& f) {
  const auto as = [bytes](auto zero) {
    std::memcpy(&zero, bytes, sizeof(zero));
    return zero;
  };
  switch (type) {
    case dtype::f64:
      return f(as(double{}));
    case dtype::f32:
      return f(as(float{}));
    case dtype::f16:
      return f(half_to_float(as(std::uint16_t{})));
    case dtype::bf16:
      return f(static_cast<float>(as(bf16{})));
    case dtype::i64:
      return f(as(std::int64_t{}));
    case dtype::i32:
      return f(as(std::int32_t{}));
    case dtype::i16:
      return f(as(std::int16_t{}));
    case dtype::i8:
      return f(as(std::int8_t{}));
    case dtype::u64:
      return f(as(std::uint64_t{}));
    case dtype::u32:
      return f(as(std::uint32_t{}));
    case dtype::u16:
      return f(as(std::uint16_t{}));
    case dtype::u8:
      return f(as(std::uint8_t{}));
    case dtype::boolean:
      return f(static_cast<std::uint8_t>(as(std::uint8_t{}) != 0));
  }
}

/// Numbers to numbers; false where an integer is wanted and the value is none that fits.
template <Element To, class From>
[[nodiscard]] bool convert_stored(From from, To& to) {
  if constexpr (std::same_as<To, bf16>) {
    to = bf16(static_cast<float>(from));
  } else if constexpr (std::integral<To> && std::integral<From>) {
    to = static_cast<To>(from);
    return std::in_range<To>(from);
  } else if constexpr (std::integral<To>) {
    return false;
  } else {
    to = static_cast<To>(from);
  }
  return true;
}

}  // namespace detail

/// A safetensors file, opened for reading. The header is checked in full when the file is opened;
/// a tensor's bytes are read when it is loaded.
/// @source the format: https://huggingface.co/docs/safetensors
class safetensors_reader {
 public:
  /// @throws io_error  the file cannot be read, is truncated, or its header does not describe its
  ///                   data exactly (types, sizes, offsets without overlaps and holes, names once).
  explicit safetensors_reader(std::filesystem::path path);

  /// The tensors in the order of their bytes.
  [[nodiscard]] const std::vector<safetensors_entry>& entries() const { return header_.entries; }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const {
    return header_.metadata;
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] bool contains(const std::string& name) const { return index_.contains(name); }
  /// @throws io_error  no tensor has the name.
  [[nodiscard]] const safetensors_entry& entry(const std::string& name) const;

  /// The tensor in the wanted element type: numbers are converted, integers only to types that hold
  /// them. A scalar loads as (1). @throws io_error  absent, of another rank, or not convertible.
  template <Element T, int R>
  [[nodiscard]] tensor<T, R> load(const std::string& name) const;
  /// The same into a given tensor, which may be strided. @throws io_error  also: another shape.
  template <Element T, int R>
  void load_into(const std::string& name, const tensor<T, R>& to) const;
  /// The number of a tensor with one element, of any rank.
  [[nodiscard]] double load_scalar(const std::string& name) const;

 private:
  [[nodiscard]] std::string where() const { return "ssm: reading '" + path_.string() + "'"; }
  void read(std::uint64_t begin, void* to, std::size_t bytes) const;
  template <Element T>
  void read_dense(const safetensors_entry& from, T* to) const;

  std::filesystem::path path_;
  detail::descriptor file_;
  std::uint64_t data_begin_ = 0;
  safetensors_header header_;
  std::unordered_map<std::string, std::size_t> index_;
};

/// Collects tensors and writes them as one safetensors file. Tensors are shared, not copied (a
/// strided one is copied): do not change them before write().
class safetensors_writer {
 public:
  /// @throws value_error  the name was added before or is reserved.
  template <Element T, int R>
  void add(const std::string& name, const tensor<T, R>& t);
  void set_metadata(const std::string& key, std::string value) {
    metadata_[key] = std::move(value);
  }

  /// The file appears whole or not at all; see atomic_file. The same tensors and metadata give the
  /// same bytes. @throws io_error  the file cannot be written; an old one is as it was.
  void write(const std::filesystem::path& path) const;

 private:
  struct item {
    safetensors_entry entry;
    std::shared_ptr<const void> owner;
    const void* data;
  };
  std::vector<item> items_;
  std::map<std::string, std::string> metadata_;
};

// ---- definitions --------------------------------------------------------------------------------

template <Element T>
void safetensors_reader::read_dense(const safetensors_entry& from, T* to) const {
  const std::uint64_t begin = data_begin_ + from.begin;
  if (from.type == detail::dtype_of<T>) {
    return read(begin, to, static_cast<std::size_t>(from.end - from.begin));
  }
  constexpr index_t block = 1 << 16;
  const std::size_t width = detail::info_of(from.type).bytes;
  const index_t size = from.size();
  std::vector<unsigned char> bytes(static_cast<std::size_t>(std::min(block, size)) * width);
  for (index_t done = 0; done < size; done += block) {
    const index_t n = std::min(block, size - done);
    read(begin + static_cast<std::uint64_t>(done) * width, bytes.data(),
         static_cast<std::size_t>(n) * width);
    for (index_t i = 0; i < n; ++i) {
      bool fits = true;
      detail::with_stored(from.type, bytes.data() + static_cast<std::size_t>(i) * width,
                          [&](auto value) { fits = detail::convert_stored(value, to[done + i]); });
      if (!fits) {
        throw io_error(where() + ": tensor '" + from.name + "' is " +
                       std::string(detail::info_of(from.type).name) + " and does not fit in " +
                       std::string(detail::info_of(detail::dtype_of<T>).name) +
                       "; load it as a wider type");
      }
    }
  }
}

template <Element T, int R>
tensor<T, R> safetensors_reader::load(const std::string& name) const {
  const safetensors_entry& from = entry(name);
  shape<R> extents;
  extents.fill(1);
  const bool scalar = from.extents.empty() && R == 1;
  if (!scalar && from.extents.size() != static_cast<std::size_t>(R)) {
    throw io_error(where() + ": tensor '" + name + "' is " + to_string(from.extents) +
                   ", wanted one of rank " + std::to_string(R));
  }
  std::copy(from.extents.begin(), from.extents.end(), extents.begin());
  tensor<T, R> to(extents);
  read_dense(from, to.data());
  return to;
}

template <Element T, int R>
void safetensors_reader::load_into(const std::string& name, const tensor<T, R>& to) const {
  const safetensors_entry& from = entry(name);
  if (!std::equal(from.extents.begin(), from.extents.end(), to.extents().begin(),
                  to.extents().end())) {
    throw io_error(where() + ": tensor '" + name + "' is " + to_string(from.extents) + ", wanted " +
                   to_string<R>(to.extents()));
  }
  if (to.is_contiguous()) return read_dense(from, to.data());
  to.copy_from(load<T, R>(name));
}

template <Element T, int R>
void safetensors_writer::add(const std::string& name, const tensor<T, R>& t) {
  for (const item& other : items_) {
    if (other.entry.name == name) {
      throw value_error("ssm: safetensors_writer: the name '" + name + "' was added before");
    }
  }
  if (name == "__metadata__") {
    throw value_error("ssm: safetensors_writer: the name __metadata__ is reserved; rename it");
  }
  auto owner = std::make_shared<const tensor<T, R>>(t.contiguous());
  safetensors_entry entry{name, detail::dtype_of<T>, {t.extents().begin(), t.extents().end()}};
  entry.end = static_cast<std::uint64_t>(t.size()) * sizeof(T);
  const void* data = owner->data();
  items_.push_back({std::move(entry), std::move(owner), data});
}

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/io/safetensors_impl.hpp>
#endif
