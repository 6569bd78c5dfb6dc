#pragma once

#include <ssmlib/kernels/cuda/attention.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/rung.cuh>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

/// @file
/// What all attention kernels share: the problem as kernels receive it, positions, and the order in
/// which blocks take their tiles.

namespace ssm::kernels::cuda::detail {

/// A (tokens, heads, features) operand; strides in elements.
template <class T>
struct attention_operand {
  T* data = nullptr;
  index_t token = 0, head = 0;
  int heads = 0, size = 0;

  attention_operand() = default;
  explicit attention_operand(view<T, 3> x)
      : data(x.data),
        token(x.strides[0]),
        head(x.strides[1]),
        heads(static_cast<int>(x.extents[1])),
        size(static_cast<int>(x.extents[2])) {}
  SSMLIB_DEVICE T* row(index_t t, int h) const { return data + t * token + h * head; }
};

/// Where a sequence's tokens are.
struct attention_span {
  index_t query_begin, key_begin;
  int queries, keys;
  /// Position of query 0 among the keys.
  SSMLIB_DEVICE int shift() const { return keys - queries; }
};

/// The mask and the sequences.
struct attention_layout {
  const index_t* offsets;
  const index_t* key_offsets;
  index_t sequences;
  int max_length, max_key_length;
  int heads;
  bool causal;
  int window;  // a value above every position: none

  template <class T>
  explicit attention_layout(const attention_problem<T>& p)
      : offsets(p.offsets),
        key_offsets(p.key_offsets ? p.key_offsets : (p.max_key_length == 0 ? p.offsets : nullptr)),
        sequences(p.sequences),
        max_length(static_cast<int>(p.max_length)),
        max_key_length(static_cast<int>(p.max_key_length == 0 ? p.max_length : p.max_key_length)),
        heads(static_cast<int>(p.heads)),
        causal(p.causal),
        window(p.window == 0 || p.window > (1 << 30) ? 1 << 30 : static_cast<int>(p.window)) {}

  SSMLIB_DEVICE attention_span span(index_t i) const {
    attention_span s;
    s.query_begin = offsets ? offsets[i] : i * max_length;
    s.queries = offsets ? static_cast<int>(offsets[i + 1] - s.query_begin) : max_length;
    s.key_begin = key_offsets ? key_offsets[i] : i * max_key_length;
    s.keys = key_offsets ? static_cast<int>(key_offsets[i + 1] - s.key_begin) : max_key_length;
    return s;
  }
  /// The keys [first, end) that some of the queries [begin, end) see.
  SSMLIB_DEVICE void keys_of(const attention_span& s, int begin, int end, int& first,
                             int& last) const {
    first = causal ? max(0, begin + s.shift() + 1 - window) : 0;
    last = causal ? min(s.keys, min(end, s.queries) + s.shift()) : s.keys;
  }
  /// The queries [first, last) that see some of the keys [begin, end).
  SSMLIB_DEVICE void queries_of(const attention_span& s, int begin, int end, int& first,
                                int& last) const {
    first = causal ? max(0, begin - s.shift()) : 0;
    const index_t beyond = static_cast<index_t>(min(end, s.keys)) - s.shift() + window - 1;
    last = causal && beyond < s.queries ? static_cast<int>(beyond) : s.queries;
  }
  /// Whether the query at `position` sees key s.
  SSMLIB_DEVICE bool keeps(int position, int s) const {
    return !causal || (s <= position && s > position - window);
  }
};

/// One block's piece of work: a tile of rows of one head of one sequence.
struct attention_tile {
  index_t sequence;
  int head, tile;
};

/// Tiles in an order that keeps what runs together in the L2 cache: sections of (sequence, head)
/// pairs, in each the tiles with the most work first.
struct attention_schedule {
  index_t pairs, section, tiles;
  int heads;
  bool last_first;

