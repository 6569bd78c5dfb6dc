#pragma once

#include <ssmlib/base/types.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <vector>

namespace ssm::detail {

/// A part of a block of memory: `rows` times `length` bytes, `step` bytes apart.
struct memory_rows {
  index_t begin = 0, length = 0, rows = 1, step = 0;

  [[nodiscard]] index_t bytes() const { return rows * length; }
  [[nodiscard]] index_t end() const { return begin + (rows - 1) * step + length; }
};

/// The bytes of a strided part, or nothing if they are no such rows.
/// @param begin  in bytes; strides are in elements
[[nodiscard]] inline std::optional<memory_rows> rows_of(index_t begin,
                                                        const std::array<index_t, 4>& extents,
                                                        const std::array<index_t, 4>& strides,
                                                        index_t element_bytes) {
  memory_rows r{begin, element_bytes};
  for (std::size_t d = 4; d-- > 0;) {
    if (extents[d] == 1) continue;
    const index_t step = strides[d] * element_bytes;
    if (r.rows == 1 && step == r.length) {
      r.length *= extents[d];
    } else if (r.rows == 1 && step > r.length) {
      r.rows = extents[d];
      r.step = step;
    } else if (r.rows > 1 && step == r.rows * r.step) {
      r.rows *= extents[d];
    } else {
      return std::nullopt;
    }
  }
  return r;
}

/// What a block of memory that stands for zeros keeps: the parts that have been written since. So
/// whoever is the first to add something to zeros can store it instead, and nobody fills memory
/// that is overwritten next.
class unwritten_memory {
 public:
  explicit unwritten_memory(index_t bytes) : left_(bytes) {}

  /// Whether no byte of the part has been written; false where that is not known.
  [[nodiscard]] bool is_unwritten(const memory_rows& part) const {
    return std::ranges::all_of(written_, [&](const memory_rows& w) { return apart(w, part); });
  }
  /// Whether all of the part has been written; false where that is not known.
  [[nodiscard]] bool is_written(const memory_rows& part) const {
    return left_ == 0 ||
           std::ranges::any_of(written_, [&](const memory_rows& w) { return contains(w, part); });
  }
  /// @pre is_unwritten(part)
  void write(const memory_rows& part) {
    written_.push_back(part);
    left_ -= part.bytes();
  }
  /// Whether every byte has been written.
  [[nodiscard]] bool is_complete() const { return left_ == 0; }
  /// Parts that have no byte in common.
  [[nodiscard]] const std::vector<memory_rows>& written() const { return written_; }

 private:
  /// Where `part` begins in the rows of `w`. @pre they are apart by a common step
  [[nodiscard]] static index_t column(const memory_rows& w, const memory_rows& part) {
    return ((part.begin - w.begin) % w.step + w.step) % w.step;
  }
  [[nodiscard]] static bool apart(const memory_rows& w, const memory_rows& part) {
    if (w.end() <= part.begin || part.end() <= w.begin) return true;
    if (w.rows == 1 && part.rows == 1) return false;
    const index_t step = std::max(w.step, part.step);
    if (w.rows > 1 && part.rows > 1 && w.step != part.step) return false;
    memory_rows a = w;
    a.step = step;
    const index_t at = column(a, part);
    return at >= w.length && at + part.length <= step;
  }
  [[nodiscard]] static bool contains(const memory_rows& w, const memory_rows& part) {
    if (part.begin < w.begin || part.end() > w.end()) return false;
    if (w.rows == 1) return true;
    if (part.rows > 1 && part.step % w.step != 0) return false;
    return column(w, part) + part.length <= w.length;
  }

  std::vector<memory_rows> written_;
  index_t left_;
};

}  // namespace ssm::detail
