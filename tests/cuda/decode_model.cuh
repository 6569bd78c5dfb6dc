#pragma once

#include "decode_support.cuh"
#include <ssmlib/kernels/cuda/sample.cuh>
#include <ssmlib/kernels/cuda/skinny.cuh>
#include <ssmlib/kernels/cuda/ssd_step.cuh>

#include <cstdio>
#include <string>
#include <vector>

/// @file
/// A Mamba-2 language model of random weights that decodes in one graph a step, and the times of
/// its parts.

namespace ssm_test {

namespace cuda_kernels = ssm::kernels::cuda;

/// The 2.7B shape.
struct model_shape {
  index_t layers = 64, width = 2560, heads = 80, features = 64, key_size = 128, vocabulary = 50288;

  [[nodiscard]] index_t inner() const { return heads * features; }
  [[nodiscard]] index_t channels() const { return inner() + 2 * key_size; }
  [[nodiscard]] index_t row() const { return inner() + channels() + heads; }
  [[nodiscard]] double weight_bytes() const {
    return 2.0 *
           static_cast<double>(layers * (row() * width + inner() * width) + vocabulary * width);
  }
};

/// Uniform bf16 or float in [low, high) from a hash of the place.
template <class T>
__global__ void fill_kernel(T* to, index_t n, float low, float high, std::uint32_t seed) {
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < n;
       i += index_t{gridDim.x} * blockDim.x) {
    std::uint64_t h = (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u + seed;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    const float u = static_cast<float>((h ^ (h >> 31)) >> 40) * 0x1p-24f;
    to[i] = cuda_kernels::narrow<T>(low + (high - low) * u);
  }
}
template <class T>
[[nodiscard]] device_array<T> filled(index_t n, double low, double high, std::uint32_t seed) {
  device_array<T> a(n);
  fill_kernel<<<1024, 256>>>(a.data(), n, static_cast<float>(low), static_cast<float>(high), seed);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  return a;
}

/// A block a row: the token's embedding becomes the residual stream.
template <class T>
__global__ void embed_kernel(const T* embedding, const std::int32_t* tokens, float* x,
                             index_t width) {
  cuda_kernels::wait_for_kernel_ahead();
  cuda_kernels::let_next_kernel_start();
  const T* from = embedding + tokens[blockIdx.x] * width;
  for (index_t c = threadIdx.x; c < width; c += blockDim.x)
    x[blockIdx.x * width + c] = cuda_kernels::widen(from[c]);
}
/// Every sequence has taken `tokens` more, which stay pending where tokens are replayed.
template <class Count>
__global__ void moved_kernel(index_t* position, std::int32_t* pending, index_t sequences,
                             Count tokens) {
  for (index_t i = threadIdx.x; i < sequences; i += blockDim.x) {
    position[i] += tokens;
    pending[i] = tokens;
  }
}

struct model_weights {
  model_shape shape;
  device_array<bf16> in, out, head;
  device_array<float> norm, taps, conv_bias, a, dt_bias, d;

  explicit model_weights(const model_shape& s)
      : shape(s),
        in(filled<bf16>(s.layers * s.row() * s.width, -0.034, 0.034, 1)),
        out(filled<bf16>(s.layers * s.width * s.inner(), -0.012, 0.012, 2)),
        head(filled<bf16>(s.vocabulary * s.width, -0.034, 0.034, 3)),
        norm(filled<float>(s.layers * s.inner(), 0.8, 1.2, 4)),
        taps(filled<float>(s.layers * 4 * s.channels(), -0.5, 0.5, 5)),
        conv_bias(filled<float>(s.layers * s.channels(), -0.1, 0.1, 6)),
        a(filled<float>(s.layers * s.heads, -16, -1, 7)),
        dt_bias(filled<float>(s.layers * s.heads, -6, -2, 8)),
        d(filled<float>(s.layers * s.heads, 0.5, 1.5, 9)) {}
};

/// The state of some sequences and the memory of a step of up to 16 tokens each.
template <class S>
class decoder {
 public:
  static constexpr index_t ring_rows = 40;

