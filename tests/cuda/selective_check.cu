// Checks the selective scan on the GPU against a float64 loop on the CPU, then times it.
// Exit status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/selective.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

struct shape_case {
  const char* name;
  std::vector<index_t> lengths;  // of the sequences
  index_t channels, states, b_groups, c_groups;
  // g gate, s skip, b bias, p softplus, i initial states, r ragged offsets, l slices of larger
  // rows, a gradients are added, k states are kept by the forward pass
  std::string with;
  index_t segments = 0, warp_channels = 0;

  [[nodiscard]] bool has(char c) const { return with.find(c) != std::string::npos; }
  bool gate = has('g'), skip = has('s'), bias = has('b'), soft = has('p'), initial = has('i'),
       ragged = has('r'), slices = has('l'), add = has('a'), checkpoints = has('k');
};

/// The operands of a case on the host, as the device has them after rounding.
struct host_case {
  std::vector<double> dt, u, gate, b, c, dy, a, skip, bias, initial, d_final;
};

struct reference {
  std::vector<double> y, final, d_dt, d_u, d_gate, d_b, d_c, d_a, d_skip, d_bias, d_initial;
};

double step_of(const shape_case& s, double r) {
  if (!s.soft) return r;
  return r > 20 ? r : std::log1p(std::exp(r));
}

reference compute(const shape_case& s, const host_case& x, index_t tokens) {
  const index_t D = s.channels, N = s.states, n_sequences = s.lengths.size();
  reference r;
  r.y.assign(tokens * D, 0), r.d_dt = r.d_u = r.d_gate = r.y;
  r.final.assign(n_sequences * D * N, 0), r.d_initial = r.final;
  r.d_b.assign(tokens * s.b_groups * N, 0), r.d_c.assign(tokens * s.c_groups * N, 0);
  r.d_a.assign(D * N, 0), r.d_skip.assign(D, 0), r.d_bias.assign(D, 0);
  parallel(D, [&](index_t d) {
    const index_t bg = d * s.b_groups / D, cg = d * s.c_groups / D;
    index_t begin = 0;
    for (index_t i = 0; i < n_sequences; ++i) {
      const index_t length = s.lengths[i];
      std::vector<double> h((length + 1) * N), g(N);
      for (index_t n = 0; n < N; ++n)
        h[n] = s.initial ? x.initial[(i * D + d) * N + n] : 0.0;
      std::vector<double> sums(length);
      for (index_t k = 0; k < length; ++k) {
        const index_t t = begin + k;
        const double delta = step_of(s, x.dt[t * D + d] + (s.bias ? x.bias[d] : 0)),
                     u = x.u[t * D + d];
        double y = s.skip ? x.skip[d] * u : 0;
        for (index_t n = 0; n < N; ++n) {
          h[(k + 1) * N + n] = std::exp(delta * x.a[d * N + n]) * h[k * N + n] +
                               delta * x.b[(t * s.b_groups + bg) * N + n] * u;
          y += x.c[(t * s.c_groups + cg) * N + n] * h[(k + 1) * N + n];
        }
        sums[k] = y;
        const double z = s.gate ? x.gate[t * D + d] : 0;
        r.y[t * D + d] = s.gate ? y * z / (1 + std::exp(-z)) : y;
      }
      for (index_t n = 0; n < N; ++n) {
        r.final[(i * D + d) * N + n] = h[length * N + n];
        g[n] = x.d_final[(i * D + d) * N + n];
      }
      for (index_t k = length; k-- > 0;) {
        const index_t t = begin + k;
        const double raw = x.dt[t * D + d] + (s.bias ? x.bias[d] : 0), delta = step_of(s, raw),
                     u = x.u[t * D + d];
        double dy = x.dy[t * D + d];
        if (s.gate) {
          const double z = x.gate[t * D + d], q = 1 / (1 + std::exp(-z));
          r.d_gate[t * D + d] = dy * sums[k] * q * (1 + z * (1 - q));
          dy *= z * q;
        }
        double gb = 0, agh = 0;
        for (index_t n = 0; n < N; ++n) {
          const double a = x.a[d * N + n], b = x.b[(t * s.b_groups + bg) * N + n];
          const double now = g[n] + x.c[(t * s.c_groups + cg) * N + n] * dy;
          gb += now * b;
          const double carried = std::exp(delta * a) * now;
          agh += a * carried * h[k * N + n];
          r.d_a[d * N + n] += delta * carried * h[k * N + n];
          add_to(r.d_b[(t * s.b_groups + bg) * N + n], now * delta * u);
          add_to(r.d_c[(t * s.c_groups + cg) * N + n], dy * h[(k + 1) * N + n]);
          g[n] = carried;
        }
        r.d_u[t * D + d] = delta * gb + (s.skip ? x.skip[d] * dy : 0);
        double dr = u * gb + agh;
        if (s.soft) dr /= 1 + std::exp(-raw);
        r.d_dt[t * D + d] = dr;
        r.d_skip[d] += dy * u;
        r.d_bias[d] += dr;
      }
      for (index_t n = 0; n < N; ++n)
        r.d_initial[(i * D + d) * N + n] = g[n];
      begin += length;
    }
  });
  return r;
}

