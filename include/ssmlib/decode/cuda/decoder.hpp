#pragma once

#include <ssmlib/backend/cuda_graph.hpp>
#include <ssmlib/decode/generate.hpp>
#include <ssmlib/kernels/cuda/sample.hpp>
#include <ssmlib/lower/cuda/layout.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace ssm {

/// A model on CUDA whose steps a decoder can record: advance() takes ids from the device, and the
/// state counts tokens that a graph has run.
template <class M, class T = typename M::value_type>
concept RecordableModel = LanguageModel<M> && std::same_as<typename M::backend, cuda> &&
    (std::same_as<T, float> ||
     std::same_as<T, bf16>)&&requires(const M& m, const pass<T, cuda>& p,
                                      typename M::state_type& state,
                                      const tensor<std::int32_t, 2, cuda>& ids,
                                      const sequence_layout& layout) {
  { m.advance(p, state, ids, layout) } -> std::same_as<tensor<T, 3, cuda>>;
  { state.reserve(index_t{1}) } -> std::same_as<bool>;
  { state.can_skip() } -> std::same_as<bool>;
  state.skip(layout);
};

namespace detail {

/// Tokens on their way to the host: two numbers of them may be under way at once.
class token_mail {
 public:
  explicit token_mail(index_t most) : most_(most) {
    const std::size_t bytes = 2 * static_cast<std::size_t>(most) * sizeof(std::int32_t);
    SSMLIB_CHECK_CUDA(
        cudaMallocHost(reinterpret_cast<void**>(&host_), std::max<std::size_t>(bytes, 1)));
    for (cudaEvent_t& event : arrived_)
      SSMLIB_CHECK_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~token_mail() {
    for (cudaEvent_t event : arrived_)
      if (event != nullptr) (void)cudaEventDestroy(event);
    (void)cudaFreeHost(host_);
  }
  token_mail(const token_mail&) = delete;
  token_mail& operator=(const token_mail&) = delete;

  void post(const cuda::context& ctx, const std::int32_t* tokens, index_t n) {
    const std::size_t slot = posted_++ % 2;
    size_[slot] = n;
    SSMLIB_CHECK_CUDA(cudaMemcpyAsync(at(slot), tokens,
                                      static_cast<std::size_t>(n) * sizeof(std::int32_t),
                                      cudaMemcpyDeviceToHost, ctx.stream()));
    SSMLIB_CHECK_CUDA(cudaEventRecord(arrived_[slot], ctx.stream()));
  }
  /// Waits for the oldest that nobody has taken.
  [[nodiscard]] std::span<const std::int32_t> take() {
    const std::size_t slot = taken_++ % 2;
    SSMLIB_CHECK_CUDA(cudaEventSynchronize(arrived_[slot]));
    return {at(slot), static_cast<std::size_t>(size_[slot])};
  }

 private:
  [[nodiscard]] std::int32_t* at(std::size_t slot) const {
    return host_ + slot * static_cast<std::size_t>(most_);
  }

  index_t most_;
  std::int32_t* host_ = nullptr;
  std::array<cudaEvent_t, 2> arrived_{};
  std::array<index_t, 2> size_{};
  std::size_t posted_ = 0, taken_ = 0;
};

}  // namespace detail

/// Sequences that a model on CUDA continues: their state, and for every number of tokens that all
/// of them take in one step a CUDA graph, from the ids on the device to the tokens that follow.
///
/// The first step of a number of tokens is queued as always, the second is recorded, from then on a
/// step is one launch, at any position; its bits are the same in all three. Nothing is allocated
/// from then on, until a cache of keys and values is full: it doubles, and the graphs are made
/// anew. Models with layers that cannot be recorded take every step as the first. bf16 copies of
/// the parameters are made once: make a new decoder after parameters have changed.
template <RecordableModel M>
class decoder {
 public:
  using value_type = typename M::value_type;
  using state_type = typename M::state_type;
  /// Logits of new tokens, and the tokens that were chosen to follow them.
  struct result {
    tensor<value_type, 3, cuda> logits;    ///< (sequences, n, V); the next step overwrites them
    tensor<std::int32_t, 2, cuda> tokens;  ///< (sequences, n), likewise
  };

