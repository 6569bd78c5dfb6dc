// Checks the scalar-gated recurrence on the device against a float64 recurrence on the host, then
// times the shapes of the published kernels. Exits with 1 on a failure, 2 without a device.
#include <ssmlib/kernels/cuda/ssd_backward.cuh>
#include <ssmlib/kernels/cuda/ssd_forward.cuh>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace {

using ssm::bf16;
using ssm::index_t;
using ssm::view;
namespace cuda = ssm::kernels::cuda;
using cuda::rung;

bool failed = false;

double wide(double x) {
  return x;
}
double wide(float x) {
  return x;
}
double wide(bf16 x) {
  return static_cast<double>(static_cast<float>(x));
}
template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

template <class T>
struct buffer {
  T* data = nullptr;
  std::size_t size = 0;

  explicit buffer(std::size_t n) : size(n) {
    SSMLIB_CHECK_CUDA(cudaMalloc(&data, std::max<std::size_t>(n, 1) * sizeof(T)));
    SSMLIB_CHECK_CUDA(cudaMemset(data, 0xff, n * sizeof(T)));  // NaN
  }
  explicit buffer(const std::vector<T>& v) : buffer(v.size()) {
    SSMLIB_CHECK_CUDA(cudaMemcpy(data, v.data(), size * sizeof(T), cudaMemcpyHostToDevice));
  }
  buffer(const buffer&) = delete;
  ~buffer() { cudaFree(data); }
  [[nodiscard]] std::vector<T> host() const {
    std::vector<T> v(size);
    SSMLIB_CHECK_CUDA(cudaMemcpy(v.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
};

template <class T, std::size_t R>
view<T, static_cast<int>(R)> dense(T* data, const std::array<index_t, R>& extents) {
  return {data, extents, ssm::dense_strides(extents)};
}

enum class decay { none, log_a, gamma, dt };

struct shape {
  const char* name;
  std::vector<index_t> lengths;
  index_t heads, gq, gk, gx, N, P;
  decay kind;
  bool states = false, d = true, ragged = false;
  double alpha = 1.0, reset = 0.0;  // the share of tokens whose decay is zero
};

/// One problem with its operands on the host, in double and rounded to T, and on the device.
template <class T>
struct example {
  using real = ssm::accum_t<T>;

  shape c;
  index_t tokens, width, longest = 0;
  std::vector<index_t> offsets;
  std::vector<T> rows, dt;  // x, k, q side by side in one row a token
  std::vector<real> log_a, weight, gamma, d, bias, a, initial;

  explicit example(const shape& shape_, unsigned seed) : c(shape_) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    offsets = {c.ragged ? 3 : 0};
    for (const index_t n : c.lengths) {
      offsets.push_back(offsets.back() + n);
      longest = std::max(longest, n);
    }
    tokens = offsets.back() + (c.ragged ? 2 : 0);
    width = c.gx * c.P + (c.gk + c.gq) * c.N;
    const auto fill = [&](auto& v, index_t n, auto&& draw) {
      v.resize(static_cast<std::size_t>(n));
      for (auto& e : v)
        e = rounded<std::decay_t<decltype(e)>>(draw());
    };
    const auto gauss = [&] { return normal(random); };
    fill(rows, tokens * width, gauss);
    for (index_t t = 0; t < tokens; ++t) {  // what is outside the sequences must not matter
      if (t >= offsets.front() && t < offsets.back()) continue;
      std::fill_n(rows.begin() + t * width, width, rounded<T>(NAN));
    }
    if (c.kind == decay::log_a) {
      fill(log_a, tokens * c.heads,
           [&] { return uniform(random) < c.reset ? -INFINITY : -0.2 * std::abs(gauss()); });
      fill(weight, tokens * c.heads, gauss);
    }
    if (c.kind == decay::gamma) fill(gamma, c.heads, [&] { return 0.85 + 0.14 * uniform(random); });
    if (c.kind == decay::dt) {
      fill(dt, tokens * c.heads, gauss);
      fill(bias, c.heads, [&] { return -4.0 + 3.0 * uniform(random); });
      fill(a, c.heads, [&] { return -1.0 - 15.0 * uniform(random); });
    }
    if (c.d) fill(d, c.heads, gauss);
    if (c.states) {
      fill(initial, static_cast<index_t>(c.lengths.size()) * c.heads * c.N * c.P, gauss);
    }
  }

  [[nodiscard]] double decay_of(index_t t, index_t h, double& w) const {
    const auto at = static_cast<std::size_t>(t * c.heads + h), head = static_cast<std::size_t>(h);
    w = weight.empty() ? 1.0 : wide(weight[at]);
    if (!log_a.empty()) return std::exp(wide(log_a[at]));
    if (!gamma.empty()) return wide(gamma[head]);
    if (dt.empty()) return 1.0;
    w = std::log1p(std::exp(wide(dt[at]) + wide(bias[head])));
    return std::exp(wide(a[head]) * w);
  }
  [[nodiscard]] double x(index_t t, index_t h, index_t p) const {
    return wide(
        rows[static_cast<std::size_t>(t * width + ssm::group_of(h, c.heads, c.gx) * c.P + p)]);
  }
  [[nodiscard]] const T* k(index_t t, index_t h) const {
    return rows.data() + t * width + c.gx * c.P + ssm::group_of(h, c.heads, c.gk) * c.N;
  }
  [[nodiscard]] const T* q(index_t t, index_t h) const {
    return rows.data() + t * width + c.gx * c.P + c.gk * c.N +
           ssm::group_of(h, c.heads, c.gq) * c.N;
  }
  /// The recurrence for one sequence and head; state is (N x P).
  void reference(index_t s, index_t h, std::vector<double>& y, std::vector<double>& state) const {
    state.assign(static_cast<std::size_t>(c.N * c.P), 0.0);
    y.clear();
    if (!initial.empty()) {
      for (index_t e = 0; e < c.N * c.P; ++e)
        state[e] = wide(initial[static_cast<std::size_t>((s * c.heads + h) * c.N * c.P + e)]);
    }
    std::vector<double> row(static_cast<std::size_t>(c.P));
    for (index_t t = offsets[s]; t < offsets[s + 1]; ++t) {
      double w;
      const double a_t = decay_of(t, h, w);
      const T *key = k(t, h), *query = q(t, h);
      for (index_t p = 0; p < c.P; ++p)
        row[p] = (d.empty() ? 0.0 : wide(d[h])) * x(t, h, p);
      for (index_t n = 0; n < c.N; ++n) {
        const double wk = w * wide(key[n]), aq = c.alpha * wide(query[n]);
        for (index_t p = 0; p < c.P; ++p) {
          double& e = state[n * c.P + p];
          e = a_t * e + wk * x(t, h, p);
          row[p] += aq * e;
        }
      }
      y.insert(y.end(), row.begin(), row.end());
    }
  }
};

/// An example's operands on the device.
template <class T>
struct on_device {
  using real = ssm::accum_t<T>;

  buffer<T> rows, dt;
  buffer<real> log_a, weight, gamma, d, bias, a, states;
  buffer<index_t> offsets;
  cuda::ssd_problem<T> p;
  cuda::ssd_states<T> io;

  explicit on_device(const example<T>& e)
      : rows(e.rows),
        dt(e.dt),
        log_a(e.log_a),
        weight(e.weight),
        gamma(e.gamma),
        d(e.d),
        bias(e.bias),
        a(e.a),
        states(e.initial),
        offsets(e.offsets) {
    const shape& c = e.c;
    const auto part = [&](index_t from, index_t groups, index_t columns) {
      return view<const T, 3>{rows.data + from, {e.tokens, groups, columns}, {e.width, columns, 1}};
    };
    const auto sequences = static_cast<index_t>(c.lengths.size());
    p.heads = c.heads;
    p.x = part(0, c.gx, c.P);
    p.k = part(c.gx * c.P, c.gk, c.N);
    p.q = part(c.gx * c.P + c.gk * c.N, c.gq, c.N);
    const std::array<index_t, 2> steps{e.tokens, c.heads};
    const std::array<index_t, 1> heads{c.heads};
    if (log_a.size) p.log_a = dense<const real>(log_a.data, steps);
    if (weight.size) p.weight = dense<const real>(weight.data, steps);
    if (dt.size) p.dt = dense<const T>(dt.data, steps);
    if (gamma.size) p.gamma = dense<const real>(gamma.data, heads);
    if (d.size) p.d = dense<const real>(d.data, heads);
    if (bias.size) p.dt_bias = dense<const real>(bias.data, heads);
    if (a.size) p.a = dense<const real>(a.data, heads);
    p.alpha = static_cast<real>(c.alpha);
    p.offsets = c.ragged ? offsets.data : nullptr;
    p.sequences = sequences;
    p.max_length = e.longest;
    if (states.size) {
      io.final = dense(states.data, std::array<index_t, 4>{sequences, c.heads, c.N, c.P});
      io.initial = io.final;
    }
  }
};

struct error_sum {
  double difference = 0.0, reference = 0.0;
  void add(double value, double wanted) {
    difference += (value - wanted) * (value - wanted);
    reference += wanted * wanted;
  }
  [[nodiscard]] double relative() const {
    return reference > 0.0 ? std::sqrt(difference / reference) : std::sqrt(difference);
  }
};

const char* name_of(rung r) {
  return r == rung::sm_90a ? "90a" : r == rung::sm_80 ? "80" : "general";
}
void verdict(const char* name, const char* type, rung r, const char* what, double error,
             double limit) {
  const bool good = error <= limit;  // false for NaN
  failed = failed || !good;
  std::printf("%-24s %-4s %-7s %-9s %9.2e  limit %.1e  %s\n", name, type, name_of(r), what, error,
              limit, good ? "ok" : "FAILED");
}

template <class T>
constexpr const char* type_name = std::is_same_v<T, bf16>    ? "bf16"
                                  : std::is_same_v<T, float> ? "f32"
                                                             : "f64";

/// The rungs that a problem's kernels take on this card: both of the tensor cores, or one.
template <class T>
std::vector<rung> rungs_of(const cuda::ssd_problem<T>& p) {
  rung highest = rung::general;
  if constexpr (std::is_same_v<T, bf16>) highest = cuda::detail::ssd_plan::of(p).kernels;
  if (highest == rung::sm_90a) return {rung::sm_90a, rung::sm_80};
  return {highest};
}
template <class T>
std::vector<T> check_forward(const shape& c, unsigned seed, const example<T>& e, rung most) {
  on_device<T> device(e);
  device.p.most = most;
  buffer<T> y(static_cast<std::size_t>(e.tokens * c.heads * c.P));
  buffer<char> work(cuda::ssd_forward_workspace_bytes(device.p));
  cuda::ssd_forward(nullptr, device.p,
                    dense(y.data, std::array<index_t, 3>{e.tokens, c.heads, c.P}), device.io,
                    work.data);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<T> out = y.host();
  const auto states = device.states.host();
  error_sum y_error, state_error;
  std::vector<double> row, state;
  const index_t step = std::max<index_t>(1, c.heads / 4);
  for (index_t s = 0; s < static_cast<index_t>(c.lengths.size()); ++s) {
    for (index_t h = s % step; h < c.heads; h += step) {
      e.reference(s, h, row, state);
      for (std::size_t i = 0; i < row.size(); ++i) {
        const index_t t = e.offsets[s] + static_cast<index_t>(i) / c.P;
        y_error.add(wide(out[(t * c.heads + h) * c.P + static_cast<index_t>(i) % c.P]), row[i]);
      }
      if (!c.states) continue;
      for (index_t i = 0; i < c.N * c.P; ++i)
        state_error.add(wide(states[(s * c.heads + h) * c.N * c.P + i]), state[i]);
    }
  }
  // Roundings of the operands of each product and of y at 2^-9; f32 and f64 as their sums.
  const double limit = std::is_same_v<T, bf16> ? 5e-3 : std::is_same_v<T, float> ? 2e-6 : 1e-13;
  verdict(c.name, type_name<T>, most, "y", y_error.relative(), limit);
  if (c.states) verdict(c.name, type_name<T>, most, "state", state_error.relative(), limit);
  for (index_t i = 0; c.ragged && i < 3 * c.heads * c.P; ++i) {
    if (!std::isnan(wide(out[i]))) {
      std::printf("%s: a row outside the sequences was written\n", c.name);
      failed = true;
      break;
    }
  }
  return out;
}

/// How far the numbers of two rungs are apart; where both have NaN nothing was to be written.
template <class T>
void compare_rungs(const shape& c, const char* what, const std::vector<std::vector<T>>& of_rungs) {
  if (of_rungs.size() < 2) return;
  error_sum error;
  for (std::size_t i = 0; i < of_rungs[0].size(); ++i) {
    const double a = wide(of_rungs[0][i]), b = wide(of_rungs[1][i]);
    if (!std::isnan(a) || !std::isnan(b)) error.add(b, a);
  }
  // Both round at the same places; sums between may have another order.
  verdict(c.name, type_name<T>, rung::sm_80, what, error.relative(), 2e-3);
}

template <class T>
void check_forward(const shape& c, unsigned seed) {
  const example<T> e(c, seed);
  std::vector<std::vector<T>> outs;
  for (const rung r : rungs_of(on_device<T>(e).p))
    outs.push_back(check_forward(c, seed, e, r));
  compare_rungs(c, "y to 90a", outs);
}

/// Gradients of everything, in double.
struct gradient_reference {
  std::vector<double> q, k, x, log_a, weight, dt, gamma, a, bias, d, initial;
};

template <class T>
gradient_reference reference_gradients(const example<T>& e, const std::vector<T>& dy,
                                       const std::vector<ssm::accum_t<T>>& d_final) {
  const shape& c = e.c;
  gradient_reference r;
  r.q.resize(e.tokens * c.gq * c.N), r.k.resize(e.tokens * c.gk * c.N);
  r.x.resize(e.tokens * c.gx * c.P);
  for (auto* v : {&r.log_a, &r.weight, &r.dt})
    v->resize(e.tokens * c.heads);
  for (auto* v : {&r.gamma, &r.a, &r.bias, &r.d})
    v->resize(c.heads);
  const index_t size = c.N * c.P;
  r.initial.resize(c.lengths.size() * c.heads * size);
  for (index_t s = 0; s < static_cast<index_t>(c.lengths.size()); ++s) {
    for (index_t h = 0; h < c.heads; ++h) {
      const index_t begin = e.offsets[s], n = e.offsets[s + 1] - begin;
      const index_t at = (s * c.heads + h) * size;
      std::vector<double> states((n + 1) * size), E(size);
      for (index_t i = 0; i < size; ++i) {
        states[i] = e.initial.empty() ? 0.0 : wide(e.initial[at + i]);
        E[i] = d_final.empty() ? 0.0 : wide(d_final[at + i]);
      }
      for (index_t i = 0; i < n; ++i) {
        double w;
        const double decay = e.decay_of(begin + i, h, w);
        for (index_t m = 0; m < c.N; ++m) {
          for (index_t p = 0; p < c.P; ++p) {
            states[(i + 1) * size + m * c.P + p] =
                decay * states[i * size + m * c.P + p] +
                w * wide(e.k(begin + i, h)[m]) * e.x(begin + i, h, p);
          }
        }
      }
      for (index_t i = n - 1; i >= 0; --i) {
        const index_t t = begin + i;
        double w, dw = 0.0, dl = 0.0;
        const double decay = e.decay_of(t, h, w), skip = c.d ? wide(e.d[h]) : 0.0;
        const double *before = &states[i * size], *after = &states[(i + 1) * size];
        const T *gy = &dy[(t * c.heads + h) * c.P], *key = e.k(t, h), *query = e.q(t, h);
        double* dx = &r.x[(t * c.gx + ssm::group_of(h, c.heads, c.gx)) * c.P];
        double* dq = &r.q[(t * c.gq + ssm::group_of(h, c.heads, c.gq)) * c.N];
        double* dk = &r.k[(t * c.gk + ssm::group_of(h, c.heads, c.gk)) * c.N];
        for (index_t p = 0; p < c.P; ++p) {
          dx[p] += skip * wide(gy[p]);
          r.d[h] += e.x(t, h, p) * wide(gy[p]);
        }
        for (index_t m = 0; m < c.N; ++m) {
          for (index_t p = 0; p < c.P; ++p) {
            double& gradient = E[m * c.P + p];
            const double g = wide(gy[p]), x = e.x(t, h, p);
            gradient += c.alpha * wide(query[m]) * g;
            dq[m] += c.alpha * after[m * c.P + p] * g;
            dk[m] += w * gradient * x;
            dx[p] += w * gradient * wide(key[m]);
            dw += gradient * wide(key[m]) * x;
            dl += decay * gradient * before[m * c.P + p];
            gradient *= decay;
          }
        }
        r.log_a[t * c.heads + h] = dl;
        r.weight[t * c.heads + h] = dw;
        if (c.kind == decay::gamma) r.gamma[h] += dl / wide(e.gamma[h]);
        if (c.kind != decay::dt) continue;
        const double raw = wide(e.dt[t * c.heads + h]) + wide(e.bias[h]);
        const double ddt = (dw + wide(e.a[h]) * dl) / (1.0 + std::exp(-raw));
        r.dt[t * c.heads + h] = ddt;
        r.a[h] += w * dl;
        r.bias[h] += ddt;
      }
      for (index_t i = 0; i < size; ++i)
        r.initial[at + i] = E[i];
    }
  }
  return r;
}

/// Returns the gradient of x.
template <class T>
std::vector<T> check_backward(const shape& c, unsigned seed, const example<T>& e, rung most) {
  using real = ssm::accum_t<T>;
  on_device<T> device(e);
  device.p.most = most;
  std::mt19937 random(seed + 1000);
  std::normal_distribution<double> normal;
  std::vector<T> dy(e.tokens * c.heads * c.P);
  for (index_t i = 0; i < static_cast<index_t>(dy.size()); ++i) {
    const index_t t = i / c.P / c.heads;
    dy[i] = rounded<T>(t < e.offsets.front() || t >= e.offsets.back() ? NAN : normal(random));
  }
  std::vector<real> d_final(e.initial.size());
  for (auto& v : d_final)
    v = static_cast<real>(normal(random));
  const auto sequences = static_cast<index_t>(c.lengths.size());
  const buffer<T> gy(dy), q(e.tokens * c.gq * c.N), k(e.tokens * c.gk * c.N),
      x(e.tokens * c.gx * c.P), dt(e.tokens * c.heads);
  const buffer<real> log_a(e.tokens * c.heads), weight(e.tokens * c.heads), gamma(c.heads),
      a(c.heads), bias(c.heads), d(c.heads), last(d_final), initial(e.initial.size());
  cuda::ssd_gradients<T> g;
  g.q = dense(q.data, std::array<index_t, 3>{e.tokens, c.gq, c.N});
  g.k = dense(k.data, std::array<index_t, 3>{e.tokens, c.gk, c.N});
  g.x = dense(x.data, std::array<index_t, 3>{e.tokens, c.gx, c.P});
  const std::array<index_t, 2> steps{e.tokens, c.heads};
  const std::array<index_t, 1> heads{c.heads};
  if (device.p.log_a) g.log_a = dense(log_a.data, steps);
  if (device.p.weight) g.weight = dense(weight.data, steps);
  if (device.p.dt) g.dt = dense(dt.data, steps);
  if (device.p.gamma) g.gamma = dense(gamma.data, heads);
  if (device.p.a) g.a = dense(a.data, heads);
  if (device.p.dt_bias) g.dt_bias = dense(bias.data, heads);
  if (device.p.d) g.d = dense(d.data, heads);
  const std::array<index_t, 4> state{sequences, c.heads, c.N, c.P};
  if (c.states) {
    g.d_final = dense<const real>(last.data, state);
    g.d_initial = dense(initial.data, state);
  }
  const buffer<char> work(cuda::ssd_backward_workspace_bytes(device.p));
  cuda::ssd_backward(nullptr, device.p,
                     dense<const T>(gy.data, std::array<index_t, 3>{e.tokens, c.heads, c.P}),
                     device.io, g, work.data);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const gradient_reference r = reference_gradients(e, dy, d_final);
  double worst = 0.0;
  std::string line;
  const auto compare = [&](const char* name, const auto& wanted, const auto& out, index_t columns,
                           const auto& view) {
    if (!view) return;
    const auto values = out.host();
    error_sum error;
    const index_t rows = static_cast<index_t>(wanted.size()) / columns;
    for (index_t i = 0; i < static_cast<index_t>(wanted.size()); ++i) {
      if (rows == e.tokens && (i / columns < e.offsets.front() || i / columns >= e.offsets.back()))
        continue;
      error.add(wide(values[i]), wanted[i]);
    }
    const double relative = error.relative();
    worst = relative > worst || std::isnan(relative) ? relative : worst;
    char text[40];
    std::snprintf(text, sizeof text, " %s %.1e", name, relative);
    line += text;
  };
  compare("q", r.q, q, c.gq * c.N, g.q), compare("k", r.k, k, c.gk * c.N, g.k);
  compare("x", r.x, x, c.gx * c.P, g.x);
  compare("log_a", r.log_a, log_a, c.heads, g.log_a);
  compare("weight", r.weight, weight, c.heads, g.weight), compare("dt", r.dt, dt, c.heads, g.dt);
  compare("gamma", r.gamma, gamma, 1, g.gamma), compare("a", r.a, a, 1, g.a);
  compare("bias", r.bias, bias, 1, g.dt_bias), compare("d", r.d, d, 1, g.d);
  compare("initial", r.initial, initial, 1, g.d_initial);
  // Gradients pass through two roundings more than y in bf16.
  const double limit = std::is_same_v<T, bf16> ? 8e-3 : std::is_same_v<T, float> ? 5e-6 : 1e-12;
  verdict(c.name, type_name<T>, most, "backward", worst, limit);
  std::printf("   %s\n", line.c_str());
  return x.host();
}

template <class T>
void check_backward(const shape& c, unsigned seed) {
  const example<T> e(c, seed);
  std::vector<std::vector<T>> outs;
  for (const rung r : rungs_of(on_device<T>(e).p))
    outs.push_back(check_backward(c, seed, e, r));
  compare_rungs(c, "dx to 90a", outs);
}

// -------------------------------------------------------------------------------------- timing

__global__ void fill_random(bf16* data, std::size_t n, unsigned seed, float scale) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    unsigned h =
        static_cast<unsigned>(i) * 2654435761u + seed * 40503u + static_cast<unsigned>(i >> 32);
    float sum = 0.0f;
    for (int k = 0; k < 4; ++k) {
      h ^= h >> 16, h *= 0x7feb352du, h ^= h >> 15, h *= 0x846ca68bu, h ^= h >> 16;
      sum += static_cast<float>(h >> 8) * (1.0f / 16777216.0f) - 0.5f;
    }
    data[i] = cuda::narrow<bf16>(sum * 1.732f * scale);
  }
}