template <class T>
struct device_case {
  using R = accum_t<T>;
  rows_buffer<T> dt, u, gate, b, c, dy;
  rows_buffer<R> a, skip, bias, initial, d_final;
  buffer<index_t> offsets;
  selective_problem<T> p;

  device_case(const shape_case& s, host_case* x, std::uint64_t seed) {
    index_t tokens = 0, longest = 0;
    std::vector<index_t> o{0};
    for (index_t l : s.lengths)
      o.push_back(tokens += l), longest = std::max(longest, l);
    const index_t D = s.channels, N = s.states, n = s.lengths.size(), pad = s.slices ? 3 : 0;
    dt = rows_buffer<T>(tokens, D, pad), u = rows_buffer<T>(tokens, D, pad);
    gate = rows_buffer<T>(tokens, D, pad), dy = rows_buffer<T>(tokens, D, pad);
    b = rows_buffer<T>(tokens, s.b_groups * N, pad),
    c = rows_buffer<T>(tokens, s.c_groups * N, pad);
    a = rows_buffer<R>(D, N), skip = rows_buffer<R>(1, D), bias = rows_buffer<R>(1, D);
    initial = rows_buffer<R>(n, D * N), d_final = rows_buffer<R>(n, D * N);
    dt.fill_device(seed, s.soft ? -4 : 0.001, s.soft ? 1 : 0.1), u.fill_device(seed + 1, -1, 1);
    gate.fill_device(seed + 2, -3, 3), dy.fill_device(seed + 3, -1, 1);
    b.fill_device(seed + 4, -1, 1), c.fill_device(seed + 5, -1, 1);
    a.fill_device(seed + 6, -8, -0.05), skip.fill_device(seed + 7, -1, 1);
    bias.fill_device(seed + 8, -1, 0.5), initial.fill_device(seed + 9, -1, 1);
    d_final.fill_device(seed + 10, -1, 1);
    if (x != nullptr) {
      *x = {dt.read(), u.read(),    gate.read(), b.read(),       c.read(),      dy.read(),
            a.read(),  skip.read(), bias.read(), initial.read(), d_final.read()};
    }
    offsets = buffer<index_t>(o);
    p.dt = dt.matrix(), p.u = u.matrix();
    p.a = a.matrix();
    p.b = b.heads(s.b_groups), p.c = c.heads(s.c_groups);
    if (s.gate) p.gate = gate.matrix();
    if (s.skip) p.skip = skip.data();
    if (s.bias) p.dt_bias = bias.data();
    p.softplus = s.soft;
    if (s.initial) p.initial = initial.heads(D);
    if (s.ragged) p.offsets = offsets.data();
    p.sequences = n, p.max_length = longest;
  }
};

