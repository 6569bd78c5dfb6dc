#include "decode_model.cuh"
#include "decode_support.cuh"
#include <ssmlib/decode/sampling.hpp>
#include <ssmlib/kernels/cuda/sample.cuh>
#include <ssmlib/kernels/cuda/skinny.cuh>
#include <ssmlib/kernels/cuda/ssd_step.cuh>

/// @file
/// Checks and times what a decoding step runs on the GPU: products of few rows, the Mamba-2 step,
/// sampling, and a whole step of a 2.7B model.

namespace {

using namespace ssm_test;
using namespace ssm::kernels::cuda;

// ------------------------------------------------------------------------------------- products

struct product_case {
  index_t n, k;
  bool gate = false, normalise = false, bias = false, residual = false;
  index_t group = 0;
};

template <class X, class W, class Y>
struct product_data {
  using real = typename skinny_problem<X, W, Y>::real;

  product_case c;
  static constexpr index_t rows = 64;
  std::vector<X> x, gate;
  std::vector<W> w;
  std::vector<Y> residual;
  std::vector<real> bias, norm;
  device_array<X> dx, dgate;
  device_array<W> dw;
  device_array<Y> dresidual, dy;
  device_array<real> dbias, dnorm;

  explicit product_data(const product_case& wanted)
      : c(wanted),
        x(random_values<X>(rows * c.k, -2, 2, 1)),
        gate(random_values<X>(rows * c.k, -3, 3, 2)),
        w(random_values<W>(c.n * c.k, -1, 1, 3)),
        residual(random_values<Y>(rows * c.n, -1, 1, 4)),
        bias(random_values<real>(c.n, -1, 1, 5)),
        norm(random_values<real>(c.k, 0.5, 1.5, 6)),
        dx(x),
        dgate(gate),
        dw(w),
        dresidual(residual),
        dy(rows * c.n),
        dbias(bias),
        dnorm(norm) {}

  /// The product of rows [first, first + m).
  [[nodiscard]] std::vector<Y> run(cudaStream_t stream, index_t first, index_t m,
                                   rung most = rung::sm_90a) {
    skinny_problem<X, W, Y> p;
    p.x = rows_of<const X>(dx.data() + first * c.k, m, c.k);
    p.w = rows_of<const W>(dw.data(), c.n, c.k);
    p.y = rows_of(dy.data(), m, c.n);
    if (c.gate) p.gate = rows_of<const X>(dgate.data() + first * c.k, m, c.k);
    if (c.residual) p.residual = rows_of<const Y>(dresidual.data() + first * c.n, m, c.n);
    if (c.bias) p.bias = dbias.data();
    p.normalise = c.normalise;
    p.norm_weight = c.normalise ? dnorm.data() : nullptr;
    p.group = c.group;
    p.early = true;
    p.most = most;
    dy.poison();
    const device_array<unsigned char> work(static_cast<index_t>(skinny_workspace_bytes(p)));
    skinny_forward(stream, p, work.data());
    SSMLIB_CHECK_CUDA(cudaStreamSynchronize(stream));
    std::vector<Y> y = dy.download();
    y.resize(static_cast<std::size_t>(m * c.n));
    return y;
  }