/// The median milliseconds of one call out of graphs of `sets` calls.
double median_ms(cudaStream_t stream, int sets, const std::function<void(int)>& call) {
  for (int i = 0; i < sets; ++i)
    call(i);
  cudaGraph_t graph;
  cudaGraphExec_t run;
  SSMLIB_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < sets; ++i)
    call(i);
  SSMLIB_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  SSMLIB_CHECK_CUDA(cudaGraphInstantiate(&run, graph, 0));
  cudaEvent_t begin, end;
  SSMLIB_CHECK_CUDA(cudaEventCreate(&begin));
  SSMLIB_CHECK_CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 25; ++i) {
    SSMLIB_CHECK_CUDA(cudaEventRecord(begin, stream));
    SSMLIB_CHECK_CUDA(cudaGraphLaunch(run, stream));
    SSMLIB_CHECK_CUDA(cudaEventRecord(end, stream));
    SSMLIB_CHECK_CUDA(cudaEventSynchronize(end));
    float ms = 0.0f;
    SSMLIB_CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  SSMLIB_CHECK_CUDA(cudaGraphExecDestroy(run));
  SSMLIB_CHECK_CUDA(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] / sets;
}

struct timed_shape {
  index_t batch, T, H, G;
  double peer, goal;
  double both_peer = 0.0, both_goal = 0.0;  // forward and backward
};

