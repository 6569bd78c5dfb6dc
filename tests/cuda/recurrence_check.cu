#include "check.cuh"
#include <ssmlib/kernels/cuda/recurrence.cuh>
#include <ssmlib/kernels/cuda/selective_step.cuh>

/// @file
/// Recurrent states on the GPU against float64, and bit by bit over splits into calls, batches,
/// snapshots and replays.

namespace {

using namespace ssm;
using namespace ssm::cuda_check;
using namespace ssm::kernels::cuda;

template <class T>
const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}

template <class T>
__global__ void gather_kernel(view<const T, 2> from, const index_t* rows, view<T, 2> to) {
  for (index_t i = threadIdx.x; i < to.extents[1]; i += blockDim.x) {
    to.data[blockIdx.x * to.strides[0] + i] = from.data[rows[blockIdx.x] * from.strides[0] + i];
  }
}

/// The first rows of `to` become those of `from` that a list on the device names.
template <class T>
void gather(const rows_buffer<T>& from, const buffer<index_t>& rows, index_t count,
            rows_buffer<T>& to) {
  if (count == 0) return;
  gather_kernel<T>
      <<<static_cast<unsigned>(count), 64>>>(from.matrix(), rows.data(), to.mutable_matrix());
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}
/// Memory is kept from call to call: to allocate it takes longer than the kernels do.
template <class T>
void upload(const std::vector<T>& from, buffer<T>& to) {
  SSMLIB_CHECK_CUDA(
      cudaMemcpy(to.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
}

/// The next tokens of every sequence: `count` of them from `position` on, as rows of the whole.
struct pieces {
  std::vector<index_t> rows, offsets{0};

  void add(index_t first, index_t count) {
    for (index_t t = 0; t < count; ++t)
      rows.push_back(first + t);
    offsets.push_back(static_cast<index_t>(rows.size()));
  }
  [[nodiscard]] index_t longest() const {
    index_t most = 0;
    for (std::size_t i = 1; i < offsets.size(); ++i)
      most = std::max(most, offsets[i] - offsets[i - 1]);
    return most;
  }
};

/// Copies the rows of a result to where the whole has them.
void place(const std::vector<double>& from, const pieces& at, index_t width,
           std::vector<double>& to) {
  for (std::size_t i = 0; i < at.rows.size(); ++i)
    std::copy_n(&from[i * width], width, &to[at.rows[i] * width]);
}

// ----------------------------------------------------------------------------- scalar-gated states

enum class gating { none, gamma, log_a, dt };

struct ssd_case {
  const char* name;
  std::vector<index_t> lengths;
  index_t heads, q_groups, k_groups, x_groups, keys, features;
  gating gate;
  double low, high;  // of the log decays
  bool skip;
};

template <class T>
struct ssd_operands {
  using R = accum_t<T>;
  rows_buffer<T> q, k, x, dt;
  rows_buffer<R> log_a, weight;

  void pick(const buffer<index_t>& rows, index_t n, ssd_operands& to) const {
    gather(q, rows, n, to.q), gather(k, rows, n, to.k), gather(x, rows, n, to.x);
    gather(dt, rows, n, to.dt);
    gather(log_a, rows, n, to.log_a), gather(weight, rows, n, to.weight);
  }
};

template <class T>
struct ssd_setup {
  using R = accum_t<T>;
  ssd_case c;
  ssd_operands<T> whole;
  buffer<R> gamma, d, a, bias;

  [[nodiscard]] ssd_problem<T> problem(const ssd_operands<T>& o) const {
    ssd_problem<T> p;
    p.heads = c.heads;
    p.q = o.q.heads(c.q_groups), p.k = o.k.heads(c.k_groups), p.x = o.x.heads(c.x_groups);
    if (c.gate == gating::log_a) p.log_a = o.log_a.matrix(), p.weight = o.weight.matrix();
    if (c.gate == gating::gamma) p.gamma = {gamma.data(), {c.heads}, {1}};
    if (c.gate == gating::dt) {
      p.dt = o.dt.matrix();
      p.a = {a.data(), {c.heads}, {1}};
      p.dt_bias = {bias.data(), {c.heads}, {1}};
    }
    if (c.skip) p.d = {d.data(), {c.heads}, {1}};
    p.alpha = R(0.5);
    return p;
  }
};

double softplus_of(double x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}

template <class T>
void check_ssd(table& results, const ssd_case& c) {
  using R = accum_t<T>;
  const index_t sequences = static_cast<index_t>(c.lengths.size()), H = c.heads;
  const index_t N = c.keys, P = c.features, size = H * N * P;
  std::vector<index_t> offsets{0};
  for (const index_t n : c.lengths)
    offsets.push_back(offsets.back() + n);
  const index_t tokens = offsets.back();
  ssd_setup<T> s{c,
                 {rows_buffer<T>(tokens, c.q_groups * N, 3), rows_buffer<T>(tokens, c.k_groups * N),
                  rows_buffer<T>(tokens, c.x_groups * P, 1), rows_buffer<T>(tokens, H),
                  rows_buffer<R>(tokens, H), rows_buffer<R>(tokens, H)},
                 {},
                 {},
                 {},
                 {}};
  const auto q = s.whole.q.fill(1, -1, 1), k = s.whole.k.fill(2, -1, 1);
  const auto x = s.whole.x.fill(3, -1, 1), dt = s.whole.dt.fill(4, -3, 1);
  const auto log_a = s.whole.log_a.fill(5, c.low, c.high), weight = s.whole.weight.fill(6, 0, 1);
  std::vector<R> gamma(H), d(H), a(H), bias(H);
  for (index_t h = 0; h < H; ++h) {
    gamma[h] = h == 0 ? R(1) : static_cast<R>(1 - std::pow(2.0, -5.0 - h % 8));
    d[h] = static_cast<R>(0.1 * (h % 7) - 0.2), a[h] = static_cast<R>(-0.01 - 0.3 * (h % 5));
    bias[h] = static_cast<R>(0.05 * (h % 3));
  }
  s.gamma = buffer<R>(gamma), s.d = buffer<R>(d), s.a = buffer<R>(a), s.bias = buffer<R>(bias);
  rows_buffer<R> initial(sequences, size);
  const auto h0 = initial.fill(7, -1, 1);

  std::vector<double> y(tokens * H * P), last(sequences * size), before(tokens * size);
  parallel(sequences * H, [&](index_t task) {
    const index_t i = task / H, h = task % H;
    std::vector<double> state(&h0[i * size + h * N * P], &h0[i * size + h * N * P] + N * P);
    for (index_t t = offsets[i]; t < offsets[i + 1]; ++t) {
      std::copy(state.begin(), state.end(), &before[t * size + h * N * P]);
      double l = 0, w = 1;
      if (c.gate == gating::gamma) l = std::log(static_cast<double>(gamma[h]));
      if (c.gate == gating::log_a) l = log_a[t * H + h], w = weight[t * H + h];
      if (c.gate == gating::dt) w = softplus_of(dt[t * H + h] + bias[h]), l = a[h] * w;
      for (index_t p = 0; p < P; ++p) {
        const double value = x[(t * c.x_groups + h * c.x_groups / H) * P + p];
        double sum = 0;
        for (index_t n = 0; n < N; ++n) {
          double& e = state[n * P + p];
          e = std::exp(l) * e + w * k[(t * c.k_groups + h * c.k_groups / H) * N + n] * value;
          sum += q[(t * c.q_groups + h * c.q_groups / H) * N + n] * e;
        }
        y[(t * H + h) * P + p] = 0.5 * sum + (c.skip ? d[h] * value : 0);
      }
    }
    std::copy(state.begin(), state.end(), &last[i * size + h * N * P]);
  });

  const shape<4> states{sequences, H, N, P}, strides{size, N * P, P, 1};
  const auto ring_view = [&](rows_buffer<R>& r, index_t slots) {
    return view<R, 4>{r.data(), {slots * sequences, H, N, P}, strides};
  };
  // Everything at once, with a slot for every token.
  const index_t longest = *std::max_element(c.lengths.begin(), c.lengths.end());
  rows_buffer<T> out(tokens, H * P, 1);
  rows_buffer<R> final(sequences, size), ring(std::max<index_t>(1, longest) * sequences, size);
  out.poison(), final.poison(), ring.poison();
  const buffer<index_t> device_offsets(offsets);
  auto p = s.problem(s.whole);
  p.offsets = device_offsets.data(), p.sequences = sequences, p.max_length = longest;
  const view<const R, 4> from{initial.data(), states, strides};
  linear_recurrence<T>(
      nullptr, p, out.mutable_heads(H), {from, {final.data(), states, strides}},
      {ring_view(ring, std::max<index_t>(1, longest)), std::max<index_t>(1, longest), nullptr});
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const auto whole_y = out.read(), whole_final = final.read(), whole_ring = ring.read();
  std::vector<double> snapshots(before.size());
  for (index_t i = 0; i < sequences; ++i)
    for (index_t t = 0; t < c.lengths[i]; ++t)
      std::copy_n(&whole_ring[(t * sequences + i) * size], size,
                  &snapshots[(offsets[i] + t) * size]);
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 2e-6 : 1e-13;
  const double state_bound = sizeof(R) == 4 ? 2e-6 : 1e-13;
  results.row(c.name, type_name<T>());
  results.error("y", whole_y, y, bound);
  results.error("final", whole_final, last, state_bound);
  results.error("before", snapshots, before, state_bound);
  if (longest > 1000) return results.end();

  const auto capacity = [&](index_t width) { return rows_buffer<T>(tokens, width, 1); };
  ssd_operands<T> part{capacity(c.q_groups * N),     capacity(c.k_groups * N),
                       capacity(c.x_groups * P),     capacity(H),
                       rows_buffer<R>(tokens, H, 1), rows_buffer<R>(tokens, H, 1)};
  rows_buffer<T> part_y(tokens, H * P);
  buffer<index_t> list(tokens), cuts(sequences + 1), position(sequences);
  buffer<std::int32_t> lacking(sequences);
  const auto pick = [&](const pieces& piece, const std::vector<index_t>& where) {
    upload(piece.rows, list), upload(piece.offsets, cuts), upload(where, position);
    s.whole.pick(list, static_cast<index_t>(piece.rows.size()), part);
    part_y.poison();
    auto pp = s.problem(part);
    pp.offsets = cuts.data(), pp.sequences = sequences, pp.max_length = piece.longest();
    return pp;
  };

  // In pieces: other lengths for every sequence and call, in place, with a ring of 3 slots.
  const index_t slots = 3;
  rows_buffer<R> state(sequences, size), small_ring(slots * sequences, size);
  SSMLIB_CHECK_CUDA(cudaMemcpy(state.data(), initial.data(), sequences * size * sizeof(R),
                               cudaMemcpyDeviceToDevice));
  small_ring.poison();
  std::vector<index_t> at(sequences, 0);
  std::vector<double> split_y(whole_y.size());
  for (index_t call = 0;; ++call) {
    pieces piece;
    const std::vector<index_t> was = at;
    for (index_t i = 0; i < sequences; ++i) {
      const index_t n = std::min((7 * call + 5 * i) % 17, c.lengths[i] - at[i]);
      piece.add(offsets[i] + at[i], n);
      at[i] += n;
    }
    const auto pp = pick(piece, was);
    const view<R, 4> own{state.data(), states, strides};
    linear_recurrence<T>(nullptr, pp, part_y.mutable_heads(H), {own, own},
                         {ring_view(small_ring, slots), slots, position.data()});
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
    place(part_y.read(), piece, H * P, split_y);
    if (at == c.lengths) break;
  }
  results.error("split", split_y, whole_y, 0);
  results.error("state", state.read(), whole_final, 0);
  const auto split_ring = small_ring.read();
  std::vector<double> kept, wanted;
  for (index_t i = 0; i < sequences; ++i)
    for (index_t t = std::max<index_t>(0, c.lengths[i] - slots); t < c.lengths[i]; ++t) {
      const double* r = &split_ring[(t % slots * sequences + i) * size];
      kept.insert(kept.end(), r, r + size);
      wanted.insert(wanted.end(), &snapshots[(offsets[i] + t) * size],
                    &snapshots[(offsets[i] + t) * size] + size);
    }
  results.error("ring", kept, wanted, 0);

  // By replay: up to 6 tokens are offered, some are accepted, and the rest is offered again.
  const index_t offered = 6, rows = 2 * offered;
  SSMLIB_CHECK_CUDA(cudaMemcpy(state.data(), initial.data(), sequences * size * sizeof(R),
                               cudaMemcpyDeviceToDevice));
  rows_buffer<T> old_k(sequences * rows, c.k_groups * N), old_x(sequences * rows, c.x_groups * P);
  rows_buffer<R> old_log_a(sequences * rows, H), old_weight(sequences * rows, H);
  old_k.poison(), old_x.poison(), old_log_a.poison(), old_weight.poison();
  recurrence_replay<T> replay;
  replay.k = {old_k.data(),
              {sequences, rows, c.k_groups, N},
              {rows * c.k_groups * N, c.k_groups * N, N, 1}};
  replay.x = {old_x.data(),
              {sequences, rows, c.x_groups, P},
              {rows * c.x_groups * P, c.x_groups * P, P, 1}};
  if (c.gate == gating::log_a || c.gate == gating::dt) {
    replay.log_a = {old_log_a.data(), {sequences, rows, H}, {rows * H, H, 1}};
    replay.weight = {old_weight.data(), {sequences, rows, H}, {rows * H, H, 1}};
  }
  replay.max_pending = offered;
  std::fill(at.begin(), at.end(), index_t{0});
  std::vector<std::int32_t> pending(sequences, 0);
  std::vector<double> replay_y(whole_y.size());
  for (index_t call = 0; call < 400; ++call) {
    pieces piece;
    for (index_t i = 0; i < sequences; ++i)
      piece.add(offsets[i] + at[i], std::min((call + i) % (offered + 1), c.lengths[i] - at[i]));
    const auto pp = pick(piece, at);
    upload(pending, lacking);
    replay.position = position.data(), replay.pending = lacking.data();
    linear_recurrence_replay<T>(nullptr, pp, part_y.mutable_heads(H),
                                {state.data(), states, strides}, replay);
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
    place(part_y.read(), piece, H * P, replay_y);
    bool done = piece.rows.empty();
    for (index_t i = 0; i < sequences; ++i) {
      const index_t n = piece.offsets[i + 1] - piece.offsets[i];
      const index_t accepted = std::min(n, (3 * call + 2 * i) % (offered + 1));
      done = done && at[i] == c.lengths[i] && pending[i] == 0;
      pending[i] = static_cast<std::int32_t>(accepted);
      at[i] += accepted;
    }
    if (done) break;
  }
  results.error("replay", replay_y, whole_y, 0);
  results.error("state", state.read(), whole_final, 0);
  results.end();
}

/// A log decay of -infinity forgets a state that is not finite, and steps beyond are right.
void check_reset(table& results) {
  const index_t N = 64, P = 64;
  rows_buffer<float> k(2, N), x(2, P), y(2, P), state(1, N * P);
  const auto hk = k.fill(1, -1, 1), hx = x.fill(2, -1, 1);
  state.set(INFINITY);
  const buffer<float> log_a(std::vector<float>{-INFINITY, -1e4f});
  ssd_problem<float> p;
  p.heads = 1, p.q = p.k = k.heads(1), p.x = x.heads(1);
  p.log_a = {log_a.data(), {2, 1}, {1, 1}};
  p.sequences = 1, p.max_length = 2;
  const view<float, 4> own{state.data(), {1, 1, N, P}, {N * P, N * P, P, 1}};
  linear_recurrence<float>(nullptr, p, y.mutable_heads(1), {own, own});
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  std::vector<double> wanted(2 * P), last(N * P);
  for (index_t t = 0; t < 2; ++t)
    for (index_t c = 0; c < P; ++c)
      for (index_t n = 0; n < N; ++n) {
        last[n * P + c] = hk[t * N + n] * hx[t * P + c];
        wanted[t * P + c] += hk[t * N + n] * last[n * P + c];
      }
  results.row("reset", "f32");
  results.error("y", y.read(), wanted, 1e-6);
  results.error("final", state.read(), last, 1e-6);
  results.end();
}

// ------------------------------------------------------------------------------ the selective scan

struct selective_case {
  const char* name;
  std::vector<index_t> lengths;
  index_t channels, states, b_groups, c_groups;
  bool gate, skip, softplus;
};

template <class T>
void check_selective(table& results, const selective_case& s) {
  using R = accum_t<T>;
  const index_t sequences = static_cast<index_t>(s.lengths.size()), D = s.channels, N = s.states;
  std::vector<index_t> offsets{0};
  for (const index_t n : s.lengths)
    offsets.push_back(offsets.back() + n);
  const index_t tokens = offsets.back(), size = D * N;
  rows_buffer<T> dt(tokens, D, 1), u(tokens, D), gate(tokens, D, 2);
  rows_buffer<T> b(tokens, s.b_groups * N, 1), c(tokens, s.c_groups * N);
  rows_buffer<R> a(D, N), skip(1, D), bias(1, D), initial(sequences, size);
  const auto hdt = s.softplus ? dt.fill(1, -3, 1) : dt.fill(1, 0.01, 0.5);
  const auto hu = u.fill(2, -1, 1), hgate = gate.fill(3, -2, 2), hb = b.fill(4, -1, 1);
  const auto hc = c.fill(5, -1, 1), ha = a.fill(6, -4, -0.01), hskip = skip.fill(7, -1, 1);
  const auto hbias = bias.fill(8, -0.1, 0.1), h0 = initial.fill(9, -1, 1);
  std::vector<double> y(tokens * D), last(sequences * size), before(tokens * size);
  parallel(sequences * D, [&](index_t task) {
    const index_t i = task / D, d = task % D;
    std::vector<double> h(&h0[i * size + d * N], &h0[i * size + d * N] + N);
    for (index_t t = offsets[i]; t < offsets[i + 1]; ++t) {
      std::copy(h.begin(), h.end(), &before[t * size + d * N]);
      const double raw = hdt[t * D + d] + hbias[d], delta = s.softplus ? softplus_of(raw) : raw;
      double sum = s.skip ? hskip[d] * hu[t * D + d] : 0;
      for (index_t n = 0; n < N; ++n) {
        h[n] = std::exp(delta * ha[d * N + n]) * h[n] +
               delta * hb[(t * s.b_groups + d * s.b_groups / D) * N + n] * hu[t * D + d];
        sum += hc[(t * s.c_groups + d * s.c_groups / D) * N + n] * h[n];
      }
      const double z = hgate[t * D + d];
      y[t * D + d] = s.gate ? sum * z / (1 + std::exp(-z)) : sum;
    }
    std::copy(h.begin(), h.end(), &last[i * size + d * N]);
  });
  const shape<3> states{sequences, D, N}, strides{size, N, 1};
  rows_buffer<T> pdt(tokens, D, 2), pu(tokens, D), pg(tokens, D, 1), out(tokens, D, 1);
  rows_buffer<T> pb(tokens, s.b_groups * N), pc(tokens, s.c_groups * N);
  buffer<index_t> list(tokens), o(sequences + 1), position(sequences);
  const auto run = [&](const std::vector<index_t>& rows, const std::vector<index_t>& cuts,
                       index_t longest, const std::vector<index_t>& first, const R* from, R* to,
                       rows_buffer<R>& ring, index_t slots) {
    upload(rows, list), upload(cuts, o), upload(first, position);
    const index_t n = static_cast<index_t>(rows.size());
    gather(dt, list, n, pdt), gather(u, list, n, pu), gather(gate, list, n, pg);
    gather(b, list, n, pb), gather(c, list, n, pc);
    out.poison();
    selective_problem<T> p{pdt.matrix(), a.matrix(), pc.heads(s.c_groups), pb.heads(s.b_groups),
                           pu.matrix()};
    if (s.gate) p.gate = pg.matrix();
    if (s.skip) p.skip = skip.data();
    p.dt_bias = bias.data(), p.softplus = s.softplus;
    p.initial = {from, states, strides};
    p.offsets = o.data(), p.sequences = sequences, p.max_length = longest;
    selective_recurrence<T>(
        nullptr, p, out.mutable_matrix(), {to, states, strides},
        {{ring.data(), {slots * sequences, D, N}, strides}, slots, position.data()});
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
    return out.read();
  };
  pieces all;
  for (index_t i = 0; i < sequences; ++i)
    all.add(offsets[i], s.lengths[i]);
  const index_t longest = std::max<index_t>(1, all.longest()), slots = 3;
  rows_buffer<R> final(sequences, size), ring(longest * sequences, size);
  rows_buffer<R> state(sequences, size), small_ring(slots * sequences, size);
  final.poison(), ring.poison(), small_ring.poison();
  std::vector<index_t> at(sequences, 0);
  const auto whole_y =
      run(all.rows, all.offsets, longest, at, initial.data(), final.data(), ring, longest);
  const auto whole_final = final.read(), whole_ring = ring.read();
  std::vector<double> snapshots(before.size());
  for (index_t i = 0; i < sequences; ++i)
    for (index_t t = 0; t < s.lengths[i]; ++t)
      std::copy_n(&whole_ring[(t * sequences + i) * size], size,
                  &snapshots[(offsets[i] + t) * size]);
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 3e-6 : 1e-13;
  const double state_bound = sizeof(R) == 4 ? 3e-6 : 1e-13;
  results.row(s.name, type_name<T>());
  results.error("y", whole_y, y, bound);
  results.error("final", whole_final, last, state_bound);
  results.error("before", snapshots, before, state_bound);
  SSMLIB_CHECK_CUDA(cudaMemcpy(state.data(), initial.data(), sequences * size * sizeof(R),
                               cudaMemcpyDeviceToDevice));
  std::vector<double> split_y(whole_y.size());
  for (index_t call = 0; at != s.lengths; ++call) {
    pieces piece;
    const std::vector<index_t> was = at;
    for (index_t i = 0; i < sequences; ++i) {
      const index_t n = std::min((7 * call + 5 * i) % 17, s.lengths[i] - at[i]);
      piece.add(offsets[i] + at[i], n);
      at[i] += n;
    }
    const auto out = run(piece.rows, piece.offsets, piece.longest(), was, state.data(),
                         state.data(), small_ring, slots);
    place(out, piece, D, split_y);
  }
  results.error("split", split_y, whole_y, 0);
  results.error("state", state.read(), whole_final, 0);
  const auto split_ring = small_ring.read();
  std::vector<double> kept, wanted;
  for (index_t i = 0; i < sequences; ++i)
    for (index_t t = std::max<index_t>(0, s.lengths[i] - slots); t < s.lengths[i]; ++t) {
      const double* r = &split_ring[(t % slots * sequences + i) * size];
      kept.insert(kept.end(), r, r + size);
      wanted.insert(wanted.end(), &snapshots[(offsets[i] + t) * size],
                    &snapshots[(offsets[i] + t) * size] + size);
    }
  results.error("ring", kept, wanted, 0);
  results.end();
}

// ------------------------------------------------------------------------------------------ times

/// Layers of a model in turn, so that no state stays in the cache between its steps.
index_t layers_of(index_t bytes) {
  return std::clamp<index_t>((index_t{400} << 20) / std::max<index_t>(bytes, 1), 1, 64);
}

void time_ssd(index_t sequences, index_t tokens, index_t pending, double copy) {
  using T = bf16;
  const index_t H = 80, N = 128, P = 64, size = H * N * P, rows = 16;
  const index_t layers = tokens > 16 ? 1 : layers_of(sequences * size * 4);
  rows_buffer<T> q(sequences * tokens, N), k(sequences * tokens, N), x(sequences * tokens, H * P);
  rows_buffer<T> dt(sequences * tokens, H), y(sequences * tokens, H * P);
  rows_buffer<float> state(layers * sequences, size), a(1, H), bias(1, H);
  rows_buffer<T> old_k(sequences * rows, N), old_x(sequences * rows, H * P);
  rows_buffer<float> old_log_a(sequences * rows, H), old_weight(sequences * rows, H);
  for (auto* r : {&q, &k, &x, &dt, &old_k, &old_x})
    r->fill_device(3, -1, 1);
  for (auto* r : {&state, &a, &bias, &old_log_a})
    r->fill_device(4, -1, -0.01);
  old_weight.fill_device(5, 0, 1);
  ssd_problem<T> p;
  p.heads = H, p.q = q.heads(1), p.k = k.heads(1), p.x = x.heads(H), p.dt = dt.matrix();
  p.a = {a.data(), {H}, {1}}, p.dt_bias = {bias.data(), {H}, {1}};
  p.sequences = sequences, p.max_length = tokens;
  const buffer<index_t> position(std::vector<index_t>(sequences, 100));
  const buffer<std::int32_t> lacking(
      std::vector<std::int32_t>(sequences, static_cast<std::int32_t>(pending)));
  recurrence_replay<T> replay;
  replay.k = {old_k.data(), {sequences, rows, 1, N}, {rows * N, N, N, 1}};
  replay.x = {old_x.data(), {sequences, rows, H, P}, {rows * H * P, H * P, P, 1}};
  replay.log_a = {old_log_a.data(), {sequences, rows, H}, {rows * H, H, 1}};
  replay.weight = {old_weight.data(), {sequences, rows, H}, {rows * H, H, 1}};
  replay.position = position.data(), replay.pending = lacking.data();
  replay.max_pending = std::max<index_t>(0, pending);
  const double ms =
      median_ms([&](cudaStream_t stream) {
        for (index_t l = 0; l < layers; ++l) {
          const view<float, 4> own{
              state.data() + l * sequences * size, {sequences, H, N, P}, {size, N * P, P, 1}};
          if (pending < 0) {
            linear_recurrence<T>(stream, p, y.mutable_heads(H), {own, own});
          } else {
            linear_recurrence_replay<T>(stream, p, y.mutable_heads(H), own, replay);
          }
        }
      }) /
      static_cast<double>(layers);
  const double bytes = 8.0 * sequences * size + 4.0 * sequences * tokens * H * P;
  std::printf("ssd b%lld, %lld tokens%s: %.4f ms (%.0f%% of copy)\n",
              static_cast<long long>(sequences), static_cast<long long>(tokens),
              pending < 0 ? "" : ", 4 replayed", ms, 100 * bytes / copy * 1e3 / ms);
}

void time_selective(index_t sequences, index_t tokens, double copy) {
  using T = bf16;
  const index_t D = 5120, N = 16, layers = layers_of(sequences * D * N * 4);
  rows_buffer<T> dt(sequences * tokens, D), u(sequences * tokens, D), gate(sequences * tokens, D);
  rows_buffer<T> b(sequences * tokens, N), c(sequences * tokens, N), y(sequences * tokens, D);
  rows_buffer<float> a(D, N), skip(1, D), bias(1, D), state(layers * sequences, D * N);
  for (auto* r : {&dt, &u, &gate, &b, &c})
    r->fill_device(3, -1, 1);
  for (auto* r : {&a, &skip, &bias, &state})
    r->fill_device(4, -1, -0.01);
  const double ms =
      median_ms([&](cudaStream_t stream) {
        for (index_t l = 0; l < layers; ++l) {
          const view<float, 3> own{
              state.data() + l * sequences * D * N, {sequences, D, N}, {D * N, N, 1}};
          selective_problem<T> p{dt.matrix(), a.matrix(),    c.heads(1),  b.heads(1),
                                 u.matrix(),  gate.matrix(), skip.data(), bias.data()};
          p.initial = own, p.sequences = sequences, p.max_length = tokens;
          selective_recurrence<T>(stream, p, y.mutable_matrix(), own);
        }
      }) /
      static_cast<double>(layers);
  const double bytes = 8.0 * sequences * D * N + 4.0 * D * N + 8.0 * sequences * tokens * D;
  std::printf("selective b%lld, %lld tokens: %.4f ms (%.0f%% of copy)\n",
              static_cast<long long>(sequences), static_cast<long long>(tokens), ms,
              100 * bytes / copy * 1e3 / ms);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table results;
  const std::vector<index_t> mixed{37, 0, 1, 20}, few{5, 18};
  const std::vector<ssd_case> cases{
      {"mamba 128", mixed, 4, 1, 1, 4, 128, 64, gating::dt, 0, 0, true},
      {"gated 64", mixed, 4, 2, 4, 1, 64, 64, gating::log_a, -2, 0, true},
      {"near 1", few, 2, 1, 2, 2, 128, 64, gating::log_a, -1e-3, 0, false},
      {"decay 256", few, 3, 3, 3, 3, 256, 128, gating::gamma, 0, 0, false},
      {"causal 33", mixed, 2, 2, 1, 2, 33, 21, gating::none, 0, 0, true},
      {"mask", mixed, 3, 1, 1, 3, 1, 70, gating::log_a, -1, 0, false},
      {"mask 1", few, 1, 1, 1, 1, 1, 1, gating::gamma, 0, 0, false},
      {"small", mixed, 5, 5, 5, 5, 3, 6, gating::log_a, -1, 0.1, true},
      {"keys 1000", few, 1, 1, 1, 1, 1000, 9, gating::log_a, -1, 0, false},
      {"keys 3000", {3, 4}, 1, 1, 1, 1, 3000, 5, gating::gamma, 0, 0, false},
      {"long", {20000}, 1, 1, 1, 1, 16, 8, gating::log_a, -0.1, 0, false},
      {"batch", std::vector<index_t>(701, 2), 100, 1, 1, 100, 4, 4, gating::dt, 0, 0, true},
  };
  for (const auto& c : cases) {
    if (small && (c.lengths.size() > 100 || c.lengths[0] > 1000)) continue;
    if (all) check_ssd<double>(results, c), check_ssd<float>(results, c);
    check_ssd<bf16>(results, c);
  }
  check_reset(results);
  const std::vector<selective_case> selective{
      {"scan 16", mixed, 96, 16, 1, 1, true, true, true},
      {"scan 5", mixed, 33, 5, 3, 1, false, true, false},
      {"scan 1", few, 7, 1, 1, 7, true, false, true},
      {"scan 64", few, 12, 64, 2, 4, false, false, true},
      {"scan 300", few, 6, 300, 1, 2, true, true, true},
      {"scan batch", std::vector<index_t>(3001, 2), 24, 16, 1, 1, true, true, true},
  };
  for (const auto& s : selective) {
    if (small && s.lengths.size() > 100) continue;
    if (all) check_selective<double>(results, s), check_selective<float>(results, s);
    check_selective<bf16>(results, s);
  }
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  for (const index_t b : {1, 8, 64, 256}) {
    time_ssd(b, 1, -1, copy);
    time_ssd(b, 16, -1, copy);
    time_ssd(b, 4, 4, copy);
    time_selective(b, 1, copy);
    time_selective(b, 16, copy);
  }
  time_ssd(1, 16384, -1, copy);
  return finish();
}
