#pragma once

#include <ssmlib/tensor/tensor.hpp>

#include <algorithm>
#include <array>
#include <concepts>

/// @file
/// Several tensors walked in step: extents aligned at the last axis, repeated axes with stride 0,
/// and neighbouring axes merged wherever all of them allow it, so that the innermost loop is long.

namespace ssm::detail {

/// The strides of a tensor over the four axes of a result; repeated axes have stride 0.
template <Element T, int R, Backend B>
[[nodiscard]] shape<4> aligned_strides(const tensor<T, R, B>& t) {
  shape<4> strides{};
  for (std::size_t d = 0; d < R; ++d) {
    strides[4 - R + d] = t.extents()[d] == 1 ? 0 : t.strides()[d];
  }
  return strides;
}
template <std::size_t R>
[[nodiscard]] shape<4> aligned_extents(const std::array<index_t, R>& extents) {
  shape<4> n{1, 1, 1, 1};
  for (std::size_t d = 0; d < R; ++d)
    n[4 - R + d] = extents[d];
  return n;
}

/// N streams of elements over the same extents.
template <std::size_t N>
struct stream_walk {
  shape<4> extents{};
  std::array<shape<4>, N> strides{};

  [[nodiscard]] index_t rows() const { return extents[0] * extents[1] * extents[2]; }
  [[nodiscard]] index_t row_length() const { return extents[3]; }

  /// Drops axes of extent 1 and merges neighbours, towards the last axis.
  void merge() {
    shape<4> n{1, 1, 1, 1};
    std::array<shape<4>, N> s{};
    std::size_t to = 4;
    for (std::size_t from = 4; from-- > 0;) {
      if (extents[from] == 1) continue;
      bool joins = to < 4;
      for (std::size_t k = 0; joins && k < N; ++k) {
        joins = strides[k][from] == s[k][to] * n[to];
      }
      if (joins) {
        n[to] *= extents[from];
        continue;
      }
      --to;
      n[to] = extents[from];
      for (std::size_t k = 0; k < N; ++k)
        s[k][to] = strides[k][from];
    }
    extents = n;
    strides = s;
  }

  /// Where each stream stands at the begin of a row.
  [[nodiscard]] std::array<index_t, N> row_offsets(index_t row) const {
    const index_t i2 = row % extents[2], i1 = row / extents[2] % extents[1],
                  i0 = row / extents[2] / extents[1];
    std::array<index_t, N> offsets{};
    for (std::size_t k = 0; k < N; ++k) {
      offsets[k] = i0 * strides[k][0] + i1 * strides[k][1] + i2 * strides[k][2];
    }
    return offsets;
  }

  /// Elements a task: enough to be worth a task, few enough to share.
  static constexpr index_t task_elements = 16384;
  /// Rows longer than this are cut, so that one row occupies all threads.
  static constexpr index_t longest_row = 2 * task_elements;

  /// f(row offsets, begin, end) for pieces of rows, in parallel unless `in_order`. The pieces
  /// depend on the extents only.
  template <class F>
  void for_each_row(const cpu::context& ctx, bool in_order, F&& f) const {
    const index_t n = row_length();
    if (rows() == 0 || n == 0) return;
    const index_t pieces = n > longest_row ? (n + task_elements - 1) / task_elements : 1;
    const index_t together = pieces > 1 ? 1 : std::max<index_t>(1, task_elements / n);
    const index_t tasks = (rows() + together - 1) / together * pieces;
    const auto task = [&](index_t i) {
      const index_t begin = i % pieces * task_elements;
      const index_t end = pieces > 1 ? std::min(n, begin + task_elements) : n;
      const index_t first = i / pieces * together;
      for (index_t row = first; row < std::min(rows(), first + together); ++row) {
        f(row_offsets(row), begin, end);
      }
    };
    if (in_order) {
      for (index_t i = 0; i < tasks; ++i)
        task(i);
    } else {
      ctx.parallel_for(tasks, task);
    }
  }
};

/// The memory of a tensor as blocks of consecutive elements, `step` apart (0: one block).
struct memory_blocks {
  const char *begin, *end;  ///< of all the memory
  index_t length, step;     ///< in bytes; step < 0: no such form
};

template <Element T, int R, Backend B>
[[nodiscard]] memory_blocks blocks_of(const tensor<T, R, B>& t) {
  stream_walk<1> walk{aligned_extents(t.extents()), {aligned_strides(t)}};
  walk.merge();
  constexpr auto size = static_cast<index_t>(sizeof(T));
  const auto* data = reinterpret_cast<const char*>(t.data());
  index_t low = 0, high = 0, step = 0;
  for (std::size_t d = 0; d < 4; ++d) {
    const index_t reach = (walk.extents[d] - 1) * walk.strides[0][d] * size;
    (reach < 0 ? low : high) += reach;
  }
  for (std::size_t d = 0; d < 3; ++d) {
    if (walk.extents[d] == 1) continue;
    const index_t s = walk.strides[0][d] * size;
    if (step == 0 || (s > 0 && step % s == 0)) {
      step = s;
    } else if (s % step != 0) {
      return {data + low, data + high + size, 0, -1};
    }
  }
  const bool unit = walk.extents[3] == 1 || walk.strides[0][3] == 1;
  return {data + low, data + high + size, walk.extents[3] * size, unit ? step : -1};
}

/// False if no element of one tensor lies in the other; true if some may. Exact for parts of one
/// tensor cut along features, such as the halves of a gated projection.
template <Element T1, int R1, Element T2, int R2, Backend B>
[[nodiscard]] bool may_overlap(const tensor<T1, R1, B>& a, const tensor<T2, R2, B>& b) {
  if (!share_storage(a, b) || a.size() == 0 || b.size() == 0) return false;
  const memory_blocks x = blocks_of(a), y = blocks_of(b);
  if (x.end <= y.begin || y.end <= x.begin) return false;
  if (x.step < 0 || y.step < 0) return true;
  if (x.step != 0 && y.step != 0 && x.step != y.step) return true;
  const index_t step = std::max(x.step, y.step);
  if (step == 0) return true;
  const index_t apart = ((y.begin - x.begin) % step + step) % step;
  return apart < x.length || apart + y.length > step;
}

/// Whether two tensors are the same elements in the same places.
template <Element T1, int R1, Element T2, int R2, Backend B>
[[nodiscard]] bool same_elements(const tensor<T1, R1, B>& a, const tensor<T2, R2, B>& b) {
  return static_cast<const void*>(a.data()) == static_cast<const void*>(b.data()) &&
         std::same_as<T1, T2> && aligned_extents(a.extents()) == aligned_extents(b.extents()) &&
         aligned_strides(a) == aligned_strides(b);
}

}  // namespace ssm::detail