void time_forward(cudaStream_t stream, const timed_shape& c, rung most, double copy_tb) {
  constexpr index_t N = 128, P = 64;
  const index_t tokens = c.batch * c.T;
  const int sets = tokens * c.H >= 1000000 ? 2 : 4;  // more than the cache holds
  std::vector<buffer<bf16>*> x, bc, dt, y;
  std::vector<float> a, bias, d;
  for (index_t h = 0; h < c.H; ++h) {
    a.push_back(-1.0f - 15.0f * static_cast<float>(h) / static_cast<float>(c.H));
    bias.push_back(-6.9f + 4.6f * static_cast<float>((h * 37) % c.H) / static_cast<float>(c.H));
    d.push_back(1.0f);
  }
  const buffer<float> da(a), db(bias), dd(d);
  for (int i = 0; i < sets; ++i) {
    const auto random = [&](index_t n, float scale) {
      auto* b = new buffer<bf16>(static_cast<std::size_t>(n));
      fill_random<<<1024, 256>>>(b->data, b->size, static_cast<unsigned>(n + i), scale);
      return b;
    };
    x.push_back(random(tokens * c.H * P, 1.0f));
    bc.push_back(random(tokens * 2 * c.G * N, 1.0f));
    dt.push_back(random(tokens * c.H, 0.5f));
    y.push_back(random(tokens * c.H * P, 1.0f));
  }
  const auto problem = [&](int i) {
    cuda::ssd_problem<bf16> p;
    p.heads = c.H;
    p.x = dense<const bf16>(x[i]->data, std::array<index_t, 3>{tokens, c.H, P});
    p.k = {bc[i]->data, {tokens, c.G, N}, {2 * c.G * N, N, 1}};
    p.q = {bc[i]->data + c.G * N, {tokens, c.G, N}, {2 * c.G * N, N, 1}};
    p.dt = dense<const bf16>(dt[i]->data, std::array<index_t, 2>{tokens, c.H});
    p.a = dense<const float>(da.data, std::array<index_t, 1>{c.H});
    p.dt_bias = dense<const float>(db.data, std::array<index_t, 1>{c.H});
    p.d = dense<const float>(dd.data, std::array<index_t, 1>{c.H});
    p.sequences = c.batch;
    p.max_length = c.T;
    p.most = most;
    return p;
  };
  const buffer<char> work(cuda::ssd_forward_workspace_bytes(problem(0)));
  const double ms = median_ms(stream, sets, [&](int i) {
    cuda::ssd_forward(stream, problem(i), dense(y[i]->data, std::array<index_t, 3>{tokens, c.H, P}),
                      {}, work.data);
  });
  const double bytes = static_cast<double>(tokens) * (4.0 * c.H * P + 4.0 * c.G * N + 2.0 * c.H);
  const double floor_ms = bytes / copy_tb * 1e-9;
  std::printf(
      "%-3s fwd b%lld T%-6lld H%-3lld G%lld | %7.4f ms | peer %6.3f x%.2f | goal %5.3f x%.2f | "
      "floor %6.4f, share %2.0f %% | parts %lld\n",
      name_of(most), static_cast<long long>(c.batch), static_cast<long long>(c.T),
      static_cast<long long>(c.H), static_cast<long long>(c.G), ms, c.peer, c.peer / ms, c.goal,
      c.goal / ms, floor_ms, 100.0 * floor_ms / ms,
      static_cast<long long>(cuda::detail::ssd_plan::of(problem(0)).supers));
  if (c.both_peer > 0.0) {
    const buffer<bf16> dx(tokens * c.H * P), dbc(tokens * 2 * c.G * N), ddt(tokens * c.H);
    const buffer<float> da_(c.H), dbias(c.H), dskip(c.H);
    cuda::ssd_gradients<bf16> g;
    g.x = dense(dx.data, std::array<index_t, 3>{tokens, c.H, P});
    g.k = {dbc.data, {tokens, c.G, N}, {2 * c.G * N, N, 1}};
    g.q = {dbc.data + c.G * N, {tokens, c.G, N}, {2 * c.G * N, N, 1}};
    g.dt = dense(ddt.data, std::array<index_t, 2>{tokens, c.H});
    g.a = dense(da_.data, std::array<index_t, 1>{c.H});
    g.dt_bias = dense(dbias.data, std::array<index_t, 1>{c.H});
    g.d = dense(dskip.data, std::array<index_t, 1>{c.H});
    const buffer<char> back(cuda::ssd_backward_workspace_bytes(problem(0)));
    const double both = median_ms(stream, sets, [&](int i) {
      const std::array<index_t, 3> rows{tokens, c.H, P};
      cuda::ssd_forward(stream, problem(i), dense(y[i]->data, rows), {}, work.data);
      cuda::ssd_backward(stream, problem(i), dense<const bf16>(x[(i + 1) % sets]->data, rows), {},
                         g, back.data);
    });
    const double both_floor = floor_ms * 2.5;  // x, dy, dx and y, and x once more
    std::printf(
        "  with backward           | %7.4f ms | peer %6.3f x%.2f | goal %5.3f x%.2f | "
        "floor %6.4f, share %2.0f %%\n",
        both, c.both_peer, c.both_peer / both, c.both_goal, c.both_goal / both, both_floor,
        100.0 * both_floor / both);
  }
  for (auto* list : {&x, &bc, &dt, &y}) {
    for (auto* b : *list)
      delete b;
  }
}

