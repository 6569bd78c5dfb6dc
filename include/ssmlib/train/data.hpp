#pragma once

#include <ssmlib/tensor/layout.hpp>
#include <ssmlib/train/shuffle.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ssm {

/// Token ids in shards (files, documents): their lengths, and any run of ids of one shard. Only
/// what is read needs to be in memory; `token_files` (io/) reads it from files.
template <class S>
concept TokenSource = requires(const S& source, index_t i, std::span<std::int32_t> to) {
  { source.shards() } -> std::convertible_to<index_t>;
  { source.shard_size(i) } -> std::convertible_to<index_t>;
  source.read(i, i, to);  // shard, first token, where to
};

/// What token ids are stored as: bytes of text, or numbers.
template <class Id>
concept TokenId = std::same_as<Id, char> || std::same_as<Id, unsigned char> ||
    std::same_as<Id, std::uint16_t> || std::same_as<Id, std::int32_t>;

namespace detail {

/// Bytes of text are 0 to 255, also where char is signed.
template <TokenId Id>
[[nodiscard]] std::int32_t token_of(Id id) {
  if constexpr (std::same_as<Id, char>) {
    return static_cast<unsigned char>(id);
  } else {
    return static_cast<std::int32_t>(id);
  }
}

}  // namespace detail

/// Tokens that are in memory already. It does not own them.
template <TokenId Id>
class token_spans {
 public:
  explicit token_spans(std::vector<std::span<const Id>> shards) : shards_(std::move(shards)) {}
  explicit token_spans(std::span<const Id> one) : shards_{one} {}
  explicit token_spans(std::string_view text) requires std::same_as<Id, char>
      : shards_{std::span<const char>(text)} {}

  [[nodiscard]] index_t shards() const { return static_cast<index_t>(shards_.size()); }
  [[nodiscard]] index_t shard_size(index_t shard) const {
    return static_cast<index_t>(shards_[static_cast<std::size_t>(shard)].size());
  }
  void read(index_t shard, index_t begin, std::span<std::int32_t> to) const {
    const auto from = shards_[static_cast<std::size_t>(shard)].subspan(
        static_cast<std::size_t>(begin), to.size());
    std::transform(from.begin(), from.end(), to.begin(), detail::token_of<Id>);
  }

 private:
  std::vector<std::span<const Id>> shards_;
};
token_spans(std::string_view)->token_spans<char>;

/// The target of a token that predicts nothing.
inline constexpr std::int32_t no_target = -100;

/// A micro-batch: `targets` are the tokens that follow `inputs`.
struct token_batch {
  tensor<std::int32_t, 2> inputs;   ///< (b, T); with a layout (1, tokens)
  tensor<std::int32_t, 2> targets;  ///< as inputs; no_target where nothing is to be predicted
  sequence_layout layout = {};      ///< packed sequences; default: b sequences of T tokens

  /// The layout, or the rectangle that stands for it.
  [[nodiscard]] sequence_layout sequences() const {
    return layout ? layout : sequence_layout::rectangular(inputs.extent(0), inputs.extent(1));
  }
};

/// Documents of any lengths as one batch without padding. The last token of each has no_target:
/// nothing is predicted across a boundary.
/// @return inputs and targets (1, tokens), and the layout with a sequence a document
[[nodiscard]] inline token_batch pack_documents(
    std::span<const std::vector<std::int32_t>> documents) {
  std::vector<index_t> lengths;
  for (const auto& d : documents)
    lengths.push_back(static_cast<index_t>(d.size()));
  token_batch batch;
  batch.layout = sequence_layout::from_lengths(lengths);
  batch.inputs = tensor<std::int32_t, 2>(1, batch.layout.tokens());
  batch.targets = tensor<std::int32_t, 2>(1, batch.layout.tokens());
  std::int32_t *input = batch.inputs.data(), *target = batch.targets.data();
  for (const auto& d : documents) {
    if (d.empty()) continue;
    input = std::copy(d.begin(), d.end(), input);
    target = std::copy(d.begin() + 1, d.end(), target);
    *target++ = no_target;
  }
  return batch;
}

struct loader_options {
  index_t sequence_length;  ///< T: a sequence has T inputs and T targets
  std::uint64_t seed = 0;
  /// A new order and new cuts in every epoch; without it, the order of the shards from their first
  /// tokens on, for evaluation.
  bool shuffle = true;
};

/// Where a loader is, and what it reads: all that a resumed run needs.
struct loader_state {
  index_t epoch = 0;
  index_t position = 0;  ///< sequences of the epoch that have been given out
  // What the two refer to.
  std::uint64_t seed = 0;
  index_t sequence_length = 0;
  index_t sequences = 0;  ///< in an epoch

  friend bool operator==(const loader_state&, const loader_state&) = default;
};

/// Cuts shards into sequences and gives each of them out exactly once an epoch, for ever.
///
/// A shard of n tokens holds (n - 1) / T sequences. Neighbours share one token, the last target of
/// one and the first input of the next, so that nothing is a target twice. What is left over, less
/// than T tokens, lies before the first or after the last cut, and where is drawn anew in every
/// epoch. A sequence never crosses from one shard into another.
///
/// What comes next depends on the state alone, not on the sizes of the batches before.
template <TokenSource Source>
class data_loader {
 public:
  /// @throws value_error  T < 1, or no shard has T + 1 tokens.
  data_loader(Source source, const loader_options& options);

