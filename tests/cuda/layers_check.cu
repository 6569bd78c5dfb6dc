// Checks gates, unit lengths and step sizes on the GPU against float64 loops on the CPU, then times
// them. Exit status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/discretize.cuh>
#include <ssmlib/kernels/cuda/l2_normalize.cuh>
#include <ssmlib/kernels/cuda/mlp.cuh>

#include <limits>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

template <class T>
const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}
template <class T>
double bound_of() {
  return sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14;
}

double sigmoid_of(double x) {
  return 1 / (1 + std::exp(-x));
}

struct shape_case {
  index_t rows, width, pad;
  bool add;
};

template <class T>
void check_gates(table& results, const shape_case& s) {
  const index_t n = s.rows, d = s.width;
  rows_buffer<T> g(n, d, s.pad), u(n, d, s.pad), dy(n, d, s.pad);
  rows_buffer<T> y(n, d, s.pad), dg(n, d, s.pad), du(n, d, s.pad), z(n, d, s.pad), dz(n, d, s.pad);
  const auto hg = g.fill(1, -6, 6), hu = u.fill(2, -2, 2), hdy = dy.fill(3, -1, 1);
  for (auto* r : {&y, &dg, &du, &z, &dz})
    r->poison();
  if (s.add) dg.set(1), du.set(1), dz.set(1);
  swiglu<T>(nullptr, g.matrix(), u.matrix(), y.mutable_matrix());
  swiglu_vjp<T>(nullptr, g.matrix(), u.matrix(), dy.matrix(), dg.mutable_matrix(),
                du.mutable_matrix(), s.add);
  gelu_tanh<T>(nullptr, g.matrix(), z.mutable_matrix());
  gelu_tanh_vjp<T>(nullptr, g.matrix(), dy.matrix(), dz.mutable_matrix(), s.add);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  std::vector<double> ry(n * d), rdg(n * d), rdu(n * d), rz(n * d), rdz(n * d);
  for (index_t i = 0; i < n * d; ++i) {
    const double x = hg[i], q = sigmoid_of(x);
    ry[i] = x * q * hu[i];
    rdg[i] = hdy[i] * hu[i] * q * (1 + x * (1 - q));
    rdu[i] = hdy[i] * x * q;
    const double c = std::sqrt(2 / std::acos(-1.0)), t = std::tanh(c * (x + 0.044715 * x * x * x));
    rz[i] = x / 2 * (1 + t);
    rdz[i] = hdy[i] * ((1 + t) / 2 + x / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x));
  }
  const double bound = bound_of<T>(), more = s.add ? 3 * bound : bound, shift = s.add ? -1 : 0;
  results.row("gates " + std::to_string(n) + "x" + std::to_string(d), type_name<T>());
  results.error("y", y.read(), ry, bound);
  results.error("dg", dg.read(shift), rdg, more);
  results.error("du", du.read(shift), rdu, more);
  results.error("gelu", z.read(), rz, bound);
  results.error("dx", dz.read(shift), rdz, more);
  if (!s.add) {  // in place
    swiglu_vjp<T>(nullptr, g.matrix(), u.matrix(), dy.matrix(), g.mutable_matrix(),
                  u.mutable_matrix(), false);
    results.error("in place", g.read(), rdg, bound);
    results.error("and", u.read(), rdu, bound);
  }
  results.end();
}

/// Far from zero values and slopes are those of the limits, and NaN stays NaN.
void check_far() {
  const std::vector<float> points{-1e30f, -200, 200, 1e15f, 1e30f, NAN};
  const buffer<float> x(points), one(std::vector<float>(6, 1.0f));
  buffer<float> out(6), slope(6);
  const auto rows = [](const buffer<float>& b) { return view<float, 2>{b.data(), {1, 6}, {6, 1}}; };
  gelu_tanh<float>(nullptr, rows(x), rows(out));
  gelu_tanh_vjp<float>(nullptr, rows(x), rows(one), rows(slope), false);
  const auto y = out.host(), d = slope.host();
  bool fine = std::isnan(y[5]) && std::isnan(d[5]);
  for (int i = 0; i < 5; ++i)
    fine = fine && y[i] == (i < 2 ? 0 : points[i]) && d[i] == (i < 2 ? 0 : 1);
  if (!fine) std::printf("gelu_tanh far from zero  FAILED\n"), failed = true;
}

struct l2_case {
  index_t tokens, heads, n, pad;
  bool add, zero;  // zero: the first vector is, and eps too
};

