// Checks cross-entropy, divergences and embeddings on the GPU against float64 loops on the CPU,
// then times them. Exit status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/cross_entropy.cuh>
#include <ssmlib/kernels/cuda/embedding.cuh>
#include <ssmlib/kernels/cuda/token_sums.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

constexpr std::int32_t ignored = -100;
constexpr double minus_infinity = -INFINITY;

template <class T>
const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}
template <class T>
double bound_of(double bf16_bound, double float_bound, double double_bound) {
  return sizeof(T) == 2 ? bf16_bound : sizeof(T) == 4 ? float_bound : double_bound;
}

void expect(const char* what, bool fine) {
  if (!fine) std::printf("%s  FAILED\n", what), failed = true;
}

std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

double log_sum_of(const double* z, index_t n, double scale) {
  double top = minus_infinity, sum = 0;
  for (index_t i = 0; i < n; ++i)
    top = std::max(top, scale * z[i]);
  for (index_t i = 0; i < n; ++i)
    sum += std::exp(scale * z[i] - top);
  return top + std::log(sum);
}

/// Some logits are -infinity, as masks leave them: every 7th of odd rows, from the second on.
template <class T>
std::vector<double> fill_logits(rows_buffer<T>& b, index_t rows, index_t width, int seed) {
  auto v = b.fill(seed, -12, 12);
  const T out = from_double<T>(minus_infinity);
  for (index_t r = 1; r < std::min<index_t>(rows, 4); r += 2) {
    for (index_t c = 1; c < std::min<index_t>(width, 200); c += 7) {
      v[r * width + c] = minus_infinity;
      SSMLIB_CHECK_CUDA(cudaMemcpy(const_cast<T*>(&b.matrix().data[r * b.matrix().strides[0] + c]),
                                   &out, sizeof out, cudaMemcpyHostToDevice));
    }
  }
  return v;
}

struct loss_case {
  index_t rows, vocabulary, pad;
  double scale;
  bool add, in_place, per_row;
};

template <class T>
void check_cross_entropy(table& results, const loss_case& s) {
  using R = accum_t<T>;
  const index_t n = s.rows, v = s.vocabulary;
  rows_buffer<T> z(n, v, s.pad), dz(n, v, s.pad);
  const auto hz = fill_logits(z, n, v, 1);
  dz.poison();
  std::vector<std::int32_t> targets(n);
  for (index_t t = 0; t < n; ++t)
    targets[t] = t % 5 == 3 ? ignored : static_cast<std::int32_t>(mixed(t + 1) % v);
  for (index_t t = 1; t < std::min<index_t>(n, 4); t += 2)
    if (targets[t] != ignored) targets[t] = 0;  // never one of the masked
  std::vector<R> g(n);
  for (index_t t = 0; t < n; ++t)
    g[t] = static_cast<R>(0.5 + 0.25 * static_cast<double>(t % 4));
  std::vector<double> rl(n), rp(n), rd(n * v);
  double sum = 0, count = 0;
  parallel(n, [&](index_t t) {
    if (targets[t] == ignored) return;
    rl[t] = log_sum_of(&hz[t * v], v, s.scale);
    rp[t] = s.scale * hz[t * v + targets[t]] - rl[t];
    const double f = 3.0 / 4 * static_cast<double>(g[s.per_row ? t : 0]);
    for (index_t i = 0; i < v; ++i)
      rd[t * v + i] = f * (std::exp(s.scale * hz[t * v + i] - rl[t]) - (i == targets[t] ? 1 : 0));
  });
  for (index_t t = 0; t < n; ++t)
    sum -= rp[t], count += targets[t] != ignored;
  const double start = s.add ? start_of(rd) : 0;
  if (s.add) dz.set(start);
  const buffer<std::int32_t> ids(targets);
  const buffer<R> factors(g);
  const buffer<double> divisor(std::vector<double>{4});
  buffer<double> log_sum(n), log_probability(n), sums(3), work(1024);
  log_sum.poison(), log_probability.poison(), sums.poison(), work.poison();
  const cross_entropy_problem<T> p{z.matrix(), ids.data(), ignored, static_cast<R>(s.scale)};
  cross_entropy<T>(nullptr, p, log_sum.data(), log_probability.data());
  const token_values<double> values{log_probability.data(), n, ids.data(), ignored};
  expect("the workspace is small", sum_tokens_workspace_bytes(values) <= 1024 * sizeof(double));
  sum_tokens<double>(nullptr, values,
                     {sums.data(), sums.data() + 1, sums.data() + 2, -1.0, 2.0, 0.0, false},
                     work.data());
  const auto log_sums = log_sum.host();
  const row_factor<R> factor{factors.data(), s.per_row ? 1 : 0, 3.0, divisor.data()};
  rows_buffer<T>& to = s.in_place ? z : dz;
  cross_entropy_vjp<T>(nullptr, p, log_sum.data(), factor, to.mutable_matrix(), s.add);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const double logs = bound_of<T>(1e-6, 1e-6, 1e-14), bound = bound_of<T>(3e-3, 2e-6, 1e-13);
  results.row("ce " + std::to_string(n) + "x" + std::to_string(v), type_name<T>());
  results.error("log_sum", log_sums, rl, logs);
  results.error("log_p", log_probability.host(), rp, logs);
  results.error("sums", sums.host(), {sum, count, 2 * sum / std::max(count, 1.0)}, logs);
  results.error("dz", to.read(-start), rd, s.add ? 2 * bound : bound);
  results.end();
}