  /// @param max_rollback  the most tokens that rollback() must be able to undo
  /// @param sampling      how tokens are chosen
  decoder(const M& model, index_t sequences, index_t max_rollback = 0,
          const sampling_options& sampling = {}, const cuda::context& ctx = default_context<cuda>())
      : ctx_(ctx), model_(model), sampling_(sampling) {
    check_sampling(sampling);
    const cuda::scope scope(ctx_);
    state_ = model.initial_state(sequences, max_rollback);
    position_ = tensor<index_t, 1, cuda>(sequences);
    row_sequence_ = tensor<index_t, 1, cuda>(sequences * max_fixed_step);
    row_position_ = tensor<index_t, 1, cuda>(sequences * max_fixed_step);
    tokens_ = tensor<std::int32_t, 1, cuda>(sequences * max_fixed_step);
  }
  ~decoder() { (void)cudaStreamSynchronize(ctx_.stream()); }
  decoder(const decoder&) = delete;
  decoder& operator=(const decoder&) = delete;

  [[nodiscard]] index_t sequences() const { return state_.sequences(); }
  [[nodiscard]] const state_type& state() const { return state_; }
  /// Whether the next step of n tokens is one launch.
  [[nodiscard]] bool is_recorded(index_t n = 1) const {
    const auto found = steps_.find(n);
    return found != steps_.end() && found->second.graph.is_recorded();
  }
  /// Goes on from another state of the model, of as many sequences; the graphs are made anew.
  void set_state(state_type state) {
    if (state.sequences() != sequences()) {
      throw shape_error("ssm: decoder: a state of " + std::to_string(state.sequences()) +
                        " sequences, the decoder has " + std::to_string(sequences()) +
                        "; wanted as many");
    }
    state_ = std::move(state);
    steps_.clear();
    room_ = chosen_ = 0;
  }
  /// Undoes the last n tokens of every sequence, or n[i] of sequence i.
  /// @throws value_error  more than can be undone; nothing changes then.
  void rollback(index_t n) { rollback(detail::same_count(sequences(), n)); }
  void rollback(std::span<const index_t> n) {
    const cuda::scope scope(ctx_);
    state_.rollback(n);
    chosen_ = 0;
  }

  /// Any numbers of new tokens, as prompts are: queued as always.
  /// @return  of the last new token of each sequence: (1, sequences, V), (1, sequences)
  result read(const token_rows& rows) {
    const cuda::scope scope(ctx_);
    const detail::packed_ids packed(rows);
    const auto hidden = model_.advance(pass(), state_, packed.ids, packed.layout);
    const auto logits = model_.head()(pass(), detail::last_tokens(hidden, packed.layout));
    place();
    upload(row_position_.data(), on_device_.data(), sequences());
    sample(logits, nullptr);
    chosen_ = 1;
    return {logits, tokens(1).reshape(1, sequences())};
  }
  /// The same, and the logits of all new tokens, (1, tokens, V); none is chosen.
  tensor<value_type, 3, cuda> read_all(const token_rows& rows) {
    const cuda::scope scope(ctx_);
    const detail::packed_ids packed(rows);
    chosen_ = 0;
    return model_.head()(pass(), model_.advance(pass(), state_, packed.ids, packed.layout));
  }
  /// The next n tokens of every sequence, 1 <= n <= 16.
  /// @param ids  (sequences, n)
  result step(const tensor<std::int32_t, 2>& ids) {
    if (ids.extent(0) != sequences() || ids.extent(1) < 1 || ids.extent(1) > max_fixed_step) {
      throw shape_error("ssm: decoder: ids are " + to_string<2>(ids.extents()) + ", wanted (" +
                        std::to_string(sequences()) + " x 1 to " + std::to_string(max_fixed_step) +
                        "), tokens of every sequence");
    }
    const tensor<std::int32_t, 2> dense = ids.contiguous();
    const auto vocabulary = static_cast<std::int32_t>(model_.head().out_features());
    for (index_t i = 0; i < dense.size(); ++i) {
      if (dense.data()[i] >= 0 && dense.data()[i] < vocabulary) continue;
      throw value_error("ssm: decoder: an id is " + std::to_string(dense.data()[i]) +
                        ", the vocabulary has " + std::to_string(vocabulary) +
                        " entries; wanted 0 <= id < that");
    }
    const cuda::scope scope(ctx_);
    upload(tokens_.data(), dense.data(), dense.size());
    return run(ids.extent(1));
  }
  /// The next token of every sequence is the one that the last read() or step() of one token chose:
  /// the host need not know it.
  /// @throws value_error  there is none.
  result step() {
    if (chosen_ != 1) {
      throw value_error(
          "ssm: decoder: step() goes on from one chosen token a sequence, and the last call left "
          "none; give the ids");
    }
    const cuda::scope scope(ctx_);
    return run(1);
  }

