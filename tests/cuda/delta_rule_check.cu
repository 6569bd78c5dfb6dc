// Checks the gated delta rule on the GPU against a float64 recurrence and its reverse on the
// CPU, then times it. Exit status 0: all pass, 1: a failure, 2: no device.

#include "gated_support.cuh"
#include <ssmlib/kernels/cuda/delta_rule_vjp.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

template <class T>
struct setting {
  using R = accum_t<T>;
  const gated_case& c;
  index_t tokens, heads, n, p;
  std::vector<index_t> offsets;
  buffer<index_t> device_offsets;
  operand<T> q, k, v, dy, y, dq, dk, dv;
  operand<R> gate, beta, d_gate, d_beta;
  states_buffer<R> initial, final, d_final, d_initial;
  double alpha = 0.3;

  explicit setting(const gated_case& of)
      : c(of),
        tokens(of.tokens()),
        heads(of.heads),
        n(of.keys),
        p(of.features),
        offsets(of.offsets()),
        device_offsets(offsets),
        q(tokens, of.groups, n, pad()),
        k(tokens, of.heads, n, pad()),
        v(tokens, of.groups, p, pad()),
        dy(tokens, heads, p, pad()),
        y(tokens, heads, p, pad()),
        dq(tokens, heads, n, pad()),
        dk(tokens, heads, n, pad()),
        dv(tokens, heads, p, pad()),
        gate(tokens, of.groups, 1, pad()),
        beta(tokens, of.heads, 1, pad()),
        d_gate(tokens, heads, 1, pad()),
        d_beta(tokens, heads, 1, pad()),
        initial(of.sequences(), heads, n, p),
        final(of.sequences(), heads, n, p),
        d_final(of.sequences(), heads, n, p),
        d_initial(of.sequences(), heads, n, p) {
    q.random(1, -1, 1), v.random(3, -1, 1), dy.random(4, -1, 1);
    k.random(2, -std::sqrt(3.0 / n), std::sqrt(3.0 / n));  // of length about 1
    random_gates(gate, 5, of.strong);
    beta.random(8, 0, 1);
    initial.data.random(6, -1, 1), d_final.data.random(7, -1, 1);
    for (auto* x : {&q, &k, &v, &dy})
      x->upload();
    gate.upload(), beta.upload(), initial.data.upload(), d_final.data.upload();
    y.poison(), final.data.poison();
    for (auto* x : {&dq, &dk, &dv}) {
      x->fill(1);
      x->upload();
      if (!c.add) x->poison();
    }
    for (auto* x : {&d_gate, &d_beta, &d_initial.data}) {
      x->fill(1);
      x->upload();
      if (!c.add) x->poison();
    }
  }
  setting(const setting&) = delete;

  [[nodiscard]] index_t pad() const { return c.slices ? 1 : 0; }
  [[nodiscard]] delta_rule_problem<T> problem() const {
    return {q.get(),       k.get(),
            v.get(),       gate.column(),
            beta.column(), static_cast<R>(alpha),
            heads,         c.packed ? device_offsets.data() : nullptr,
            c.sequences(), c.packed ? 0 : c.lengths[0]};
  }
};

struct results {
  std::vector<double> y, dq, dk, dv, d_gate, d_beta, final, d_initial;
};