struct kl_case {
  index_t rows, student, teacher, pad;
  double scale;
  bool add, in_place, mask, teacher_wanted;
};

template <class T>
void check_kl(table& results, const kl_case& s) {
  using R = accum_t<T>;
  const index_t n = s.rows, vs = s.student, vt = s.teacher, v = std::min(vs, vt);
  // The teacher's rows begin elsewhere, so that with a pad the two are not aligned alike.
  rows_buffer<T> zs(n, vs, s.pad), zt(n, vt, 2 * s.pad), ds(n, vs, s.pad), dt(n, vt, 2 * s.pad);
  const auto hs = zs.fill(1, -6, 6), ht = fill_logits(zt, n, vt, 2);
  ds.poison(), dt.poison();
  std::vector<std::int32_t> mask(n);
  for (index_t t = 0; t < n; ++t)
    mask[t] = t % 4 != 2;
  std::vector<double> rs(n * vs), rt(n * vt), kl(n), la(n), lb(n);
  const double g = static_cast<double>(R(0.7));
  parallel(n, [&](index_t t) {
    if (s.mask && mask[t] == 0) return;
    const double *x = &hs[t * vs], *y = &ht[t * vt];
    la[t] = log_sum_of(x, v, s.scale), lb[t] = log_sum_of(y, v, s.scale);
    const auto ratio = [&](index_t i) { return s.scale * (y[i] - x[i]) - lb[t] + la[t]; };
    const auto prob = [&](index_t i) { return std::exp(s.scale * y[i] - lb[t]); };
    for (index_t i = 0; i < v; ++i)
      if (prob(i) > 0) kl[t] += prob(i) * ratio(i);
    for (index_t i = 0; i < v; ++i) {
      const double q = prob(i);
      rs[t * vs + i] = g * (std::exp(s.scale * x[i] - la[t]) - q);
      rt[t * vt + i] = q > 0 ? g * q * (ratio(i) - kl[t]) : 0;
    }
  });
  const double start_s = s.add ? start_of(rs) : 0, start_t = s.add ? start_of(rt) : 0;
  if (s.add) ds.set(start_s), dt.set(start_t);
  const buffer<std::int32_t> kept(mask);
  const buffer<R> one(std::vector<R>{R(0.7)});
  buffer<double> a(n), b(n), c(n);
  a.poison(), b.poison(), c.poison();
  const kl_divergence_problem<T> p{zs.matrix(), zt.matrix(), s.mask ? kept.data() : nullptr,
                                   static_cast<R>(s.scale)};
  const kl_divergence_rows rows{a.data(), b.data(), c.data()};
  kl_divergence<T>(nullptr, p, rows);
  rows_buffer<T>&to = s.in_place ? zs : ds, &teacher_to = s.in_place ? zt : dt;
  kl_divergence_vjp<T>(nullptr, p, rows, {one.data()}, to.mutable_matrix(),
                       s.teacher_wanted ? teacher_to.mutable_matrix() : view<T, 2>{}, s.add);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const double logs = bound_of<T>(1e-6, 1e-6, 1e-14), bound = bound_of<T>(3e-3, 3e-6, 1e-13);
  const double more = s.add ? 2 * bound : bound;
  results.row("kl " + std::to_string(n) + "x" + std::to_string(vs) + "/" + std::to_string(vt),
              type_name<T>());
  results.error("logs", a.host(), la, logs);
  results.error("and", b.host(), lb, logs);
  results.error("kl", c.host(), kl, bound_of<T>(3e-6, 3e-6, 1e-13));
  results.error("ds", to.read(-start_s), rs, more);
  if (s.teacher_wanted) results.error("dt", teacher_to.read(-start_t), rt, more);
  results.end();
}