 private:
  struct recorded_step {
    cuda_graph graph;
    sequence_layout layout;
    tensor<value_type, 3, cuda> logits;
  };

  [[nodiscard]] ssm::pass<value_type, cuda> pass() { return {ctx_, nullptr, true, &weights_}; }
  template <class T>
  void upload(T* to, const T* from, index_t n) const {
    detail::elements<cuda>::write(to, from, static_cast<std::size_t>(n) * sizeof(T));
  }
  [[nodiscard]] tensor<std::int32_t, 2, cuda> tokens(index_t n) const {
    return tokens_.slice(0, 0, sequences() * n).reshape(sequences(), n);
  }

  [[nodiscard]] recorded_step& step_of(index_t n) {
    const auto found = steps_.find(n);
    if (found != steps_.end()) return found->second;
    auto copy = std::make_shared<detail::cuda_layout_copy>();
    copy->positions = position_;
    return steps_
        .emplace(n, recorded_step{cuda_graph(ctx_),
                                  sequence_layout::rectangular(sequences(), n).with_copy(copy),
                                  {}})
        .first->second;
  }
  result run(index_t n) {
    make_room(n);
    place();
    recorded_step& s = step_of(n);
    const auto queue = [&] {
      s.logits = {};
      const auto hidden = model_.advance(pass(), state_, tokens(n), s.layout);
      s.logits = model_.head()(pass(), hidden);
      kernels::cuda::count_tokens(ctx_.stream(), position_.data(), sequences(), n,
                                  row_sequence_.data(), row_position_.data());
      sample(s.logits, row_sequence_.data());
    };
    if (!state_.can_skip()) {
      queue();
    } else if (!s.graph.run(queue)) {
      state_.skip(s.layout);
    }
    for (index_t& position : on_device_)
      position += n;
    chosen_ = n;
    return {s.logits, tokens(n)};
  }
  /// For n more tokens of every sequence.
  void make_room(index_t n) {
    index_t longest = 0;
    for (index_t i = 0; i < sequences(); ++i)
      longest = std::max(longest, state_.position(i) + n);
    if (longest <= room_) return;
    room_ = round_up(2 * longest, 256);
    if (state_.reserve(room_)) steps_.clear();
  }
  /// Brings the state's positions to the device, which knows of steps alone.
  void place() {
    std::vector<index_t> positions;
    for (index_t i = 0; i < sequences(); ++i)
      positions.push_back(state_.position(i));
    if (positions == on_device_) return;
    on_device_ = std::move(positions);
    upload(position_.data(), on_device_.data(), sequences());
  }
  /// Chooses a token for each row of the logits.
  void sample(const tensor<value_type, 3, cuda>& logits, const index_t* row_sequence) {
    const index_t rows = logits.extent(0) * logits.extent(1), vocabulary = logits.extent(2);
    kernels::cuda::sample_problem<value_type> p;
    p.logits = {logits.data(), {rows, vocabulary}, {vocabulary, 1}};
    p.temperature = static_cast<float>(sampling_.temperature);
    p.top_k = sampling_.top_k;
    p.top_p = sampling_.top_p;
    p.min_p = sampling_.min_p;
    p.seed = sampling_.seed;
    p.sequence = row_sequence;
    p.position = row_position_.data();
    p.purpose = static_cast<int>(draw::token);
    p.tokens = tokens_.data();
    kernels::cuda::sample_forward<value_type>(ctx_.stream(), p);
  }