  /// Against float64 sums of a sample of the columns.
  [[nodiscard]] double error(const std::vector<Y>& y) const {
    relative_error e;
    const index_t group = c.group == 0 ? c.k : c.group;
    std::vector<double> f(static_cast<std::size_t>(c.k));
    for (index_t i = 0; i < rows; i += 3) {
      for (index_t g = 0; g < c.k; g += group) {
        double squares = 0;
        for (index_t q = g; q < g + group; ++q) {
          f[q] = number(x[i * c.k + q]);
          const double z = number(gate[i * c.k + q]);
          if (c.gate) f[q] *= z / (1 + std::exp(-z));
          squares += f[q] * f[q];
        }
        const double scale = 1 / std::sqrt(squares / static_cast<double>(group) + 1e-5);
        for (index_t q = g; c.normalise && q < g + group; ++q)
          f[q] *= scale * number(norm[q]);
      }
      for (index_t j = i % 7; j<c.n; j += c.n> 1000 ? 41 : 1) {
        double sum = c.bias ? number(bias[j]) : 0;
        if (c.residual) sum += number(residual[i * c.n + j]);
        for (index_t q = 0; q < c.k; ++q)
          sum += f[q] * number(w[j * c.k + q]);
        e.add(number(y[i * c.n + j]), sum);
      }
    }
    return e.value();
  }
};

template <class X, class W, class Y>
void check_product(verdicts& v, cudaStream_t stream, const std::string& types,
                   const product_case& c, double limit) {
  product_data<X, W, Y> data(c);
  const std::vector<Y> all = data.run(stream, 0, 64);
  const std::string name = "skinny " + types + " n " + std::to_string(c.n) + " k " +
                           std::to_string(c.k) + (c.gate ? " gate" : "") +
                           (c.normalise ? " norm" : "") + (c.bias ? " bias" : "") +
                           (c.residual ? " residual" : "");
  const double e = data.error(all);
  v.check(name + ": near float64", e < limit, e);
  bool same = true;
  for (const index_t m : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 63}) {
    for (const index_t first : {index_t{0}, 64 - m}) {
      const std::vector<Y> part = data.run(stream, first, m);
      const std::vector<Y> wanted(all.begin() + first * c.n, all.begin() + (first + m) * c.n);
      if (!same_bits(part, wanted)) {
        if (same) std::printf("  rows [%ld, %ld) differ\n", first, first + m);
        same = false;
      }
    }
  }
  v.check(name + ": rows have the same bits in every batch", same);
  bool rungs = true;
  for (const index_t m : {1, 8, 9, 64}) {
    rungs = rungs && same_bits(data.run(stream, 0, m, rung::sm_80),
                               std::vector<Y>(all.begin(), all.begin() + m * c.n));
  }
  v.check(name + ": the sm_80 rung has the bits of the sm_90a rung", rungs);
}

void check_products(verdicts& v, cudaStream_t s) {
  using std::string;
  const string bbf = "bf16 bf16 float", bbb = "bf16 bf16 bf16", fbf = "float bf16 float";
  check_product<bf16, bf16, float>(v, s, bbf, {10576, 2560}, 1e-5);
  check_product<bf16, bf16, float>(v, s, bbf, {.n = 2560, .k = 5120, .residual = true}, 1e-5);
  check_product<bf16, bf16, float>(v, s, bbf, {.n = 37, .k = 40, .bias = true}, 1e-5);
  check_product<bf16, bf16, float>(v, s, bbf, {.n = 1000, .k = 1096}, 1e-5);
  check_product<bf16, bf16, bf16>(
      v, s, bbb,
      {.n = 300, .k = 768, .gate = true, .normalise = true, .bias = true, .residual = true}, 6e-3);
  check_product<bf16, bf16, bf16>(
      v, s, bbb, {.n = 200, .k = 1024, .gate = true, .normalise = true, .group = 128}, 6e-3);
  check_product<float, bf16, float>(v, s, fbf, {.n = 4099, .k = 2560, .normalise = true}, 5e-3);
  check_product<float, bf16, bf16>(v, s, "float bf16 bf16", {.n = 515, .k = 520, .normalise = true},
                                   6e-3);
  check_product<float, bf16, float>(v, s, fbf, {.n = 130, .k = 99}, 1e-5);
  check_product<bf16, bf16, float>(v, s, bbf, {.n = 64, .k = 77, .normalise = true}, 1e-5);
  check_product<float, float, float>(v, s, "float float float",
                                     {.n = 333, .k = 1001, .normalise = true, .bias = true}, 1e-5);
  check_product<double, double, double>(
      v, s, "double", {.n = 65, .k = 130, .gate = true, .normalise = true, .residual = true},
      1e-13);
}

// ------------------------------------------------------------------------------- the Mamba-2 step

struct step_case {
  index_t sequences, heads, groups, features, key_size, width = 4;
  bool gate = true, ragged = false;
  bool layer = false;  // parameters as a layer holds them: taps by channels, log(-a)
};

/// Inputs of 16 tokens for every sequence, and the memory of one state.
template <class T, class S>
struct step_data {
  using real = ssm::accum_t<T>;
  static constexpr index_t length = 16, ring_rows = 40;