  SSMLIB_DEVICE index_t size() const { return pairs * tiles; }
  SSMLIB_DEVICE attention_tile operator[](index_t n) const {
    const index_t whole = section * tiles, s = n / whole, rest = n - s * whole;
    const index_t width = min(section, pairs - s * section), row = rest / width;
    const index_t pair = s * section + (rest - row * width), sequence = pair / heads;
    return {sequence, static_cast<int>(pair - sequence * heads),
            static_cast<int>(last_first ? tiles - 1 - row : row)};
  }
};

/// @param bytes  that the tiles of a group of `shared` consecutive pairs read together
inline attention_schedule make_schedule(index_t sequences, int heads, index_t rows, int tile_rows,
                                        bool last_first, index_t bytes, index_t shared) {
  constexpr index_t cache = index_t{24} << 20;
  const index_t pairs = sequences * heads;
  const index_t groups = std::max<index_t>(1, cache / std::max<index_t>(1, bytes));
  return {pairs, std::clamp<index_t>(groups * shared, 1, std::max<index_t>(1, pairs)),
          (rows + tile_rows - 1) / tile_rows, heads, last_first};
}

template <class T>
void check_operand(const char* name, view<T, 3> x, index_t tokens, index_t heads, index_t size) {
  const bool right = x.extents[0] == tokens && x.extents[2] == size && x.extents[1] > 0 &&
                     heads % x.extents[1] == 0 && (size <= 1 || x.strides[2] == 1);
  if (right) return;
  throw shape_error("ssm: attention on cuda: " + std::string(name) + " is " + to_string(x.extents) +
                    " with innermost stride " + std::to_string(x.strides[2]) + ", wanted (" +
                    std::to_string(tokens) + " x a divisor of " + std::to_string(heads) +
                    " heads x " + std::to_string(size) + ") with innermost stride 1");
}

template <class T>
void check_problem(const attention_problem<T>& p) {
  if (p.window < 0 || (p.window > 0 && !p.causal)) {
    throw value_error("ssm: attention on cuda: the window is " + std::to_string(p.window) +
                      (p.causal ? "" : " without a causal mask") +
                      "; give a positive window with causal = true, or 0");
  }
  const index_t keys = p.max_key_length == 0 ? p.max_length : p.max_key_length;
  if (p.heads <= 0 || p.heads > (1 << 20) || std::max(p.max_length, keys) > (1 << 30) ||
      std::max(p.q.extents[2], p.v.extents[2]) > (1 << 20)) {
    throw shape_error("ssm: attention on cuda: " + std::to_string(p.heads) + " heads of up to " +
                      std::to_string(std::max(p.max_length, keys)) +
                      " tokens, wanted 1 to 2^20 heads of at most 2^30 tokens and 2^20 features");
  }
  if (p.key_offsets == nullptr && p.max_key_length != 0 && p.offsets != nullptr &&
      p.k.extents[0] != p.sequences * p.max_key_length) {
    throw shape_error("ssm: attention on cuda: k has " + std::to_string(p.k.extents[0]) +
                      " tokens, wanted " + std::to_string(p.sequences) + " sequences of " +
                      std::to_string(p.max_key_length) + "; or give key_offsets");
  }
  check_operand("q", p.q, p.offsets ? p.q.extents[0] : p.sequences * p.max_length, p.heads,
                p.q.extents[2]);
  const bool counted = p.key_offsets == nullptr && (p.offsets == nullptr || p.max_key_length != 0);
  const index_t key_tokens = counted ? p.sequences * keys : p.k.extents[0];
  check_operand("k", p.k, key_tokens, p.heads, p.q.extents[2]);
  check_operand("v", p.v, key_tokens, p.heads, p.v.extents[2]);
}

/// Whether rows can be read and written in 16-byte pieces.
template <class T>
[[nodiscard]] bool rows_aligned(view<T, 3> x) {
  constexpr index_t piece = 16 / sizeof(T);
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.extents[2] % piece == 0 &&
         (x.extents[0] <= 1 || x.strides[0] % piece == 0) &&
         (x.extents[1] <= 1 || x.strides[1] % piece == 0);
}

/// Whether the tensor cores' kernels take the problem: bf16 and rows of whole 16-byte pieces.
template <class T>
[[nodiscard]] bool tensor_cores_take(const attention_problem<T>& p, index_t largest) {
  if constexpr (!std::is_same_v<T, bf16>) {
    return false;
  } else {
    constexpr index_t most = std::numeric_limits<int>::max();  // coordinates have 32 bits
    const index_t tokens[2] = {p.q.extents[0], p.k.extents[0]};
    return p.scale > 0 && rows_aligned(p.q) && rows_aligned(p.k) && rows_aligned(p.v) &&
           std::max(p.q.extents[2], p.v.extents[2]) <= largest && p.q.extents[2] > 0 &&
           p.v.extents[2] > 0 && std::min(tokens[0], tokens[1]) > 0 &&
           std::max(tokens[0], tokens[1]) <= most && p.sequences <= most;
  }
}

}  // namespace ssm::kernels::cuda::detail