// One head of one sequence: the recurrence, every state kept, and its reverse.
template <class T>
void reference(const setting<T>& s, index_t i, index_t h, results& r) {
  const index_t n = s.n, p = s.p, cells = n * p, begin = s.offsets[i],
                length = s.offsets[i + 1] - begin;
  std::vector<double> all((length + 1) * cells), e(cells);
  if (s.c.states) {
    for (index_t j = 0; j < cells; ++j) {
      all[j] = s.initial.data.host[(i * s.heads + h) * cells + j];
      e[j] = s.d_final.data.host[(i * s.heads + h) * cells + j];
    }
  }
  std::vector<double> held(p), update(p), d_held(p), d_update(p);
  // What the state holds for a token's key before the token, and what the token writes.
  const auto write = [&](index_t t) {
    const index_t row = begin + t;
    const double *k = s.k.at(row, h, s.heads), *v = s.v.at(row, h, s.heads);
    const double kept = std::exp(s.gate.at(row, h, s.heads)[0]),
                 rate = s.beta.at(row, h, s.heads)[0];
    std::fill(held.begin(), held.end(), 0.0);
    for (index_t a = 0; a < n; ++a)
      for (index_t b = 0; b < p; ++b)
        held[b] += kept * all[t * cells + a * p + b] * k[a];
    for (index_t b = 0; b < p; ++b)
      update[b] = rate * (v[b] - held[b]);
  };
  for (index_t t = 0; t < length; ++t) {
    const index_t row = begin + t;
    const double *q = s.q.at(row, h, s.heads), *k = s.k.at(row, h, s.heads);
    const double kept = std::exp(s.gate.at(row, h, s.heads)[0]);
    const double* before = &all[t * cells];
    double *after = &all[(t + 1) * cells], *y = &r.y[(row * s.heads + h) * p];
    write(t);
    for (index_t a = 0; a < n; ++a) {
      for (index_t b = 0; b < p; ++b) {
        after[a * p + b] = kept * before[a * p + b] + k[a] * update[b];
        y[b] += s.alpha * q[a] * after[a * p + b];
      }
    }
  }
  for (index_t j = 0; j < cells; ++j)
    r.final[(i * s.heads + h) * cells + j] = all[length * cells + j];
  for (index_t t = length; t-- > 0;) {
    const index_t row = begin + t, out = row * s.heads + h;
    const double *q = s.q.at(row, h, s.heads), *k = s.k.at(row, h, s.heads),
                 *v = s.v.at(row, h, s.heads), *dy = s.dy.at(row, h, s.heads);
    const double kept = std::exp(s.gate.at(row, h, s.heads)[0]),
                 rate = s.beta.at(row, h, s.heads)[0];
    const double *before = &all[t * cells], *after = before + cells;
    write(t);
    std::fill(d_update.begin(), d_update.end(), 0.0);
    for (index_t a = 0; a < n; ++a) {
      for (index_t b = 0; b < p; ++b) {
        const index_t j = a * p + b;
        e[j] += s.alpha * q[a] * dy[b];
        r.dq[out * n + a] += s.alpha * after[j] * dy[b];
        r.dk[out * n + a] += e[j] * update[b];
        d_update[b] += e[j] * k[a];
      }
    }
    for (index_t b = 0; b < p; ++b) {
      r.d_beta[out] += d_update[b] * (v[b] - held[b]);
      r.dv[out * p + b] = rate * d_update[b];
      d_held[b] = -rate * d_update[b];
    }
    for (index_t a = 0; a < n; ++a) {
      for (index_t b = 0; b < p; ++b) {
        const index_t j = a * p + b;
        r.dk[out * n + a] += kept * before[j] * d_held[b];
        e[j] = kept * (e[j] + k[a] * d_held[b]);
        r.d_gate[out] += before[j] * e[j];
      }
    }
  }
  for (index_t j = 0; j < cells; ++j)
    r.d_initial[(i * s.heads + h) * cells + j] = e[j];
}

template <class T>
void check(table& out, const gated_case& c) {
  using R = accum_t<T>;
  setting<T> s(c);
  results r{std::vector<double>(s.tokens * s.heads * s.p),
            std::vector<double>(s.tokens * s.heads * s.n),
            std::vector<double>(s.tokens * s.heads * s.n),
            std::vector<double>(s.tokens * s.heads * s.p),
            std::vector<double>(s.tokens * s.heads),
            std::vector<double>(s.tokens * s.heads),
            std::vector<double>(s.initial.data.host.size()),
            std::vector<double>(s.initial.data.host.size())};
  parallel(c.sequences() * s.heads, [&](index_t j) { reference(s, j / s.heads, j % s.heads, r); });
  const auto p = s.problem();
  const gated_states<T> states =
      c.states ? gated_states<T>{s.initial.get(), s.final.get()} : gated_states<T>{};
  const double bound = sizeof(T) == 2 ? 1e-2 : sizeof(T) == 4 ? 1e-5 : 1e-13;
  const double more = 2 * bound * (c.add && sizeof(T) < 8 ? 2 : 1);
  out.row(c.name, type_name<T>());
  delta_rule_recurrent<T>(nullptr, p, s.y.mutable_rows(), states, {});
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  out.error("rec", s.y.read(), r.y, sizeof(T) == 2 ? 3e-3 : bound);
  if (c.states) out.error("S", s.final.data.read(), r.final, sizeof(T) == 8 ? 1e-13 : 1e-5);
  s.y.poison();
  if (c.states) s.final.data.poison();
  const gated_states<T> again =
      c.states ? gated_states<T>{s.initial.get(), s.final.get()} : gated_states<T>{};
  {
    buffer<unsigned char> work(delta_rule_workspace_bytes(p));
    work.poison();
    delta_rule_chunked<T>(nullptr, p, s.y.mutable_rows(), again, work.data());
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  }
  out.error("y", s.y.read(), r.y, bound);
  if (c.states) out.error("S", s.final.data.read(), r.final, bound);
  delta_rule_gradients<T> d{s.dq.mutable_rows(),
                            s.dk.mutable_rows(),
                            s.dv.mutable_rows(),
                            s.d_gate.mutable_column(),
                            s.d_beta.mutable_column(),
                            c.states ? s.d_initial.get() : view<R, 4>{},
                            c.add};
  buffer<unsigned char> work(delta_rule_vjp_workspace_bytes(p));
  work.poison();
  delta_rule_vjp<T>(nullptr, p, s.dy.get(), c.states ? s.initial.get() : view<R, 4>{},
                    c.states ? s.d_final.get() : view<R, 4>{}, d, work.data());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const double shift = c.add ? -1 : 0;
  out.error("dq", s.dq.read(shift), r.dq, more);
  out.error("dk", s.dk.read(shift), r.dk, more);
  out.error("dg", s.d_gate.read(shift), r.d_gate, more);
  out.error("db", s.d_beta.read(shift), r.d_beta, more);
  out.error("dv", s.dv.read(shift), r.dv, more);
  if (c.states) out.error("dS", s.d_initial.data.read(shift), r.d_initial, more);
  out.end();
}