  step_case c;
  index_t inner = c.heads * c.features, channels = inner + 2 * c.groups * c.key_size;
  index_t row = inner + channels + c.heads;  // z, xbc, dt of a token
  std::vector<T> tokens;                     // (sequences, length, row)
  std::vector<real> taps, conv_bias, a, dt_bias, d;
  std::vector<S> start;
  device_array<T> dtokens, dring, dring_dt, dy;
  device_array<real> dtaps, dconv_bias, da, ddt_bias, dd;
  device_array<S> dstate;
  device_array<index_t> dposition, doffsets;
  device_array<std::int32_t> dpending;

  explicit step_data(const step_case& wanted)
      : c(wanted),
        tokens(random_values<T>(c.sequences * length * row, -1.5, 1.5, 11)),
        taps(random_values<real>(c.width * channels, -0.7, 0.7, 12)),
        conv_bias(random_values<real>(channels, -0.2, 0.2, 13)),
        a(random_values<real>(c.heads, -4, -0.5, 14)),
        dt_bias(random_values<real>(c.heads, -5, 0.5, 15)),
        d(random_values<real>(c.heads, 0.5, 1.5, 16)),
        start(random_values<S>(c.sequences * inner * c.key_size, -1, 1, 17)),
        dtokens(c.sequences * length * row),
        dring(c.sequences * ring_rows * channels),
        dring_dt(c.sequences * ring_rows * c.heads),
        dy(c.sequences * length * inner),
        dtaps(taps),
        dconv_bias(conv_bias),
        da(a),
        ddt_bias(dt_bias),
        dd(d),
        dstate(start),
        dposition(c.sequences),
        doffsets(c.sequences + 1),
        dpending(c.sequences) {
    a[0] = real(-1e-4);  // a decay near 1
    if (c.heads > 2) a[2] = real(-400);
    da.upload(a);
    if (c.layer) {
      std::vector<real> by_channel(taps.size()), log_a(a);
      for (index_t j = 0; j < c.width; ++j)
        for (index_t q = 0; q < channels; ++q)
          by_channel[q * c.width + j] = taps[j * channels + q];
      for (real& x : log_a)
        x = std::log(-x);
      dtaps.upload(by_channel);
      da.upload(log_a);
    }
  }

  /// Tokens that sequence i takes of a piece of m: all, or fewer where ragged.
  [[nodiscard]] index_t count(index_t i, index_t m) const {
    return c.ragged ? std::max<index_t>(0, m - i % 3) : m;
  }
  void restart() {
    dstate.upload(start);
    dring.poison();
    dring_dt.poison();
    taken.assign(static_cast<std::size_t>(c.sequences), 0);
    pending.assign(static_cast<std::size_t>(c.sequences), 0);
    outputs.assign(static_cast<std::size_t>(c.sequences * length * inner), T{});
  }
  std::vector<index_t> taken;
  std::vector<std::int32_t> pending;
  std::vector<T> outputs;  // (sequences, length, inner)