  /// The next `sequences` sequences, running on into the next epoch.
  /// @throws value_error  sequences < 1
  /// @cost O(1) and one read a sequence.
  [[nodiscard]] token_batch next(index_t sequences);

  [[nodiscard]] loader_state state() const { return state_; }
  /// Goes on where a loader with the same data and options was.
  /// @throws value_error  the state is of other data, of another seed or of another length.
  void restore(const loader_state& state);

  [[nodiscard]] index_t sequences_per_epoch() const { return state_.sequences; }
  [[nodiscard]] index_t sequence_length() const { return options_.sequence_length; }

 private:
  void read_sequence(index_t number, std::span<std::int32_t> tokens) const;

  Source source_;
  loader_options options_;
  std::vector<index_t> first_sequence_;  // of each shard in an epoch, and the total
  loader_state state_;
  std::vector<std::int32_t> tokens_;
};

template <TokenSource Source>
data_loader<Source>::data_loader(Source source, const loader_options& options)
    : source_(std::move(source)), options_(options) {
  const index_t T = options.sequence_length;
  if (T < 1) {
    throw value_error("ssm: data_loader: a sequence length of " + std::to_string(T) +
                      "; wanted >= 1");
  }
  index_t total = 0, longest = 0;
  first_sequence_.push_back(0);
  for (index_t i = 0; i < source_.shards(); ++i) {
    const index_t size = source_.shard_size(i);
    longest = std::max(longest, size);
    total += std::max<index_t>(size - 1, 0) / T;
    first_sequence_.push_back(total);
  }
  if (total == 0) {
    throw value_error("ssm: data_loader: the longest of " + std::to_string(source_.shards()) +
                      " shards has " + std::to_string(longest) + " tokens, a sequence needs " +
                      std::to_string(T + 1) + "; join shards or shorten the sequences");
  }
  state_ = {0, 0, options.seed, T, total};
  tokens_.resize(static_cast<std::size_t>(T + 1));
}

template <TokenSource Source>
void data_loader<Source>::read_sequence(index_t number, std::span<std::int32_t> tokens) const {
  const auto after = std::upper_bound(first_sequence_.begin(), first_sequence_.end(), number);
  const index_t shard = after - first_sequence_.begin() - 1;
  const index_t T = options_.sequence_length;
  const index_t in_shard = number - *(after - 1);
  index_t begin = in_shard * T;
  if (options_.shuffle) {
    // One draw a shard and epoch, from a stream that no permutation uses.
    const index_t left_over = (source_.shard_size(shard) - 1) % T;
    philox draw(~options_.seed,
                static_cast<std::uint64_t>(state_.epoch) << 32 ^ static_cast<std::uint64_t>(shard));
    begin += draw.below(left_over + 1);
  }
  source_.read(shard, begin, tokens);
}

template <TokenSource Source>
token_batch data_loader<Source>::next(index_t sequences) {
  if (sequences < 1) {
    throw value_error("ssm: data_loader: next(" + std::to_string(sequences) +
                      " sequences); wanted >= 1");
  }
  const index_t T = options_.sequence_length;
  token_batch batch{
      tensor<std::int32_t, 2>(sequences, T), tensor<std::int32_t, 2>(sequences, T), {}};
  const loader_state before = state_;
  try {
    for (index_t b = 0; b < sequences; ++b) {
      const random_permutation order(state_.sequences, state_.seed,
                                     static_cast<std::uint64_t>(state_.epoch));
      read_sequence(options_.shuffle ? order(state_.position) : state_.position, tokens_);
      std::copy_n(tokens_.begin(), T, &batch.inputs(b, 0));
      std::copy_n(tokens_.begin() + 1, T, &batch.targets(b, 0));
      if (++state_.position == state_.sequences) {
        state_.position = 0;
        ++state_.epoch;
      }
    }
  } catch (...) {
    state_ = before;  // a file that cannot be read now may be read later
    throw;
  }
  return batch;
}

template <TokenSource Source>
void data_loader<Source>::restore(const loader_state& state) {
  if (state.seed != state_.seed || state.sequence_length != state_.sequence_length ||
      state.sequences != state_.sequences) {
    const auto text = [](const loader_state& s) {
      return std::to_string(s.sequences) + " sequences of " + std::to_string(s.sequence_length) +
             " tokens with the seed " + std::to_string(s.seed);
    };
    throw value_error("ssm: data_loader: the state is of " + text(state) + ", the loader has " +
                      text(state_) + "; resume with the same data and options");
  }
  if (state.epoch < 0 || state.position < 0 || state.position >= state.sequences) {
    throw value_error("ssm: data_loader: a state at epoch " + std::to_string(state.epoch) +
                      ", position " + std::to_string(state.position) + " of " +
                      std::to_string(state.sequences) + "; wanted one inside an epoch");
  }
  state_ = state;
}

}  // namespace ssm
