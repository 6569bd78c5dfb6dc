#pragma once

#include "near_copies.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace demo {
namespace detail {

// Least-significant-digit radix sort by the lowest `digits` bytes.
inline void radix_sort(std::vector<std::uint64_t>& keys, int digits) {
  std::vector<std::uint64_t> other(keys.size());
  for (int digit = 0; digit < digits; ++digit) {
    const int shift = 8 * digit;
    std::array<std::size_t, 257> begin{};
    for (const auto key : keys)
      ++begin[((key >> shift) & 255) + 1];
    for (std::size_t i = 1; i < begin.size(); ++i)
      begin[i] += begin[i - 1];
    for (const auto key : keys)
      other[begin[(key >> shift) & 255]++] = key;
    keys.swap(other);
  }
}

// What followed each context of one length: contexts are sorted, their successors contiguous.
class context_table {
 public:
  // What is known of one context; all zero for one that was never seen.
  struct counts {
    std::uint64_t total = 0;     // times the context was seen with a successor
    std::uint64_t distinct = 0;  // different successors
    std::uint64_t symbol = 0;    // times the asked successor followed
  };

  context_table(std::span<const std::uint8_t> text, std::size_t order) {
    if (text.size() <= order) return;
    std::vector<std::uint64_t> keys;  // context bytes, then the successor in the lowest byte
    keys.reserve(text.size() - order);
    const auto mask = ~std::uint64_t{0} >> (8 * (7 - order));
    std::uint64_t window = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      window = ((window << 8) | text[i]) & mask;
      if (i >= order) keys.push_back(window);
    }
    radix_sort(keys, static_cast<int>(order) + 1);
    for (std::size_t i = 0; i < keys.size();) {
      const auto key = keys[i];
      auto end = i;
      while (end < keys.size() && keys[end] == key)
        ++end;
      add(key >> 8, static_cast<std::uint8_t>(key & 255), static_cast<std::uint32_t>(end - i));
      i = end;
    }
    first_.push_back(static_cast<std::uint32_t>(symbols_.size()));
    build_index();
  }

  [[nodiscard]] counts find(std::uint64_t context, std::uint8_t symbol) const {
    if (contexts_.empty()) return {};
    const auto entry = index_[slot_of(context)];
    if (entry == none) return {};
    counts result{totals_[entry], first_[entry + 1] - first_[entry], 0};
    for (auto i = first_[entry]; i < first_[entry + 1] && symbols_[i] <= symbol; ++i) {
      if (symbols_[i] == symbol) result.symbol = counts_[i];
    }
    return result;
  }

  [[nodiscard]] std::size_t size() const { return contexts_.size(); }

 private:
  static constexpr std::uint32_t none = ~std::uint32_t{0};

  void add(std::uint64_t context, std::uint8_t symbol, std::uint32_t count) {
    if (contexts_.empty() || contexts_.back() != context) {
      contexts_.push_back(context);
      totals_.push_back(0);
      first_.push_back(static_cast<std::uint32_t>(symbols_.size()));
    }
    totals_.back() += count;
    symbols_.push_back(symbol);
    counts_.push_back(count);
  }

  void build_index() {
    std::size_t slots = 16;
    while (slots < 2 * contexts_.size())
      slots *= 2;
    index_.assign(slots, none);
    for (std::size_t i = 0; i < contexts_.size(); ++i) {
      index_[slot_of(contexts_[i])] = static_cast<std::uint32_t>(i);
    }
  }

  [[nodiscard]] std::size_t slot_of(std::uint64_t context) const {
    const auto mask = index_.size() - 1;
    auto slot = static_cast<std::size_t>(mix_bits(context)) & mask;
    while (index_[slot] != none && contexts_[index_[slot]] != context)
      slot = (slot + 1) & mask;
    return slot;
  }

  std::vector<std::uint64_t> contexts_;
  std::vector<std::uint32_t> totals_;
  std::vector<std::uint32_t> first_;  // of a context's successors; one more at the end
  std::vector<std::uint8_t> symbols_;
  std::vector<std::uint32_t> counts_;
  std::vector<std::uint32_t> index_;  // open addressing: slot -> position in contexts_
};

}  // namespace detail

/// An interpolated byte n-gram with Witten-Bell smoothing, the yardstick of the demo's models.
///
///     p_k(c | h) = (count(h, c) + T(h) p_{k-1}(c | h')) / (count(h) + T(h))
///
/// h is the last k bytes, h' the last k - 1, T(h) the number of different bytes seen after h, and
/// p_{-1} = 1 / 256. A context that was never seen leaves p_{k-1} as it is.
/// @cost training O(order^2 n) time; about 30 bytes of memory per distinct context at most, plus
///       16 per byte of text while it trains.
/// @source Witten and Bell 1991, "The zero-frequency problem", method C.
class witten_bell_model {
 public:
  /// @param text   the training bytes, fewer than 2^32.
  /// @param order  the longest context in bytes, 0 to 7.
  /// @throws std::invalid_argument  the order or the length is out of range.
  explicit witten_bell_model(std::span<const std::uint8_t> text, int order = 5) {
    if (order < 0 || order > 7) {
      throw std::invalid_argument("witten_bell_model: the order is " + std::to_string(order) +
                                  ", wanted 0 to 7");
    }
    if (text.size() >= 0xFFFFFFFFu) {
      throw std::invalid_argument("witten_bell_model: the text is " + std::to_string(text.size()) +
                                  " bytes, wanted fewer than 2^32");
    }
    tables_.reserve(static_cast<std::size_t>(order) + 1);
    for (std::size_t k = 0; k <= static_cast<std::size_t>(order); ++k) {
      tables_.emplace_back(text, k);
    }
  }

  [[nodiscard]] int order() const { return static_cast<int>(tables_.size()) - 1; }

  /// The number of different contexts of all lengths that were seen.
  [[nodiscard]] std::size_t context_count() const {
    std::size_t count = 0;
    for (const auto& table : tables_)
      count += table.size();
    return count;
  }

  /// The probability that `next` follows `context`, of which the last order() bytes count.
  [[nodiscard]] double probability(std::span<const std::uint8_t> context, std::uint8_t next) const {
    double p = 1.0 / 256.0;
    std::uint64_t window = 0;
    for (std::size_t k = 0; k < tables_.size() && k <= context.size(); ++k) {
      if (k > 0) window |= std::uint64_t{context[context.size() - k]} << (8 * (k - 1));
      const auto seen = tables_[k].find(window, next);
      if (seen.total == 0) break;  // nor was any longer context that ends in this one
      const auto distinct = static_cast<double>(seen.distinct);
      p = (static_cast<double>(seen.symbol) + distinct * p) /
          (static_cast<double>(seen.total) + distinct);
    }
    return p;
  }

  /// The mean of -log2 probability over a text whose first byte has no context.
  ///
  /// @throws std::invalid_argument  the text is empty.
  [[nodiscard]] double bits_per_byte(std::span<const std::uint8_t> text) const {
    if (text.empty()) {
      throw std::invalid_argument("bits_per_byte: the text is empty, wanted at least one byte");
    }
    double bits = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      bits -= std::log2(probability(text.first(i), text[i]));
    }
    return bits / static_cast<double>(text.size());
  }

 private:
  std::vector<detail::context_table> tables_;
};

}  // namespace demo