  /// Takes the next m tokens; with `replay` all of them stay pending.
  void step(cudaStream_t stream, index_t m, bool replay) {
    std::vector<T> piece;
    std::vector<index_t> offsets{0}, positions = taken;
    for (index_t i = 0; i < c.sequences; ++i) {
      const auto from = tokens.begin() + (i * length + taken[i]) * row;
      piece.insert(piece.end(), from, from + count(i, m) * row);
      offsets.push_back(offsets.back() + count(i, m));
    }
    const index_t total = offsets.back();
    if (total == 0) return;
    piece.resize(static_cast<std::size_t>(c.sequences * length * row));
    dtokens.upload(piece);
    dposition.upload(positions);
    doffsets.upload(offsets);
    dpending.upload(pending);
    dy.poison();
    ssd_step_problem<T, S> p;
    p.heads = c.heads, p.groups = c.groups, p.features = c.features, p.key_size = c.key_size;
    p.sequences = c.sequences, p.max_length = m;
    if (c.ragged) p.offsets = doffsets.data();
    p.z = c.gate ? rows_of<const T>(dtokens.data(), total, inner, row) : view<const T, 2>{};
    p.xbc = rows_of<const T>(dtokens.data() + inner, total, channels, row);
    p.dt = rows_of<const T>(dtokens.data() + inner + channels, total, c.heads, row);
    p.taps = dtaps.data(), p.conv_bias = dconv_bias.data(), p.width = c.width;
    if (c.layer) p.tap_step = 1, p.tap_channel = c.width, p.a_is_log = true;
    p.a = da.data(), p.dt_bias = ddt_bias.data(), p.d = dd.data();
    p.ring.inputs = {
        dring.data(), {c.sequences, ring_rows, channels}, {ring_rows * channels, channels, 1}};
    p.ring.dt = {
        dring_dt.data(), {c.sequences, ring_rows, c.heads}, {ring_rows * c.heads, c.heads, 1}};
    p.position = dposition.data();
    p.state = {dstate.data(),
               {c.sequences, c.heads, c.key_size, c.features},
               {inner * c.key_size, c.features * c.key_size, c.features, 1}};
    p.y = rows_of(dy.data(), total, inner);
    if (replay) p.pending = dpending.data(), p.max_pending = 16;
    p.early = true;
    ssd_step_forward(stream, p);
    SSMLIB_CHECK_CUDA(cudaStreamSynchronize(stream));
    const std::vector<T> y = dy.download();
    for (index_t i = 0; i < c.sequences; ++i) {
      std::copy_n(y.begin() + offsets[i] * inner, count(i, m) * inner,
                  outputs.begin() + (i * length + taken[i]) * inner);
      taken[i] += count(i, m);
      pending[i] = replay ? static_cast<std::int32_t>(count(i, m)) : 0;
    }
  }
  /// Forgets the last n tokens, which must be pending.
  void roll_back(index_t n) {
    for (index_t i = 0; i < c.sequences; ++i) {
      const auto back = static_cast<std::int32_t>(std::min<index_t>(n, pending[i]));
      pending[i] -= back;
      taken[i] -= back;
    }
  }

  /// Outputs and final state against the recurrence in float64, on a sample of heads.
  void errors(relative_error& y_error, relative_error& state_error) const {
    const std::vector<S> final = dstate.download();
    for (index_t i = 0; i < c.sequences; i += std::max<index_t>(1, c.sequences / 5)) {
      for (index_t h = 0; h < c.heads; h += std::max<index_t>(1, c.heads / 7))
        head_errors(i, h, final, y_error, state_error);
    }
  }

 private:
  [[nodiscard]] double convolved(index_t i, index_t t, index_t channel) const {
    double sum = number(conv_bias[channel]);
    for (index_t j = 0; j < c.width; ++j) {
      const index_t s = t - (c.width - 1) + j;
      if (s >= 0) {
        sum += number(taps[j * channels + channel]) *
               number(tokens[(i * length + s) * row + inner + channel]);
      }
    }
    return sum / (1 + std::exp(-sum));
  }
  void head_errors(index_t i, index_t h, const std::vector<S>& final, relative_error& y_error,
                   relative_error& state_error) const {
    const index_t P = c.features, N = c.key_size, g = h * c.groups / c.heads;
    const index_t base = (i * c.heads + h) * P * N;
    std::vector<double> state(static_cast<std::size_t>(P * N)), x(P), b(N), k(N);
    for (index_t e = 0; e < P * N; ++e)
      state[e] = number(start[base + e]);
    for (index_t t = 0; t < taken[i]; ++t) {
      const index_t at = (i * length + t) * row;
      for (index_t q = 0; q < P; ++q)
        x[q] = convolved(i, t, h * P + q);
      for (index_t n = 0; n < N; ++n) {
        b[n] = convolved(i, t, inner + g * N + n);
        k[n] = convolved(i, t, inner + (c.groups + g) * N + n);
      }
      const double r = number(tokens[at + inner + channels + h]) + number(dt_bias[h]);
      const double delta = std::log1p(std::exp(r)), decay = std::exp(delta * number(a[h]));
      for (index_t q = 0; q < P; ++q) {
        double sum = number(d[h]) * x[q];
        for (index_t n = 0; n < N; ++n) {
          double& s = state[n * P + q];
          s = decay * s + delta * b[n] * x[q];
          sum += k[n] * s;
        }
        const double z = number(tokens[at + h * P + q]);
        if (c.gate) sum *= z / (1 + std::exp(-z));
        y_error.add(number(outputs[(i * length + t) * inner + h * P + q]), sum);
      }
    }
    for (index_t e = 0; e < P * N; ++e)
      state_error.add(number(final[base + e]), state[e]);
  }
};