double copy_rate(cudaStream_t stream) {
  const std::size_t bytes = std::size_t{1} << 30;
  const buffer<char> from(bytes), to(bytes);
  const double ms = median_ms(stream, 1, [&](int) {
    SSMLIB_CHECK_CUDA(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream));
  });
  return 2.0 * static_cast<double>(bytes) / ms * 1e-9;
}

void check_all(bool small, bool bf16_only) {
  const std::vector<shape> shapes = {
      {"one token", {1}, 2, 1, 1, 2, 128, 64, decay::dt, true},
      {"one chunk", {64}, 2, 1, 1, 2, 128, 64, decay::log_a},
      {"chunk + 1, states", {65, 65}, 2, 1, 1, 2, 128, 64, decay::dt, true},
      {"300 tokens, N 64", {300}, 4, 1, 2, 4, 64, 64, decay::dt, true},
      {"P 128, a key a head", {257}, 3, 3, 3, 3, 128, 128, decay::gamma, true, false, false, 0.3},
      {"P 64, a key a head", {1000}, 3, 3, 3, 3, 64, 64, decay::none, true, true, false, 0.5},
      {"P 80, N 96", {333}, 4, 2, 2, 4, 96, 80, decay::dt, true},
      {"resets", {500}, 4, 1, 1, 4, 128, 64, decay::log_a, true, true, false, 1.0, 0.05},
      {"grouped x", {200}, 4, 4, 4, 2, 32, 64, decay::log_a, true},
      {"ragged", {0, 5, 64, 1, 700, 130, 0}, 4, 1, 1, 4, 128, 64, decay::dt, true, true, true},
      {"ragged, sizes of nobody", {17, 0, 90}, 7, 1, 7, 7, 24, 40, decay::log_a, true, true, true},
      {"N 25, P 13", {101}, 3, 1, 1, 3, 25, 13, decay::dt, true},
      {"N 300, P 20", {70}, 2, 1, 1, 2, 300, 20, decay::dt, true},
      {"long, cut", {5000}, 2, 1, 1, 2, 128, 64, decay::dt, true},
      {"wide, cut", {2048}, 24, 1, 1, 24, 128, 64, decay::dt, true},
      {"ragged, cut", {2000, 3, 900, 1500}, 8, 1, 1, 8, 128, 64, decay::dt, true, true, true},
      {"many pieces", {8192}, 4, 1, 1, 4, 64, 64, decay::dt, true},
      {"2^20 + 1 tokens", {(1 << 20) + 1}, 1, 1, 1, 1, 16, 16, decay::dt, true},
      {"70,001 sequences", std::vector<index_t>(70001, 2), 1, 1, 1, 1, 8, 8, decay::log_a},
      {"odd sizes", {1009}, 7, 7, 7, 7, 24, 40, decay::dt, true}};
  unsigned seed = 1;
  for (const shape& c : shapes) {
    if (small && (c.lengths[0] > 600 || c.lengths.size() > 9)) continue;
    check_forward<bf16>(c, seed++);
    if (c.lengths[0] <= 600) check_backward<bf16>(c, seed++);
    if (c.lengths[0] > 1009 || bf16_only) continue;
    check_forward<float>(c, seed++);
    check_forward<double>(c, seed++);
    if (c.lengths[0] > 600) continue;
    check_backward<float>(c, seed++);
    check_backward<double>(c, seed++);
  }
}