template <class T>
void check(table& results, const shape_case& s) {
  using R = accum_t<T>;
  host_case x;
  device_case<T> dev(s, &x, 17);
  const auto& p = dev.p;
  const index_t tokens = p.tokens(), D = s.channels, N = s.states, n = s.lengths.size();
  const index_t pad = s.slices ? 1 : 0;
  rows_buffer<T> y(tokens, D, pad), d_dt(tokens, D, pad), d_u(tokens, D, pad), d_z(tokens, D, pad);
  rows_buffer<T> d_b(tokens, s.b_groups * N, pad), d_c(tokens, s.c_groups * N, pad);
  rows_buffer<R> final(n, D * N), d_initial(n, D * N), d_a(D, N), d_skip(1, D), d_bias(1, D);
  for (auto* r : {&y, &d_dt, &d_u, &d_z, &d_b, &d_c})
    r->poison();
  for (auto* r : {&final, &d_initial, &d_a, &d_skip, &d_bias})
    r->poison();
  if (s.add) {
    for (auto* r : {&d_dt, &d_u, &d_z, &d_b, &d_c})
      r->set(1);
    for (auto* r : {&d_initial, &d_a, &d_skip, &d_bias})
      r->set(1);
  }
  buffer<R> kept(s.checkpoints ? selective_checkpoint_size(p) : 0);
  const selective_options options{s.segments, s.warp_channels};
  buffer<unsigned char> w1(selective_forward_workspace_bytes(p, options));
  buffer<unsigned char> w2(selective_backward_workspace_bytes(p, options));
  w1.poison(), w2.poison(), kept.poison();
  selective_gradients<T> d;
  d.dt = d_dt.mutable_matrix(), d.u = d_u.mutable_matrix(), d.a = d_a.mutable_matrix();
  d.b = d_b.mutable_heads(s.b_groups), d.c = d_c.mutable_heads(s.c_groups);
  if (s.gate) d.gate = d_z.mutable_matrix();
  d.skip = d_skip.data(), d.dt_bias = d_bias.data(), d.initial = d_initial.mutable_heads(D);
  d.add = s.add;
  selective_forward<T>(nullptr, p, y.mutable_matrix(), final.mutable_heads(D),
                       s.checkpoints ? kept.data() : nullptr, w1.data(), options);
  selective_backward<T>(nullptr, p, dev.dy.matrix(), dev.d_final.heads(D),
                        s.checkpoints ? kept.data() : nullptr, d, w2.data(), options);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const reference r = compute(s, x, tokens);
  const double in = sizeof(T) == 2 ? 4e-3 : sizeof(T) == 4 ? 2e-5 : 1e-11;
  const double sums = sizeof(T) == 8 ? 1e-11 : 2e-5, shift = s.add ? 1 : 0;
  results.row(s.name, sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64");
  results.error("y", y.read(), r.y, in);
  results.error("h", final.read(), r.final, sums);
  results.error("ddt", d_dt.read(-shift), r.d_dt, s.add ? 3 * in : in);
  results.error("du", d_u.read(-shift), r.d_u, s.add ? 3 * in : in);
  if (s.gate) results.error("dz", d_z.read(-shift), r.d_gate, s.add ? 3 * in : in);
  results.error("dB", d_b.read(-shift), r.d_b, s.add ? 3 * in : in);
  results.error("dC", d_c.read(-shift), r.d_c, s.add ? 3 * in : in);
  results.error("dA", d_a.read(-shift), r.d_a, 10 * sums);
  results.error("dD", d_skip.read(-shift), r.d_skip, 10 * sums);
  results.error("db", d_bias.read(-shift), r.d_bias, 10 * sums);
  results.error("dh", d_initial.read(-shift), r.d_initial, sums);
  results.end();
}

void time_shape(index_t sequences, index_t length, index_t channels, bool gate, double copy) {
  using T = bf16;
  const shape_case s{
      "", std::vector<index_t>(sequences, length), channels, 16, 1, 1, gate ? "gsbp" : "sbp"};
  device_case<T> dev(s, nullptr, 3);
  const index_t tokens = sequences * length;
  rows_buffer<T> y(tokens, channels), d_dt(tokens, channels), d_u(tokens, channels);
  rows_buffer<T> d_z(tokens, channels), d_b(tokens, 16), d_c(tokens, 16);
  rows_buffer<float> d_a(channels, 16), d_skip(1, channels), d_bias(1, channels);
  buffer<float> kept(selective_checkpoint_size(dev.p));
  buffer<unsigned char> w1(selective_forward_workspace_bytes(dev.p, {8}));
  buffer<unsigned char> w2(selective_backward_workspace_bytes(dev.p, {8}));
  selective_gradients<T> d{d_dt.mutable_matrix(), d_a.mutable_matrix(), d_c.mutable_heads(1),
                           d_b.mutable_heads(1),  d_u.mutable_matrix(), {},
                           d_skip.data(),         d_bias.data()};
  if (gate) d.gate = d_z.mutable_matrix();
  const double bytes = 2.0 * tokens * channels * (gate ? 4 : 3);
  const double floor =
      std::max(bytes / copy, 16.0 * tokens * channels / (132 * 16 * 1.755e9)) * 1e3;
  const auto forward = [&](cudaStream_t stream, float* keep, index_t segments,
                           index_t warp_channels = 0) {
    selective_forward<T>(stream, dev.p, y.mutable_matrix(), {}, keep, w1.data(),
                         {segments, warp_channels});
  };
  const auto backward = [&](cudaStream_t stream, const float* keep, index_t segments) {
    selective_backward<T>(stream, dev.p, dev.dy.matrix(), {}, keep, d, w2.data(), {segments});
  };
  const double f = median_ms([&](cudaStream_t q) { forward(q, nullptr, 0); });
  const double k = median_ms([&](cudaStream_t q) { forward(q, kept.data(), 0); });
  std::string ways;
  for (const auto& [segments, channels] :
       std::vector<std::pair<index_t, index_t>>{{1, 16}, {4, 16}, {8, 16}, {1, 8}}) {
    const index_t s = segments, c = channels;
    const double ms = median_ms([&](cudaStream_t q) { forward(q, nullptr, s, c); });
    char text[64];
    std::snprintf(text, sizeof text, " %lldx%lld %.3f", static_cast<long long>(s),
                  static_cast<long long>(c), ms);
    ways += text;
  }
  const double b = median_ms([&](cudaStream_t q) { backward(q, kept.data(), 0); });
  const double r = median_ms([&](cudaStream_t q) { backward(q, nullptr, 0); });
  const auto checksum = [&] {
    backward(nullptr, nullptr, 0);
    double sum = 0;
    for (const auto* v : {&d_a, &d_skip, &d_bias})
      for (double e : v->read())
        sum = sum * 1.0000001 + e;
    for (double e : d_b.read())
      sum = sum * 1.0000001 + e;
    return sum;
  };
  const double first = checksum();
  bool same = true;
  for (int i = 0; i < 5; ++i)
    same = same && first == checksum();
  std::printf(
      "scan b%lld T%lld D%lld N16%s: fwd %.3f (floor %.3f) fwd+keep %.3f, cuts x channels%s | bwd "
      "%.3f bwd without kept %.3f | fwd+bwd %.3f / %.3f ms, repeats %s\n",
      static_cast<long long>(sequences), static_cast<long long>(length),
      static_cast<long long>(channels), gate ? " gate" : "", f, floor, k, ways.c_str(), b, r, k + b,
      f + r, same ? "same bits" : "DIFFER");
  if (!same) failed = true;
}

std::vector<index_t> random_lengths(index_t n, index_t longest) {
  std::vector<index_t> l;
  for (index_t i = 0; i < n; ++i)
    l.push_back(i % 7 == 3 ? 0 : 1 + (i * 7919 + 13) % longest);
  return l;
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv);
  table results;
  const std::vector<shape_case> cases{
      {"plain", {100, 100}, 96, 16, 1, 1, "k"},
      {"full", {77, 77, 77}, 112, 16, 1, 1, "gsbpik"},
      {"ragged", random_lengths(9, 70), 72, 16, 2, 1, "gsbpir"},
      {"slices", {33, 1, 0, 50}, 42, 16, 2, 2, "gsbpirlak"},
      {"odd", {40, 3}, 37, 13, 1, 1, "gsbpirk", 1},
      {"cut", {700, 129, 0, 300}, 64, 16, 1, 2, "gsbpir", 4},
      {"cut, kept", {1000}, 64, 16, 1, 1, "gsbpik"},
      {"8 a warp", {300, 49, 0, 16, 31}, 72, 16, 1, 2, "gsbpirk", 2, 8},
      {"16 a warp", {300, 49, 0, 16, 31}, 72, 16, 1, 2, "gsbpirk", 3, 16},
      {"wide", {300}, 4096, 16, 1, 1, "gsbpik"},
      {"many", std::vector<index_t>(70001, 2), 4, 16, 1, 1, "sbpi"},
      {"N 64", {100, 31}, 40, 64, 1, 1, "gsbpirk"},
      {"N 24", {100, 31}, 3000, 24, 1, 1, "gsbpir"},
      {"N 256", {40, 21}, 2600, 256, 1, 2, "gsbpirk"},
      {"N 100", {300}, 7, 100, 1, 7, "sbpir", 2},
      {"T 2^20+1", {(1 << 20) + 1}, 4, 16, 1, 1, "gsbpi"},
  };
  for (const auto& s : cases) {
    if (small && (s.lengths.size() > 100 || s.lengths[0] > 2000 || s.channels > 2000)) continue;
    if (s.lengths[0] < 100000) check<double>(results, s);
    check<float>(results, s);
    check<bf16>(results, s);
  }
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  time_shape(8, 2048, 5120, false, copy);
  time_shape(8, 2048, 5120, true, copy);
  time_shape(1, 16384, 5120, false, copy);
  time_shape(1, 16384, 5120, true, copy);
  time_shape(1, 2048, 1536, true, copy);
  return finish();
}