// Steps of 1 to 16 tokens leave the bits of one long call, and the ring the states between.
template <class T>
void check_steps() {
  using R = accum_t<T>;
  const gated_case c{"steps", {136}, 2, 1, 96, 80};
  setting<T> s(c);
  auto p = s.problem();
  const index_t slots = 16;
  states_buffer<R> ring(slots, s.heads, s.n, s.p), state(1, s.heads, s.n, s.p);
  operand<T> parts(s.tokens, s.heads, s.p);
  const buffer<index_t> first(std::vector<index_t>{5});
  ring.data.poison(), state.data.poison(), parts.poison();
  delta_rule_recurrent<T>(nullptr, p, s.y.mutable_rows(), {s.initial.get(), s.final.get()},
                          {ring.get(), slots, first.data()});
  index_t begin = 0, wrong = 0;
  const auto kept = ring.data.device.host();
  for (index_t size = 16; size > 0; --size) {
    const std::vector<index_t> range{begin, begin + size};
    const buffer<index_t> offsets(range);
    p.offsets = offsets.data();
    delta_rule_recurrent<T>(nullptr, p, parts.mutable_rows(),
                            {begin == 0 ? s.initial.get() : state.get(), state.get()}, {});
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
    begin += size;
    if (begin >= s.tokens - slots && begin < s.tokens) {
      const auto now = state.data.device.host();
      const auto row = static_cast<std::ptrdiff_t>((5 + begin) % slots * now.size());
      wrong += different_bits(
          now, std::vector<R>(kept.begin() + row,
                              kept.begin() + row + static_cast<std::ptrdiff_t>(now.size())));
    }
  }
  wrong += different_bits(parts.device.host(), s.y.device.host()) +
           different_bits(state.data.device.host(), s.final.data.device.host());
  expect(wrong == 0, "steps of 1 to 16 tokens have the bits of one call");
}