/// Twenty runs of a cut sequence give the same bits, forward and backward.
void check_bits(rung most) {
  const shape c{"same bits", {3000}, 8, 1, 1, 8, 128, 64, decay::dt};
  const example<bf16> e(c, 99);
  on_device<bf16> device(e);
  device.p.most = most;
  const std::array<index_t, 3> rows{e.tokens, c.heads, c.P};
  const buffer<char> work(cuda::ssd_forward_workspace_bytes(device.p));
  const buffer<char> back(cuda::ssd_backward_workspace_bytes(device.p));
  std::vector<char> first;
  for (int i = 0; i < 20; ++i) {
    const buffer<bf16> y(e.tokens * c.heads * c.P), q(e.tokens * c.N), k(e.tokens * c.N),
        x(e.tokens * c.heads * c.P), dt(e.tokens * c.heads);
    const buffer<float> a(c.heads);
    cuda::ssd_gradients<bf16> g;
    g.q = dense(q.data, std::array<index_t, 3>{e.tokens, 1, c.N});
    g.k = dense(k.data, std::array<index_t, 3>{e.tokens, 1, c.N});
    g.x = dense(x.data, rows);
    g.dt = dense(dt.data, std::array<index_t, 2>{e.tokens, c.heads});
    g.a = dense(a.data, std::array<index_t, 1>{c.heads});
    cuda::ssd_forward(nullptr, device.p, dense(y.data, rows), device.io, work.data);
    cuda::ssd_backward(nullptr, device.p, dense<const bf16>(y.data, rows), device.io, g, back.data);
    std::vector<char> out;
    const auto append = [&](const auto& b) {
      const auto values = b.host();
      const auto* bytes = reinterpret_cast<const char*>(values.data());
      out.insert(out.end(), bytes, bytes + values.size() * sizeof(values[0]));
    };
    append(y), append(q), append(k), append(x), append(dt), append(a);
    if (i == 0) first = out;
    if (first != out) {
      std::printf("%s: run %d differs  FAILED\n", c.name, i);
      failed = true;
      return;
    }
  }
  std::printf("%-24s bf16 %-7s 20 runs, forward and backward  ok\n", c.name, name_of(most));
}