  decoder(const model_weights& weights, index_t sequences, index_t max_tokens)
      : w_(weights),
        s_(weights.shape),
        sequences_(sequences),
        x_(rows(max_tokens) * s_.width),
        logits(rows(max_tokens) * s_.vocabulary),
        projected_(rows(max_tokens) * s_.row()),
        mixed_(rows(max_tokens) * s_.inner()),
        state_(s_.layers * sequences * s_.inner() * s_.key_size),
        ring_(s_.layers * sequences * ring_rows * s_.channels()),
        ring_dt_(s_.layers * sequences * ring_rows * s_.heads),
        work_(64 * s_.inner() * 2),
        position_(sequences),
        pending_(sequences),
        tokens(rows(max_tokens)),
        sampled(rows(max_tokens)) {
    restart();
  }

  void restart() {
    state_.zero();
    position_.zero();
    pending_.zero();
    tokens.zero();
    ring_.poison();
  }

  void in_projection(cudaStream_t stream, index_t layer, index_t m) {
    cuda_kernels::skinny_problem<float, bf16, bf16> p;
    p.x = rows_of<const float>(x_.data(), rows(m), s_.width);
    p.w = rows_of<const bf16>(w_.in.data() + layer * s_.row() * s_.width, s_.row(), s_.width);
    p.y = rows_of(projected_.data(), rows(m), s_.row());
    p.normalise = true, p.norm_weight = w_.norm.data() + layer * s_.inner();
    p.early = true;
    cuda_kernels::skinny_forward(stream, p, work_.data());
  }
  /// `update_alone`: without convolution, activation and gate, as the peers' kernels.
  void mix(cudaStream_t stream, index_t layer, index_t m, bool replay, bool update_alone = false) {
    cuda_kernels::ssd_step_problem<bf16, S> p;
    const index_t inner = s_.inner(), channels = s_.channels(), heads = s_.heads;
    p.heads = heads, p.features = s_.features, p.key_size = s_.key_size;
    p.sequences = sequences_, p.max_length = m;
    p.z = rows_of<const bf16>(projected_.data(), rows(m), inner, s_.row());
    p.xbc = rows_of<const bf16>(projected_.data() + inner, rows(m), channels, s_.row());
    p.dt = rows_of<const bf16>(projected_.data() + inner + channels, rows(m), heads, s_.row());
    p.taps = w_.taps.data() + layer * 4 * channels;
    p.conv_bias = w_.conv_bias.data() + layer * channels;
    p.a = w_.a.data() + layer * heads, p.dt_bias = w_.dt_bias.data() + layer * heads;
    p.d = w_.d.data() + layer * heads;
    p.ring.inputs = {ring_.data() + layer * sequences_ * ring_rows * channels,
                     {sequences_, ring_rows, channels},
                     {ring_rows * channels, channels, 1}};
    p.ring.dt = {ring_dt_.data() + layer * sequences_ * ring_rows * heads,
                 {sequences_, ring_rows, heads},
                 {ring_rows * heads, heads, 1}};
    p.position = position_.data();
    p.state = {state_.data() + layer * sequences_ * inner * s_.key_size,
               {sequences_, heads, s_.key_size, s_.features},
               {inner * s_.key_size, s_.features * s_.key_size, s_.features, 1}};
    p.y = rows_of(mixed_.data(), rows(m), inner);
    if (replay) p.pending = pending_.data(), p.max_pending = 16;
    if (update_alone) p.z = {}, p.width = 1, p.conv_bias = nullptr, p.activate = false;
    p.early = true;
    cuda_kernels::ssd_step_forward(stream, p);
  }
  void out_projection(cudaStream_t stream, index_t layer, index_t m) {
    cuda_kernels::skinny_problem<bf16, bf16, float> p;
    p.x = rows_of<const bf16>(mixed_.data(), rows(m), s_.inner());
    p.w = rows_of<const bf16>(w_.out.data() + layer * s_.width * s_.inner(), s_.width, s_.inner());
    p.y = rows_of(x_.data(), rows(m), s_.width);
    p.residual = p.y;
    p.normalise = true, p.norm_weight = w_.norm.data() + layer * s_.inner();
    p.early = true;
    cuda_kernels::skinny_forward(stream, p, work_.data());
  }
  void head(cudaStream_t stream, index_t m) {
    cuda_kernels::skinny_problem<float, bf16, float> p;
    p.x = rows_of<const float>(x_.data(), rows(m), s_.width);
    p.w = rows_of<const bf16>(w_.head.data(), s_.vocabulary, s_.width);
    p.y = rows_of(logits.data(), rows(m), s_.vocabulary);
    p.normalise = true, p.norm_weight = w_.norm.data();
    p.early = true;
    cuda_kernels::skinny_forward(stream, p, work_.data());
  }
  /// The next m tokens of every sequence: logits and the most likely tokens after each.
  void step(cudaStream_t stream, index_t m, bool replay) {
    embed_kernel<<<static_cast<unsigned>(rows(m)), 256, 0, stream>>>(w_.head.data(), tokens.data(),
                                                                     x_.data(), s_.width);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
    for (index_t layer = 0; layer < s_.layers; ++layer) {
      in_projection(stream, layer, m);
      mix(stream, layer, m, replay);
      out_projection(stream, layer, m);
    }
    head(stream, m);
    cuda_kernels::sample_problem<float> p;
    p.logits = rows_of<const float>(logits.data(), rows(m), s_.vocabulary);
    p.tokens = sampled.data();
    cuda_kernels::sample_forward(stream, p);
    moved_kernel<<<1, 64, 0, stream>>>(position_.data(), pending_.data(), sequences_,
                                       static_cast<int>(m));
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }

 private:
  [[nodiscard]] index_t rows(index_t m) const { return sequences_ * m; }

  const model_weights& w_;
  model_shape s_;
  index_t sequences_;
  device_array<float> x_;

 public:
  device_array<float> logits;

 private:
  device_array<bf16> projected_, mixed_;
  device_array<S> state_;
  device_array<bf16> ring_, ring_dt_;
  device_array<unsigned char> work_;
  device_array<index_t> position_;
  device_array<std::int32_t> pending_;

 public:
  device_array<std::int32_t> tokens, sampled;
};

/// Logits of 8 tokens taken by pieces through the given graph-recorded steps.
template <class S>
[[nodiscard]] std::vector<float> decode_pieces(cudaStream_t stream, decoder<S>& d,
                                               const std::vector<std::int32_t>& text,
                                               const std::vector<index_t>& pieces, bool replay,
                                               index_t vocabulary) {
  std::vector<float> all;
  d.restart();
  std::size_t taken = 0;
  for (const index_t m : pieces) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(d.tokens.size()));
    std::copy_n(text.begin() + taken, m, tokens.begin());
    d.tokens.upload(tokens);
    d.logits.poison();
    const graph step(stream, [&] { d.step(stream, m, replay); });
    step.launch();
    SSMLIB_CHECK_CUDA(cudaStreamSynchronize(stream));
    const std::vector<float> logits = d.logits.download();
    all.insert(all.end(), logits.begin(), logits.begin() + m * vocabulary);
    taken += static_cast<std::size_t>(m);
  }
  return all;
}

inline void check_model(verdicts& v, cudaStream_t stream) {
  model_shape shape;
  shape.layers = 3;
  const model_weights weights(shape);
  decoder<bf16> d(weights, 1, 16);
  const std::vector<std::int32_t> text = {5, 77, 50000, 1, 4242, 9, 31, 7, 12, 900, 3, 8, 2, 6};
  const auto run = [&](const std::vector<index_t>& pieces, bool replay) {
    return decode_pieces(stream, d, text, pieces, replay, shape.vocabulary);
  };
  const std::vector<float> one = run(std::vector<index_t>(14, 1), false);
  double sum = 0;
  for (const float x : one)
    sum += static_cast<double>(x) * static_cast<double>(x);
  v.check("model: logits are numbers", std::isfinite(sum) && sum > 0);
  v.check("model: tokens taken 2, 3, 8 and 1 at a time give the bits of one at a time",
          same_bits(one, run({2, 3, 8, 1}, false)));
  v.check("model: 14 tokens at once give the bits of one at a time",
          same_bits(one, run({14}, false)));
  v.check("model: verification with replay gives the bits of one at a time",
          same_bits(one, run({1, 4, 8, 1}, true)));
}

/// Prints times beside the fewest bytes at the speed of a copy, peers and goals.
class times_table {
 public:
  explicit times_table(double bandwidth) : bandwidth_(bandwidth) {
    std::printf("copy %.3f TB/s\n%-44s %9s %9s %6s %9s %9s\n", bandwidth * 1e-12, "", "ms", "floor",
                "share", "peer", "goal");
  }
  void row(const std::string& name, double ms, double bytes, double peer = 0,
           double goal = 0) const {
    const double floor = 1e3 * bytes / bandwidth_;
    std::printf("%-44s %9.4f %9.4f %5.1f%%", name.c_str(), ms, floor, 100 * floor / ms);
    peer > 0 ? std::printf(" %9.4f", peer) : std::printf(" %9s", "");
    goal > 0 ? std::printf(" %9.4f\n", goal) : std::printf("\n");
  }