template <class T, class S>
void check_step(verdicts& v, cudaStream_t stream, const std::string& types, const step_case& c,
                double limit, double state_limit) {
  step_data<T, S> data(c);
  const std::string name = "step " + types + " b " + std::to_string(c.sequences) + " H " +
                           std::to_string(c.heads) + " P " + std::to_string(c.features) + " N " +
                           std::to_string(c.key_size) + " G " + std::to_string(c.groups) +
                           (c.ragged ? " ragged" : "") + (c.layer ? " layer" : "");
  data.restart();
  data.step(stream, 16, false);
  relative_error y, state;
  data.errors(y, state);
  v.check(name + ": outputs near float64", y.value() < limit, y.value());
  // Sixteen roundings of a state, each of at most half a unit in the last place.
  v.check(name + ": states near float64", state.value() < state_limit, state.value());
  if (c.ragged) return;
  const std::vector<T> outputs = data.outputs;
  const std::vector<S> states = data.dstate.download();
  bool same = true;
  const std::vector<std::vector<index_t>> splits = {
      std::vector<index_t>(16, 1), {1, 2, 3, 4, 5, 1}, {7, 9}, {13, 3}};
  for (const auto& split : splits) {
    data.restart();
    for (const index_t m : split)
      data.step(stream, m, false);
    same = same && same_bits(outputs, data.outputs) && same_bits(states, data.dstate.download());
  }
  v.check(name + ": same bits for every split", same);

  // Replay: pieces of which some tokens are taken back and taken again.
  data.restart();
  data.step(stream, 5, true);
  data.roll_back(2);
  data.step(stream, 1, true);
  data.step(stream, 8, true);
  data.roll_back(8);
  data.step(stream, 12, true);
  const bool replayed = same_bits(outputs, data.outputs);
  v.check(name + ": replay gives the bits of plain steps", replayed);
}

void check_steps(verdicts& v, cudaStream_t s, bool small) {
  check_step<bf16, float>(v, s, "bf16 float", {3, 80, 1, 64, 128}, 4e-3, 1e-5);
  check_step<bf16, bf16>(v, s, "bf16 bf16", {2, 80, 1, 64, 128}, 6e-3, 4 * 0x1p-9);
  check_step<bf16, float>(v, s, "bf16 float", {5, 8, 4, 64, 64, 3}, 4e-3, 1e-5);
  check_step<bf16, bf16>(v, s, "bf16 bf16", {2, 6, 2, 64, 256}, 6e-3, 4 * 0x1p-9);
  check_step<float, float>(v, s, "float float", {2, 4, 1, 128, 128}, 1e-5, 1e-5);
  check_step<float, float>(v, s, "float float", {1, 80, 8, 64, 128, 2, false}, 1e-5, 1e-5);
  check_step<bf16, float>(v, s, "bf16 float", {3, 7, 7, 40, 24}, 4e-3, 1e-5);
  check_step<bf16, bf16>(v, s, "bf16 bf16", {2, 3, 1, 80, 96, 6}, 6e-3, 4 * 0x1p-9);
  check_step<double, double>(v, s, "double", {2, 4, 2, 24, 40}, 1e-13, 1e-13);
  check_step<bf16, float>(v, s, "bf16 float", {7, 16, 2, 64, 128, 4, true, true}, 4e-3, 1e-5);
  // So many heads that one token takes the kernel that streams the states.
  check_step<bf16, bf16>(v, s, "bf16 bf16", {27, 80, 1, 64, 128}, 6e-3, 4 * 0x1p-9);
  check_step<bf16, float>(v, s, "bf16 float", {30, 75, 5, 64, 128}, 4e-3, 1e-5);
  check_step<bf16, float>(
      v, s, "bf16 float",
      {.sequences = 27, .heads = 80, .groups = 1, .features = 64, .key_size = 128, .layer = true},
      4e-3, 1e-5);
  check_step<bf16, bf16>(v, s, "bf16 bf16", {61, 36, 2, 64, 256, 3, false}, 6e-3, 4 * 0x1p-9);
  check_step<float, float>(v, s, "float float", {50, 50, 5, 64, 64}, 1e-5, 1e-5);
  check_step<bf16, float>(v, s, "bf16 float", {37, 60, 3, 128, 128}, 4e-3, 1e-5);
  if (small) return;
  check_step<bf16, bf16>(v, s, "bf16 bf16", {1, 70001, 1, 8, 8}, 6e-3, 4 * 0x1p-9);
  check_step<bf16, bf16>(v, s, "bf16 bf16", {70001, 1, 1, 8, 8, 4, true, true}, 6e-3, 4 * 0x1p-9);
}