/// `only`: "--small", small sizes and no timing, as a checker of memory wants it; "--small-bf16",
/// of one type, as racecheck does; "--time"; or nothing.
int run(const std::string& only) {
  const bool small = only.starts_with("--small");
  if (only != "--time") check_all(small, only == "--small-bf16");
  if (small) return failed ? 1 : 0;
  const rung highest = cuda::usable_rung(rung::sm_90a);
  std::vector<rung> rungs{highest};
  if (highest == rung::sm_90a) rungs.push_back(rung::sm_80);
  for (const rung r : rungs)
    if (only != "--time") check_bits(r);
  cudaStream_t stream;
  SSMLIB_CHECK_CUDA(cudaStreamCreate(&stream));
  const double rate = copy_rate(stream);
  std::printf("copy %.2f TB/s\n", rate);
  for (const timed_shape& c : {timed_shape{8, 2048, 80, 1, 0.745, 0.25, 3.298, 1.3},
                               {1, 2048, 80, 1, 0.111, 0.045, 0.580, 0.23},
                               {1, 16384, 80, 1, 0.751, 0.25},
                               {1, 65536, 80, 1, 3.615, 1.0, 14.11, 5.6},
                               {8, 2048, 24, 1, 0.245, 0.085},
                               {8, 2048, 128, 8, 1.261, 0.42, 5.688, 2.3}}) {
    for (const rung r : rungs)
      time_forward(stream, c, r, rate);
  }
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("ssd_check needs a CUDA device and found none\n");
    return 2;
  }
  try {
    return run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
}