 private:
  double bandwidth_;
};

template <class S>
void time_batch(cudaStream_t stream, const times_table& table, const model_weights& weights,
                index_t batch, double peer, double goal, double step_peer) {
  const model_shape& s = weights.shape;
  decoder<S> d(weights, batch, 1);
  const std::string name = " b" + std::to_string(batch) + (sizeof(S) == 4 ? " f32 state" : "");
  const double state = 2.0 * static_cast<double>(batch * s.inner() * s.key_size * sizeof(S));
  const double layers = static_cast<double>(s.layers);
  const graph step(stream, [&] { d.step(stream, 1, false); });
  for (int i = 0; i < 5; ++i)
    step.launch();  // so that the parts meet inputs of tokens before
  double parts = 0;
  const auto part = [&](const char* what, int count, double bytes, auto run, double its_peer = 0) {
    const graph repeated(stream, [&] {
      for (int i = 0; i < count; ++i)
        run(i);
    });
    const double ms = repeated.time(10) / count;
    table.row(what + name, ms, bytes, its_peer);
    return ms;
  };
  const int all = static_cast<int>(s.layers);
  parts += layers * part("in projection", all, 2.0 * static_cast<double>(s.row() * s.width),
                         [&](int l) { d.in_projection(stream, l, 1); });
  parts += layers * part("state step", all, state, [&](int l) { d.mix(stream, l, 1, false); });
  part(
      "state update alone", all, state, [&](int l) { d.mix(stream, l, 1, false, true); },
      step_peer);
  parts += layers * part("out projection", all, 2.0 * static_cast<double>(s.inner() * s.width),
                         [&](int l) { d.out_projection(stream, l, 1); });
  parts += part("head", 4, 2.0 * static_cast<double>(s.vocabulary * s.width),
                [&](int) { d.head(stream, 1); });
  table.row("sum of a step's parts" + name, parts, s.weight_bytes() + layers * state);
  table.row("step" + name, step.time(), s.weight_bytes() + layers * state, peer, goal);
  table.row("step again" + name, step.time(), s.weight_bytes() + layers * state, peer, goal);
}

inline void time_all(cudaStream_t stream) {
  const times_table table(copy_bandwidth(stream));
  const model_weights weights{model_shape{}};
  time_batch<bf16>(stream, table, weights, 1, 3.65, 2.1, 0.0035);
  time_batch<bf16>(stream, table, weights, 8, 4.50, 2.6, 0.0096);
  time_batch<bf16>(stream, table, weights, 64, 10.1, 6.2, 0.066);
  time_batch<float>(stream, table, weights, 64, 11.4, 9.9, 0);
  decoder<bf16> d(weights, 1, 16);
  const model_shape& s = weights.shape;
  const double bytes =
      s.weight_bytes() + 4.0 * static_cast<double>(s.layers * s.inner() * s.key_size);
  const graph one(stream, [&] { d.step(stream, 1, false); });
  const double plain = one.time();
  for (const index_t m : {1, 2, 4, 8, 16}) {
    d.restart();
    const graph verify(stream, [&] { d.step(stream, m, true); });
    const double ms = verify.time();
    const double peer = m == 2 ? 3.51 : m == 4 ? 3.59 : m == 8 ? 3.75 : 0;
    table.row("verify " + std::to_string(m) + ", replay of as many, " +
                  std::to_string(ms / plain).substr(0, 5) + " steps",
              ms, bytes, peer, m <= 8 ? 1.08 * plain : 0);
    // Tokens stay pending from the step that was timed.
    const graph mix(stream, [&] {
      for (index_t l = 0; l < s.layers; ++l)
        d.mix(stream, l, m, true);
    });
    table.row("state step of " + std::to_string(m) + " with replay",
              mix.time(10) / static_cast<double>(s.layers),
              2.0 * 2.0 * static_cast<double>(s.inner() * s.key_size));
  }
}

}  // namespace ssm_test