// ------------------------------------------------------------------------------------- sampling

void check_sampling(verdicts& v, cudaStream_t stream) {
  const index_t rows = 6, vocabulary = 50288;
  std::vector<float> logits = random_values<float>(rows * vocabulary, -6, 6, 21);
  for (index_t i = 0; i < 500; ++i)
    logits[vocabulary + 37 * i] = 6.5f;  // equals in row 1
  const device_array<float> dlogits(logits);
  device_array<std::int32_t> dtokens(rows);
  device_array<index_t> dposition(rows);
  const struct {
    const char* name;
    ssm::sampling_options o;
  } cases[] = {
      {"greedy", {}},
      {"temperature", {.temperature = 0.8, .seed = 3}},
      {"top_k", {.temperature = 1.5, .top_k = 40, .seed = 4}},
      {"top_p", {.temperature = 0.6, .top_p = 0.9, .seed = 5}},
      {"min_p", {.temperature = 1.0, .min_p = 0.05, .seed = 6}},
      {"all filters", {.temperature = 0.7, .top_k = 300, .top_p = 0.8, .min_p = 0.3, .seed = 7}}};
  for (const auto& c : cases) {
    index_t wrong = 0;
    std::vector<std::vector<double>> p(rows);
    for (index_t i = 0; i < rows; ++i) {
      ssm::next_token_distribution<float>(
          std::span<const float>(logits.data() + i * vocabulary, vocabulary), c.o, p[i]);
    }
    const index_t draws = c.o.temperature == 0 ? 1 : 40;
    for (index_t draw = 0; draw < draws; ++draw) {
      dposition.upload(std::vector<index_t>(rows, draw));
      dtokens.poison();
      sample_problem<float> problem;
      problem.logits = rows_of<const float>(dlogits.data(), rows, vocabulary);
      problem.temperature = static_cast<float>(c.o.temperature);
      problem.top_k = c.o.top_k, problem.top_p = c.o.top_p, problem.min_p = c.o.min_p;
      problem.seed = c.o.seed, problem.position = dposition.data();
      problem.tokens = dtokens.data();
      sample_forward(stream, problem);
      SSMLIB_CHECK_CUDA(cudaStreamSynchronize(stream));
      const std::vector<std::int32_t> tokens = dtokens.download();
      for (index_t i = 0; i < rows; ++i) {
        wrong +=
            tokens[i] != ssm::pick(p[i], ssm::random_draw(c.o.seed, i, draw, ssm::draw::token));
      }
    }
    // A float weight may move a border between two tokens across the number drawn.
    v.check("sample " + std::string(c.name) + ": the tokens of the float64 distribution (" +
                std::to_string(wrong) + " of " + std::to_string(rows * draws) + " differ)",
            c.o.temperature == 0 ? wrong == 0 : wrong <= 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::strcmp(argv[1], "--small") == 0;  // as under a sanitizer
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("decode_check needs a CUDA device and found none.\n");
    return 2;
  }
  try {
    cudaStream_t stream;
    SSMLIB_CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    verdicts v;
    check_products(v, stream);
    check_steps(v, stream, small);
    check_sampling(v, stream);
    if (!small) {
      check_model(v, stream);
      time_all(stream);
    }
    SSMLIB_CHECK_CUDA(cudaStreamDestroy(stream));
    return v.finish();
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
}