  cuda::context ctx_;
  const M& model_;
  sampling_options sampling_;
  weight_cache<value_type, cuda> weights_;
  state_type state_;
  tensor<index_t, 1, cuda> position_, row_sequence_, row_position_;
  tensor<std::int32_t, 1, cuda> tokens_;  // of a step: its ids, then those that follow
  std::vector<index_t> on_device_;        // what position_ holds
  index_t room_ = 0;                      // tokens that fit without moving a cache
  index_t chosen_ = 0;                    // tokens a sequence that tokens_ has chosen
  std::map<index_t, recorded_step> steps_;
};

/// generate() on CUDA: the host reads the tokens of a step while the next one runs, which nobody
/// needs where the last sequence has just ended.
template <RecordableModel M>
[[nodiscard]] token_rows generate_on_device(const M& model, const token_rows& prompts,
                                            const generate_options& options,
                                            const cuda::context& ctx) {
  token_rows result(prompts.size());
  if (prompts.empty() || options.max_new_tokens < 1) return result;
  const auto sequences = static_cast<index_t>(prompts.size());
  detail::token_mail mail(sequences);
  decoder<M> steps(model, sequences, 0, options.sampling, ctx);
  mail.post(ctx, steps.read(prompts).tokens.data(), sequences);
  std::vector<char> ended(prompts.size(), 0);
  for (index_t step = 1;; ++step) {
    const bool last = step == options.max_new_tokens;
    if (!last) mail.post(ctx, steps.step().tokens.data(), sequences);
    const std::span<const std::int32_t> tokens = mail.take();
    for (std::size_t i = 0; i < result.size(); ++i) {
      if (ended[i]) continue;
      result[i].push_back(tokens[i]);
      if (options.on_token) options.on_token(static_cast<index_t>(i), tokens[i]);
      ended[i] = options.stop && tokens[i] == *options.stop;
    }
    if (last || std::ranges::all_of(ended, [](char e) { return e != 0; })) return result;
  }
}

namespace detail {

/// Steps of as many tokens for every sequence run as graphs, others as always.
template <RecordableModel M>
class model_steps<M> {
 public:
  using T = typename M::value_type;

  model_steps(const M& model, index_t sequences, index_t max_rollback, const cuda::context& ctx)
      : ctx_(ctx), steps_(model, sequences, max_rollback, {}, ctx) {}

  [[nodiscard]] index_t position(index_t i) const { return steps_.state().position(i); }
  void rollback(std::span<const index_t> n) { steps_.rollback(n); }
  [[nodiscard]] followers<accum_t<T>> last(const token_rows& rows, bool likeliest_alone) {
    const cuda::scope scope(ctx_);
    const index_t n = common_length(rows);
    if (n == 0) return after(steps_.read(rows), 0, likeliest_alone);
    return after(steps_.step(ids_of(rows, n)), n - 1, likeliest_alone);
  }
  [[nodiscard]] followers<accum_t<T>> all(const token_rows& rows, bool likeliest_alone) {
    const cuda::scope scope(ctx_);
    const index_t n = common_length(rows);
    if (n > 0) return after(steps_.step(ids_of(rows, n)), 0, likeliest_alone);
    return followers<accum_t<T>>::of(logits_on_host(steps_.read_all(rows)), likeliest_alone);
  }

 private:
  /// Of the tokens from `first` on of each row of the results; the decoder chooses greedily.
  [[nodiscard]] static followers<accum_t<T>> after(const typename decoder<M>::result& r,
                                                   index_t first, bool likeliest_alone) {
    if (!likeliest_alone) {
      const auto wanted = logits_on_host(r.logits.slice(1, first, r.logits.extent(1)));
      return {{}, wanted.reshape(1, wanted.extent(0) * wanted.extent(1), wanted.extent(2))};
    }
    const auto wanted = on_host(r.tokens.slice(1, first, r.tokens.extent(1)));
    return {{wanted.data(), wanted.data() + wanted.size()}, {}};
  }
  /// Of all rows, if a graph can take it; else 0.
  [[nodiscard]] static index_t common_length(const token_rows& rows) {
    const auto n = static_cast<index_t>(rows.empty() ? 0 : rows.front().size());
    const auto same = [&](const auto& row) { return static_cast<index_t>(row.size()) == n; };
    return n <= max_fixed_step && std::ranges::all_of(rows, same) ? n : 0;
  }
  [[nodiscard]] static tensor<std::int32_t, 2> ids_of(const token_rows& rows, index_t n) {
    tensor<std::int32_t, 2> ids(static_cast<index_t>(rows.size()), n);
    for (std::size_t i = 0; i < rows.size(); ++i)
      std::ranges::copy(rows[i], &ids(static_cast<index_t>(i), 0));
    return ids;
  }

  const cuda::context& ctx_;
  decoder<M> steps_;
};

}  // namespace detail
}  // namespace ssm