template <class T>
void check_l2(table& results, const l2_case& s) {
  using R = accum_t<T>;
  const index_t d = s.heads * s.n;
  // With a small eps the gradient of a single number is what cancellation leaves.
  const double eps = s.zero ? 0 : s.n == 1 ? 0.5 : 1e-6;
  rows_buffer<T> x(s.tokens, d, s.pad), dy(s.tokens, d, s.pad), y(s.tokens, d, s.pad),
      dx(s.tokens, d, s.pad);
  auto hx = x.fill(1, -1, 2);
  const auto hdy = dy.fill(2, -1, 1);
  if (s.zero) {
    SSMLIB_CHECK_CUDA(cudaMemset(x.data(), 0, s.n * sizeof(T)));
    std::fill_n(hx.begin(), s.n, 0.0);
  }
  std::vector<double> ry(hx.size()), rdx(hx.size());
  for (index_t v = 0; v < s.tokens * s.heads; ++v) {
    const double *in = &hx[v * s.n], *d_out = &hdy[v * s.n];
    double squares = eps, along = 0;
    for (index_t i = 0; i < s.n; ++i)
      squares += in[i] * in[i], along += in[i] * d_out[i];
    const double inverse = squares > 0 ? 1 / std::sqrt(squares) : 0;
    for (index_t i = 0; i < s.n; ++i) {
      ry[v * s.n + i] = in[i] * inverse;
      rdx[v * s.n + i] = inverse * (d_out[i] - in[i] * inverse * inverse * along);
    }
  }
  const double start = s.add ? start_of(rdx) : 0;
  y.poison(), dx.poison();
  if (s.add) dx.set(start);
  l2_normalize<T>(nullptr, x.heads(s.heads), static_cast<R>(eps), y.mutable_heads(s.heads));
  l2_normalize_vjp<T>(nullptr, x.heads(s.heads), static_cast<R>(eps), dy.heads(s.heads),
                      dx.mutable_heads(s.heads), s.add);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const double bound = bound_of<T>(), more = s.add ? 2 * bound : bound;
  results.row("l2 " + std::to_string(s.heads) + "x" + std::to_string(s.n), type_name<T>());
  results.error("y", y.read(), ry, bound);
  results.error("dx", dx.read(-start), rdx, more);
  results.end();
}

struct step_case {
  index_t tokens, heads, pad;
  bool bias, add;
  double low, high;
};

template <class T>
void check_discretize(table& results, const step_case& s) {
  using R = accum_t<T>;
  const index_t n = s.tokens, h = s.heads;
  rows_buffer<T> dt(n, h, s.pad), d_dt(n, h, s.pad);
  rows_buffer<R> a(1, h), bias(1, h), delta(n, h, s.pad), log_a(n, h, s.pad);
  rows_buffer<R> d_delta(n, h, s.pad), d_log_a(n, h, s.pad), da(1, h), d_bias(1, h);
  const auto hdt = dt.fill(1, -8, 25), ha = a.fill(2, -4, -0.5), hb = bias.fill(3, -1, 1),
             hdd = d_delta.fill(4, -1, 1), hdl = d_log_a.fill(5, -1, 1);
  delta.poison(), log_a.poison(), d_dt.poison(), da.poison(), d_bias.poison();
  if (s.add) d_dt.set(1), da.set(1), d_bias.set(1);
  const discretize_problem<T> p{dt.matrix(), a.data(), s.bias ? bias.data() : nullptr,
                                static_cast<R>(s.low), static_cast<R>(s.high)};
  buffer<unsigned char> work(discretize_vjp_workspace_bytes(p));
  work.poison();
  discretize<T>(nullptr, p, delta.mutable_matrix(), log_a.mutable_matrix());
  discretize_vjp<T>(nullptr, p, d_delta.matrix(), d_log_a.matrix(),
                    {d_dt.mutable_matrix(), da.data(), s.bias ? d_bias.data() : nullptr, s.add},
                    work.data());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  std::vector<double> rd(n * h), rl(n * h), rdt(n * h), ra(h), rb(h), ra_scale(h);
  for (index_t i = 0; i < n * h; ++i) {
    const index_t c = i % h;
    const double r = hdt[i] + (s.bias ? hb[c] : 0), raw = r > 20 ? r : std::log1p(std::exp(r));
    rd[i] = std::clamp(raw, s.low, s.high);
    rl[i] = rd[i] * ha[c];
    const double ds = ha[c] * hdl[i] + hdd[i];
    rdt[i] = raw < s.low || raw > s.high ? 0 : ds * (r > 20 ? 1 : sigmoid_of(r));
    ra[c] += hdl[i] * rd[i];
    rb[c] += rdt[i];
  }
  const double bound = bound_of<T>(), steps = sizeof(T) == 8 ? 1e-14 : 1e-6;
  const double more = s.add ? 3 * bound : bound, sums = sizeof(T) == 8 ? 1e-12 : 1e-5;
  const double shift = s.add ? -1 : 0;
  results.row("steps " + std::to_string(n) + "x" + std::to_string(h), type_name<T>());
  results.error("delta", delta.read(), rd, steps);
  results.error("log_a", log_a.read(), rl, steps);
  results.error("d_dt", d_dt.read(shift), rdt, more);
  results.error("d_a", da.read(shift), ra, sums);
  if (s.bias) results.error("d_bias", d_bias.read(shift), rb, sums);
  results.end();
}

void print(const char* name, double ms, double bytes, double copy) {
  std::printf("%-34s %.4f ms (%.0f%% of copy)\n", name, ms, 100 * bytes / copy * 1e3 / ms);
}