/// Equal rows have no divergence and no gradient, exactly; rows of nothing have the log-sum of
/// nothing; sums over sequences are those of their tokens.
void check_exact() {
  const index_t n = 6, v = 30011;
  rows_buffer<float> z(n, v, 1), ds(n, v, 1), out(2, 3000);
  z.fill(5, -20, 20);
  ds.poison();
  const buffer<double> a(n), b(n), c(n);
  const buffer<float> one(std::vector<float>{1});
  const kl_divergence_problem<float> p{z.matrix(), z.matrix(), nullptr, 0.3f};
  kl_divergence<float>(nullptr, p, {a.data(), b.data(), c.data()});
  kl_divergence_vjp<float>(nullptr, p, {a.data(), b.data(), c.data()}, {one.data()},
                           ds.mutable_matrix(), {}, false);
  const auto kl = c.host();
  const auto d = ds.read();
  const auto zero = [](double x) { return x == 0; };
  expect("equal rows have no divergence", std::all_of(kl.begin(), kl.end(), zero));
  expect("equal rows have no gradient", std::all_of(d.begin(), d.end(), zero));
  out.set(minus_infinity);
  const buffer<std::int32_t> targets(std::vector<std::int32_t>{0, 3000});
  cross_entropy<float>(nullptr, {out.matrix(), targets.data()}, a.data(), b.data());
  expect("a row of -infinity", a.host()[0] == minus_infinity && a.host()[1] == minus_infinity);
  expect("a target outside the row is NaN", std::isnan(b.host()[1]));
  const std::vector<float> values{1, 2, 4, 8, 16, 32};
  const buffer<float> numbers(values);
  const buffer<std::int32_t> mask(std::vector<std::int32_t>{1, 1, 0, 1, 1, 1});
  const buffer<index_t> offsets(std::vector<index_t>{0, 3, 3, 6});
  const token_values<float> of{numbers.data(), 6, nullptr, 0, mask.data()};
  const buffer<double> sums(3), work(2);
  sum_sequences<float>(nullptr, of, offsets.data(), 3, sums.data());
  expect("packed sequences", sums.host() == std::vector<double>{3, 0, 56});
  sum_sequences<float>(nullptr, of, nullptr, 3, sums.data());
  expect("rectangular sequences", sums.host() == std::vector<double>{3, 8, 48});
  sum_tokens<float>(nullptr, of, {sums.data(), sums.data() + 1}, work.data());
  sum_tokens<float>(nullptr, of, {sums.data(), sums.data() + 1, sums.data() + 2, 1, 1, 0, true},
                    work.data());
  expect("sums of parts", sums.host() == std::vector<double>{118, 10, 11.8});
}

void check_many_sums() {
  const index_t n = (index_t{1} << 20) + 1;
  std::vector<double> values(n);
  double sum = 0;
  for (index_t t = 0; t < n; ++t)
    sum += values[t] = static_cast<double>(mixed(t) % 1000);
  const buffer<double> v(values), out(2);
  const token_values<double> of{v.data(), n};
  const buffer<unsigned char> work(sum_tokens_workspace_bytes(of));
  sum_tokens<double>(nullptr, of, {out.data(), out.data() + 1}, work.data());
  expect("a million tokens", out.host() == std::vector<double>{sum, static_cast<double>(n)});
}

struct embedding_case {
  index_t tokens, vocabulary, width, pad;
  int skew;  // 0: uniform, 1: half of the tokens are one id, 2: all are
  bool add;
};

