#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace demo {

/// A piece of text that is never divided between training and held-out text.
struct document {
  std::string name;
  std::vector<std::uint8_t> bytes;
};

/// A document that was left out because most of it is in other documents.
struct removed_document {
  std::string name;
  std::string like;      // the kept document that holds the largest part of it
  double overlap = 0.0;  // share of its shingles found in the kept documents, in [0, 1]
};

namespace detail {

// The finaliser of splitmix64: a bijection that spreads every input bit over all output bits.
inline std::uint64_t mix_bits(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}

// One hash per token: a run of ASCII letters, digits and underscores, one other ASCII character,
// or one UTF-8 character. White space only separates, so re-indenting changes nothing.
inline std::vector<std::uint64_t> token_hashes(std::span<const std::uint8_t> text) {
  constexpr std::size_t longest_run = 64;  // base64 and hex dumps have no word boundaries
  const auto is_word = [](std::uint8_t c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  std::vector<std::uint64_t> tokens;
  std::size_t i = 0;
  while (i < text.size()) {
    if (text[i] <= ' ') {
      ++i;
      continue;
    }
    const auto begin = i++;
    if (is_word(text[begin])) {
      while (i < text.size() && is_word(text[i]) && i - begin < longest_run)
        ++i;
    } else if (text[begin] >= 0x80) {
      while (i < text.size() && (text[i] & 0xC0) == 0x80)
        ++i;
    }
    std::uint64_t hash = 0;
    for (auto j = begin; j < i; ++j)
      hash = mix_bits(hash ^ (text[j] + 0x9e3779b97f4a7c15ULL));
    tokens.push_back(hash);
  }
  return tokens;
}

// The distinct hashes, sorted, of every 8 consecutive tokens (of all tokens if there are fewer).
inline std::vector<std::uint64_t> shingles(std::span<const std::uint8_t> text) {
  constexpr std::size_t width = 8;
  const auto tokens = token_hashes(text);
  std::vector<std::uint64_t> result;
  if (tokens.empty()) return result;
  const auto count = tokens.size() < width ? 1 : tokens.size() - width + 1;
  result.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint64_t hash = 1;
    const auto end = std::min(i + width, tokens.size());
    for (auto j = i; j < end; ++j)
      hash = mix_bits(hash * 0x9e3779b97f4a7c15ULL + tokens[j]);
    result.push_back(hash);
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  return result;
}

// Which document brought a shingle first: an open-addressing hash table, 12 bytes a slot.
class shingle_owners {
 public:
  static constexpr std::uint32_t nobody = ~std::uint32_t{0};

  [[nodiscard]] std::uint32_t find(std::uint64_t key) const { return owners_[slot_of(key)]; }

  void insert(std::uint64_t key, std::uint32_t owner) {
    if (2 * (size_ + 1) > keys_.size()) grow();
    const auto slot = slot_of(key);
    if (owners_[slot] != nobody) return;
    keys_[slot] = key;
    owners_[slot] = owner;
    ++size_;
  }

 private:
  [[nodiscard]] std::size_t slot_of(std::uint64_t key) const {
    const auto mask = keys_.size() - 1;
    auto slot = static_cast<std::size_t>(key) & mask;
    while (owners_[slot] != nobody && keys_[slot] != key)
      slot = (slot + 1) & mask;
    return slot;
  }

  void grow() {
    std::vector<std::uint64_t> keys(2 * keys_.size());
    std::vector<std::uint32_t> owners(2 * owners_.size(), nobody);
    keys.swap(keys_);
    owners.swap(owners_);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (owners[i] == nobody) continue;
      const auto slot = slot_of(keys[i]);
      keys_[slot] = keys[i];
      owners_[slot] = owners[i];
    }
  }

  std::vector<std::uint64_t> keys_ = std::vector<std::uint64_t>(1024);
  std::vector<std::uint32_t> owners_ = std::vector<std::uint32_t>(1024, nobody);
  std::size_t size_ = 0;
};

}  // namespace detail

/// Removes documents of which at least `threshold` is found in other, longer documents.
///
/// The unit is the shingle, 8 consecutive tokens. Documents are taken longest first and compared
/// with the union of those kept, so that a part of a longer file is found as well as a copy, and
/// equal documents leave exactly one. Documents without a token are removed too.
/// @param threshold  share of a document's distinct shingles, in (0, 1].
/// @return the kept documents in their given order; `removed` in the order of its removal.
/// @cost O(bytes) time, about 24 bytes of memory per distinct shingle.
/// @source containment of shingle sets: Broder 1997, "On the resemblance and containment of
///         documents".
[[nodiscard]] inline std::vector<document> without_near_copies(
    std::vector<document> documents, double threshold, std::vector<removed_document>& removed) {
  std::vector<std::size_t> order(documents.size());
  for (std::size_t i = 0; i < order.size(); ++i)
    order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return documents[a].bytes.size() > documents[b].bytes.size();
  });

  detail::shingle_owners owners;
  std::vector<bool> keep(documents.size(), false);
  std::vector<std::size_t> shared(documents.size());
  for (const auto i : order) {
    const auto own = detail::shingles(documents[i].bytes);
    std::fill(shared.begin(), shared.end(), 0);
    std::size_t found = 0;
    for (const auto hash : own) {
      const auto owner = owners.find(hash);
      if (owner == detail::shingle_owners::nobody) continue;
      ++found;
      ++shared[owner];
    }
    const auto overlap =
        own.empty() ? 1.0 : static_cast<double>(found) / static_cast<double>(own.size());
    if (overlap >= threshold) {
      const auto most = std::max_element(shared.begin(), shared.end()) - shared.begin();
      removed.push_back({documents[i].name,
                         own.empty() ? "" : documents[static_cast<std::size_t>(most)].name,
                         overlap});
      continue;
    }
    keep[i] = true;
    for (const auto hash : own)
      owners.insert(hash, static_cast<std::uint32_t>(i));
  }

  std::vector<document> kept;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    if (keep[i]) kept.push_back(std::move(documents[i]));
  }
  return kept;
}

}  // namespace demo