void time_gates(index_t rows, index_t width, double copy) {
  using T = bf16;
  rows_buffer<T> g(rows, width), u(rows, width), dy(rows, width), y(rows, width), dg(rows, width),
      du(rows, width);
  for (auto* r : {&g, &u, &dy})
    r->fill_device(7, -3, 3);
  const double one = 2.0 * rows * width;
  std::printf("%lld rows of %lld, bf16\n", static_cast<long long>(rows),
              static_cast<long long>(width));
  const auto line = [&](const char* name, double numbers, auto f) {
    print(name, median_ms(f), numbers * one, copy);
  };
  line("swiglu", 3,
       [&](cudaStream_t q) { swiglu<T>(q, g.matrix(), u.matrix(), y.mutable_matrix()); });
  line("swiglu vjp", 5, [&](cudaStream_t q) {
    swiglu_vjp<T>(q, g.matrix(), u.matrix(), dy.matrix(), dg.mutable_matrix(), du.mutable_matrix(),
                  false);
  });
  line("gelu_tanh", 2, [&](cudaStream_t q) { gelu_tanh<T>(q, g.matrix(), y.mutable_matrix()); });
  line("gelu_tanh vjp", 3, [&](cudaStream_t q) {
    gelu_tanh_vjp<T>(q, g.matrix(), dy.matrix(), y.mutable_matrix(), false);
  });
  for (const index_t n : {64, 128, 256}) {
    const index_t heads = width / n;
    line(("l2 of " + std::to_string(n)).c_str(), 2, [&](cudaStream_t q) {
      l2_normalize<T>(q, g.heads(heads), 1e-6f, y.mutable_heads(heads));
    });
    line(("l2 vjp of " + std::to_string(n)).c_str(), 3, [&](cudaStream_t q) {
      l2_normalize_vjp<T>(q, g.heads(heads), 1e-6f, dy.heads(heads), y.mutable_heads(heads), false);
    });
  }
}

void time_steps(index_t tokens, index_t heads, double copy) {
  using T = bf16;
  rows_buffer<T> dt(tokens, heads), d_dt(tokens, heads);
  rows_buffer<float> a(1, heads), b(1, heads), delta(tokens, heads), log_a(tokens, heads),
      da(1, heads), db(1, heads);
  dt.fill_device(1, -8, 8), a.fill_device(2, -4, -1), b.fill_device(3, -1, 1);
  const discretize_problem<T> p{dt.matrix(), a.data(), b.data(), 0.0f, 1e30f};
  buffer<unsigned char> work(discretize_vjp_workspace_bytes(p));
  const double n = 10.0 * static_cast<double>(tokens * heads);
  std::printf("%lld tokens of %lld heads, bf16\n", static_cast<long long>(tokens),
              static_cast<long long>(heads));
  print("discretize", median_ms([&](cudaStream_t q) {
          discretize<T>(q, p, delta.mutable_matrix(), log_a.mutable_matrix());
        }),
        n, copy);
  print("discretize vjp", median_ms([&](cudaStream_t q) {
          discretize_vjp<T>(q, p, delta.matrix(), log_a.matrix(),
                            {d_dt.mutable_matrix(), da.data(), db.data(), false}, work.data());
        }),
        n + 2.0 * static_cast<double>(tokens * heads), copy);
}

template <class T>
void check_all(table& results, bool small) {
  for (const shape_case& s : {shape_case{37, 1536, 0, false}, shape_case{33, 77, 3, true},
                              shape_case{5, 1001, 0, false}, shape_case{70001, 8, 8, false},
                              shape_case{3, 70000, 0, true}, shape_case{0, 64, 0, false}}) {
    if (!small || std::max(s.rows, s.width) < 10000) check_gates<T>(results, s);
  }
  for (const l2_case& s :
       {l2_case{70, 12, 128, 0, false, false}, l2_case{33, 7, 64, 0, true, true},
        l2_case{9, 3, 77, 1, false, true}, l2_case{5, 3, 512, 0, false, false},
        l2_case{3, 2, 5000, 0, true, false}, l2_case{70001, 2, 8, 0, false, false},
        l2_case{65, 5, 24, 8, false, false}, l2_case{11, 3, 1, 0, false, false}}) {
    if (!small || s.tokens < 10000) check_l2<T>(results, s);
  }
  const double inf = std::numeric_limits<double>::infinity();
  for (const step_case& s :
       {step_case{601, 80, 0, true, false, 0, inf}, step_case{70, 24, 0, true, true, 0.01, 2},
        step_case{129, 7, 2, false, false, 0.1, 10}, step_case{70001, 3, 0, true, false, 0, inf},
        step_case{5, 1000, 0, true, false, 0.001, 0.5}, step_case{0, 8, 0, true, false, 0, 1}}) {
    if (!small || s.tokens < 10000) check_discretize<T>(results, s);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv);
  table results;
  check_all<double>(results, small);
  check_all<float>(results, small);
  check_all<bf16>(results, small);
  check_far();
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  time_gates(16384, 8192, copy);
  time_gates(16384, 5120, copy);
  time_steps(65536, 80, copy);
  time_steps(1 << 20, 128, copy);
  return finish();
}