template <class T, class S>
void check_embedding(table& results, const embedding_case& s) {
  using R = accum_t<T>;
  const index_t n = s.tokens, w = s.width;
  rows_buffer<S> from(s.vocabulary, w, s.pad);
  rows_buffer<T> y(n, w, s.pad), dy(n, w, s.pad);
  rows_buffer<R> d(s.vocabulary, w, s.pad);
  const auto hf = from.fill(1, -1, 1), hdy = dy.fill(2, -1, 1);
  std::vector<std::int32_t> ids(n);
  for (index_t t = 0; t < n; ++t) {
    const bool same = s.skew == 2 || (s.skew == 1 && mixed(t + 77) % 2 == 0);
    ids[t] = static_cast<std::int32_t>(same ? s.vocabulary / 2 : mixed(t + 5) % s.vocabulary);
  }
  const index_t bad = n > 100 ? 70 : -1;
  if (bad >= 0) ids[bad] = static_cast<std::int32_t>(s.vocabulary), ids[bad + 9] = -1;
  const buffer<std::int32_t> id(ids);
  const buffer<std::int64_t> position(1);
  const embedding_vjp_problem<T> p{id.data(), dy.matrix()};
  buffer<unsigned char> work(embedding_vjp_workspace_bytes(p, s.vocabulary));
  y.poison(), d.poison(), work.poison();
  if (s.add) d.set(1);
  first_id_outside<std::int32_t>(nullptr, id.data(), n, s.vocabulary, {}, position.data());
  expect("the first bad id", position.host()[0] == bad);
  first_id_outside<std::int32_t>(nullptr, id.data(), n, s.vocabulary,
                                 static_cast<std::int32_t>(s.vocabulary), position.data());
  expect("the first bad id but one", position.host()[0] == (bad < 0 ? -1 : bad + 9));
  embedding<T, S>(nullptr, from.matrix(), id.data(), y.mutable_matrix());
  embedding_vjp<T>(nullptr, p, d.mutable_matrix(), s.add, work.data());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  std::vector<double> ry(n * w), rd(s.vocabulary * w), got = y.read();
  for (index_t t = 0; t < n; ++t) {
    if (bad >= 0 && (t == bad || t == bad + 9)) {
      expect("a bad id gives NaN", std::isnan(got[t * w]) && std::isnan(got[t * w + w - 1]));
      std::fill_n(&got[t * w], w, 0.0);
      continue;
    }
    for (index_t i = 0; i < w; ++i) {
      ry[t * w + i] = to_double(from_double<T>(hf[ids[t] * w + i]));
      rd[ids[t] * w + i] += hdy[t * w + i];
    }
  }
  results.row("emb " + std::to_string(n) + "x" + std::to_string(w), type_name<T>());
  results.error("y", got, ry, 0);
  results.error("d", d.read(s.add ? -1 : 0), rd, sizeof(T) == 8 ? 1e-14 : 2e-6);
  results.end();
  if (n > 0 && !s.add) {
    const auto once = d.read();
    embedding_vjp<T>(nullptr, p, d.mutable_matrix(), false, work.data());
    expect("the same bits again", d.read() == once);
  }
}

// ---- timings ------------------------------------------------------------------------------------

void print(const std::string& name, double ms, double bytes, double copy) {
  std::printf("%-36s %.4f ms (%.0f%% of copy)\n", name.c_str(), ms, 100 * bytes / copy * 1e3 / ms);
}

template <class T>
void time_losses(index_t rows, index_t v, bool pair, double copy) {
  rows_buffer<T> z(rows, v), teacher;
  if (pair) teacher = rows_buffer<T>(rows, v), teacher.fill_device(2, -5, 5);
  z.fill_device(1, -5, 5);
  std::vector<std::int32_t> targets(rows);
  for (index_t t = 0; t < rows; ++t)
    targets[t] = static_cast<std::int32_t>(mixed(t) % v);
  const buffer<std::int32_t> ids(targets);
  const buffer<float> g(std::vector<float>{1});
  const buffer<double> a(rows), b(rows), c(rows);
  const double one = static_cast<double>(sizeof(T)) * static_cast<double>(rows * v);
  const std::string size =
      " " + std::to_string(rows) + " x " + std::to_string(v) + " " + type_name<T>();
  if (!pair) {
    const cross_entropy_problem<T> p{z.matrix(), ids.data()};
    print("cross entropy" + size,
          median_ms([&](cudaStream_t q) { cross_entropy<T>(q, p, a.data(), b.data()); }), one,
          copy);
    print("  its vjp, in place", median_ms([&](cudaStream_t q) {
            cross_entropy_vjp<T>(q, p, a.data(), {g.data()}, z.mutable_matrix(), false);
          }),
          2 * one, copy);
    return;
  }
  const kl_divergence_problem<T> p{z.matrix(), teacher.matrix()};
  const kl_divergence_rows r{a.data(), b.data(), c.data()};
  print("kl divergence" + size, median_ms([&](cudaStream_t q) { kl_divergence<T>(q, p, r); }),
        2 * one, copy);
  print("  its vjp, in place", median_ms([&](cudaStream_t q) {
          kl_divergence_vjp<T>(q, p, r, {g.data()}, z.mutable_matrix(), {}, false);
        }),
        3 * one, copy);
}