template <class T>
void time(index_t batch, index_t length, index_t heads, index_t n, index_t p, double copy) {
  using R = accum_t<T>;
  const index_t rows = batch * length;
  rows_buffer<T> q(rows, heads * n), k(rows, heads * n), v(rows, heads * p), dy(rows, heads * p),
      y(rows, heads * p), dq(rows, heads * n), dk(rows, heads * n), dv(rows, heads * p);
  rows_buffer<R> g(rows, heads), beta(rows, heads), dg(rows, heads), db(rows, heads);
  for (auto* x : {&q, &v, &dy})
    x->fill_device(7, -1, 1);
  k.fill_device(6, -std::sqrt(3.0 / n), std::sqrt(3.0 / n));
  g.fill_device(8, -0.2, 0), beta.fill_device(9, 0, 1);
  const delta_rule_problem<T> o{q.heads(heads), k.heads(heads), v.heads(heads), g.matrix(),
                                beta.matrix(),  R(0.1),         heads,          nullptr,
                                batch,          length};
  const delta_rule_gradients<T> d{dq.mutable_heads(heads),
                                  dk.mutable_heads(heads),
                                  dv.mutable_heads(heads),
                                  dg.mutable_matrix(),
                                  db.mutable_matrix(),
                                  {},
                                  false};
  buffer<unsigned char> work(delta_rule_vjp_workspace_bytes(o));
  const double f = median_ms([&](cudaStream_t st) {
    delta_rule_chunked<T>(st, o, y.mutable_heads(heads), {}, work.data());
  });
  const double b = median_ms(
      [&](cudaStream_t st) { delta_rule_vjp<T>(st, o, dy.heads(heads), {}, {}, d, work.data()); });
  const double r = length > 4096 ? 0 : median_ms([&](cudaStream_t st) {
    delta_rule_recurrent<T>(st, o, y.mutable_heads(heads), {}, {});
  });
  const double size = sizeof(T), real = sizeof(R), token = 1.0 * rows * heads;
  const double bytes = token * (2 * size * (n + p) + 2 * real),
               back = token * (size * (4 * n + 3 * p) + 4 * real);
  const double flops = token * (6.0 * n * p + 64.0 * (3 * n + 2 * p)),
               flops_back = token * (18.0 * n * p + 64.0 * (8 * n + 7 * p));
  std::printf(
      "%s b%lld T%lld H%lld N%lld P%lld: fwd %.3f ms (floor %.3f: %.0f%%; %.0f TFLOP/s), bwd %.3f "
      "ms (floor %.3f: %.0f%%; %.0f TFLOP/s), recurrent %.3f ms\n",
      type_name<T>(), static_cast<long long>(batch), static_cast<long long>(length),
      static_cast<long long>(heads), static_cast<long long>(n), static_cast<long long>(p), f,
      bytes / copy * 1e3, 100 * bytes / copy * 1e3 / f, flops / f * 1e-9, b, back / copy * 1e3,
      100 * back / copy * 1e3 / b, flops_back / b * 1e-9, r);
}

// One token of a large batch: the states are read and written once.
void time_step(index_t batch, index_t heads, index_t n, index_t p, double copy) {
  rows_buffer<bf16> q(batch, heads * n), k(batch, heads * n), v(batch, heads * p),
      y(batch, heads * p);
  rows_buffer<float> g(batch, heads), beta(batch, heads), state(batch, heads * n * p);
  for (auto* x : {&q, &v})
    x->fill_device(7, -1, 1);
  k.fill_device(6, -std::sqrt(3.0 / n), std::sqrt(3.0 / n));
  g.fill_device(8, -0.2, 0), beta.fill_device(9, 0, 1), state.fill_device(9, -1, 1);
  const view<float, 4> s{state.data(), {batch, heads, n, p}, {heads * n * p, n * p, p, 1}};
  const delta_rule_problem<bf16> o{
      q.heads(heads), k.heads(heads), v.heads(heads), g.matrix(), beta.matrix(),
      0.1f,           heads,          nullptr,        batch,      1};
  const double ms = median_ms([&](cudaStream_t st) {
    delta_rule_recurrent<bf16>(st, o, y.mutable_heads(heads), {s, s}, {});
  });
  const double floor = 8.0 * batch * heads * n * p / copy * 1e3;
  std::printf("one token b%lld H%lld N%lld P%lld: %.4f ms (floor %.4f: %.0f%%)\n",
              static_cast<long long>(batch), static_cast<long long>(heads),
              static_cast<long long>(n), static_cast<long long>(p), ms, floor, 100 * floor / ms);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table out;
  for (const auto& c : gated_cases()) {
    if (all) check<double>(out, c), check<float>(out, c);
    check<bf16>(out, c);
  }
  for (const auto& c : full_cases())
    check<bf16>(out, c);
  if (small) return finish();
  check<bf16>(out, long_case());
  check<bf16>(out, many_case());
  check_steps<bf16>();
  if (all) check_steps<float>();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  time<bf16>(8, 2048, 16, 128, 128, copy);
  time<bf16>(8, 2048, 16, 64, 64, copy);
  time<bf16>(8, 2048, 16, 256, 256, copy);
  time<bf16>(1, 32768, 16, 128, 128, copy);
  time<float>(2, 2048, 16, 128, 128, copy);
  time_step(128, 16, 128, 128, copy);
  return finish();
}