void time_embedding(index_t tokens, index_t width, int skew, double copy) {
  const index_t vocabulary = 50304;
  rows_buffer<float> from(vocabulary, width), d(vocabulary, width);
  rows_buffer<bf16> y(tokens, width), dy(tokens, width);
  from.fill_device(1, -1, 1), dy.fill_device(2, -1, 1), d.set(0);
  std::vector<std::int32_t> ids(tokens);
  std::vector<char> seen(vocabulary);
  for (index_t t = 0; t < tokens; ++t) {
    const bool same = skew == 2 || (skew == 1 && mixed(t + 77) % 4 == 0);
    ids[t] = static_cast<std::int32_t>(same ? 11 : mixed(t + 5) % vocabulary);
    seen[ids[t]] = 1;
  }
  const double kinds = static_cast<double>(std::count(seen.begin(), seen.end(), 1));
  const buffer<std::int32_t> id(ids);
  const embedding_vjp_problem<bf16> p{id.data(), dy.matrix()};
  const buffer<unsigned char> work(embedding_vjp_workspace_bytes(p, vocabulary));
  const double n = static_cast<double>(tokens), w = static_cast<double>(width);
  const char* how = skew == 0 ? " uniform" : skew == 1 ? " a quarter equal" : " all equal";
  print("embedding " + std::to_string(tokens) + " x " + std::to_string(width) + how,
        median_ms([&](cudaStream_t q) {
          embedding<bf16, float>(q, from.matrix(), id.data(), y.mutable_matrix());
        }),
        2 * n * w + 4 * kinds * w, copy);
  print("  its vjp", median_ms([&](cudaStream_t q) {
          embedding_vjp<bf16>(q, p, d.mutable_matrix(), true, work.data());
        }),
        2 * n * w + 8 * kinds * w, copy);
}

template <class T>
void check_all(table& results, bool small) {
  for (const loss_case& s :
       {loss_case{37, 1000, 0, 1.0, false, false, true},
        loss_case{9, 1, 0, 1.0, false, false, false}, loss_case{33, 7, 3, 0.5, true, false, true},
        loss_case{21, 2049, 1, 2.0, false, true, true},
        loss_case{7, 50257, 0, 1.0, false, true, true},
        loss_case{600, 2304, 0, 0.7, true, false, false},
        loss_case{3, 300001, 5, 1.0, false, false, true},
        loss_case{70001, 16, 0, 1.0, false, true, true},
        loss_case{0, 16, 0, 1.0, false, true, true}}) {
    if (!small || s.rows * s.vocabulary < 400000) check_cross_entropy<T>(results, s);
  }
  for (const kl_case& s : {kl_case{37, 1000, 1000, 0, 1.0, false, false, true, true},
                           kl_case{6, 50257, 50257, 0, 0.5, false, true, false, true},
                           kl_case{9, 3001, 2999, 1, 1.0, true, false, true, true},
                           kl_case{9, 2999, 3007, 0, 0.25, false, true, true, false},
                           kl_case{3, 128256, 128000, 0, 1.0, false, false, false, true},
                           kl_case{600, 40, 40, 0, 1.0, false, true, true, true}}) {
    if (!small || s.rows * s.student < 400000) check_kl<T>(results, s);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table results;
  if (all) check_all<double>(results, small), check_all<float>(results, small);
  check_all<bf16>(results, small);
  check_exact();
  check_many_sums();
  for (const embedding_case& s :
       {embedding_case{5000, 1000, 128, 0, 0, false}, embedding_case{5000, 300, 77, 1, 1, true},
        embedding_case{3001, 65536, 64, 0, 2, false}, embedding_case{1, 1, 8, 0, 0, false},
        embedding_case{0, 5, 8, 0, 0, false}, embedding_case{64, 2, 520, 0, 1, true},
        embedding_case{70001, 40, 8, 0, 1, false}}) {
    if (small && s.tokens > 4000) continue;
    check_embedding<double, double>(results, s);
    check_embedding<float, float>(results, s);
    check_embedding<bf16, float>(results, s);
    check_embedding<bf16, bf16>(results, s);
  }
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  time_losses<bf16>(8192, 50304, false, copy);
  time_losses<bf16>(8192, 50257, false, copy);
  time_losses<float>(4096, 50304, false, copy);
  time_losses<bf16>(1024, 300000, false, copy);
  time_losses<bf16>(16, 300000, false, copy);
  time_losses<bf16>(65536, 1024, false, copy);
  time_losses<bf16>(4096, 50304, true, copy);
  time_losses<float>(2048, 50304, true, copy);
  for (const int skew : {0, 1, 2})
    time_embedding(65536, 2048, skew, copy);
  time_embedding(8192, 768, 0, copy);
  return finish();
}
