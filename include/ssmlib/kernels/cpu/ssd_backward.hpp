#pragma once

#include <ssmlib/kernels/cpu/ssd.hpp>

#include <algorithm>

namespace ssm::kernels {

namespace detail {

/// to += from, for matrices with unit inner strides.
template <Real T>
void add_matrix(view<const T, 2> from, view<T, 2> to) {
  for (index_t i = 0; i < from.extents[0]; ++i) {
    T* out = to.data + i * to.strides[0];
    simd::map<T>(from.extents[1], out, from.data + i * from.strides[0], out,
                 [](simd::pack<T> a, simd::pack<T> b) { return a + b; });
  }
}
template <Real T>
[[nodiscard]] T dot(index_t n, const T* a, const T* b) {
  using pack = simd::pack<T>;
  pack sum(T(0));
  index_t i = 0;
  for (; i + pack::width <= n; i += pack::width) {
    sum = simd::fma(pack::load(a + i), pack::load(b + i), sum);
  }
  if (i < n) sum = simd::fma(pack::load_part(a + i, n - i), pack::load_part(b + i, n - i), sum);
  return simd::horizontal_sum(sum);
}

/// Working memory of one task of the backward pass.
template <Real T>
struct ssd_backward_work {
  ssd_decays<T> decays;
  scratch<T> mixed, products, rows, keys, states, small;
  index_t stride;

  ssd_backward_work(index_t chunk, index_t step, index_t width, index_t key_size, index_t slots)
      : decays(chunk),
        mixed(chunk * step),
        products(chunk * step),
        rows(chunk * width),
        keys(chunk * key_size),
        states(slots * key_size * width),
        small(4 * step),
        stride(step) {}
  [[nodiscard]] T* row(index_t i) const { return small.data() + i * stride; }
};

/// Where one chunk of one lane adds its gradients. `first` says that nothing was stored yet in the
/// sums that the lanes of a task share.
template <Real T>
struct ssd_chunk_sums {
  T *scores, *q, *k;  // (chunk x score step), (chunk x key size) twice
  T *log_a, *weight;  // (chunk) each
  view<T, 2> x;       // (chunk x width) or absent
  T x_beta;
  bool first;
};

/// The backward pass: the states at the start of every panel are stored, those of the chunks of a
/// panel replayed, panels and chunks taken from the last to the first.
template <Real T>
struct ssd_backward_run {
  const ssd_problem<T>& p;
  const ssd_gradients<T>& g;
  index_t chunk;
  view<const T, 3> dy;
  ssd_forward_run<T> forward{p, chunk, {}, {}};
  ssd_lanes lanes = forward.lanes;
  index_t pairs = forward.pairs();
  index_t blocks = std::min(forward.lanes_per_pair(), std::max<index_t>(1, 8 / pairs));

  [[nodiscard]] index_t tasks() const { return pairs * blocks; }
  /// Tokens whose sums over tasks and whose chunks' states stay in the caches.
  [[nodiscard]] index_t panel_tokens() const {
    const index_t sums = tasks() * (2 * p.key_size() + chunk);
    const index_t states = p.key_size() * p.features() / chunk;
    return std::clamp<index_t>(
        std::min((index_t{5} << 17) / (sums + 1), (index_t{1} << 15) / (states + 1)), 256, 4096);
  }
  [[nodiscard]] index_t first_lane(index_t task) const {
    const index_t per_pair = forward.lanes_per_pair();
    return task / blocks * per_pair + per_pair * (task % blocks) / blocks;
  }
  [[nodiscard]] index_t end_lane(index_t task) const {
    const index_t per_pair = forward.lanes_per_pair();
    return task / blocks * per_pair + per_pair * (task % blocks + 1) / blocks;
  }
  [[nodiscard]] view<const T, 2> rows(const view<const T, 3>& v, index_t begin, index_t n,
                                      index_t h) const {
    return group_rows(v, begin, n, head_group(h, p.heads, v.extents[1]));
  }
  [[nodiscard]] view<const T, 2> lane_rows(const view<const T, 3>& v, index_t begin, index_t n,
                                           index_t lane) const {
    return group_rows(v, begin, n, head_group(lanes.head(lane), p.heads, v.extents[1]),
                      lanes.from(lane), lanes.width(lane));
  }

  /// state = decay state + K^T (scaled X) over one chunk, whose decays are set.
  void replay(ssd_backward_work<T>& w, index_t begin, index_t lane, const T* before,
              T* after) const;
  /// One chunk of one lane: gradients from the state before it and the gradient of the state after
  /// it, which becomes that of the state before.
  void chunk_vjp(ssd_backward_work<T>& w, index_t begin, index_t lane, const T* scores,
                 const T* state, T* d_state, const ssd_chunk_sums<T>& out, T& d_skip) const;

 private:
  /// The products inside the chunk. w.products holds dy_i . x_j; afterwards w.mixed holds the
  /// chunk's matrix, row 0 of w.small the sums over i of d_matrix * matrix / weight_j.
  void chunk_scores_vjp(ssd_backward_work<T>& w, const T* scores, T d, T alpha,
                        const ssd_chunk_sums<T>& out, T& d_skip) const;
};

template <Real T>
void ssd_backward_run<T>::replay(ssd_backward_work<T>& w, index_t begin, index_t lane,
                                 const T* before, T* after) const {
  const index_t n = w.decays.size(), width = lanes.width(lane), size = p.key_size() * width;
  const view<T, 2> scaled = matrix(w.rows.data(), n, width, width);
  scaled_rows<T>(lane_rows(p.x, begin, n, lane), w.decays.weighted_to_end(), scaled);
  if (before != after) std::copy_n(before, size, after);
  gemm<T>(T(1), transposed(rows(p.k, begin, n, lanes.head(lane))), scaled, w.decays.total(),
          matrix(after, p.key_size(), width, width));
}

// The gradient of the log decay at t is the sum of Z_ij = d_matrix_ij * matrix_ij over i >= t > j:
// only sums of entries that straddle t. Rows from the last to the first make it one pass: column
// sums over the rows so far, added up over the columns before t.
template <Real T>
void ssd_backward_run<T>::chunk_scores_vjp(ssd_backward_work<T>& w, const T* scores, T d, T alpha,
                                           const ssd_chunk_sums<T>& out, T& d_skip) const {
  using pack = simd::pack<T>;
  const ssd_decay_pairs<T> decays = w.decays.pairs();
  const index_t n = w.decays.size(), step = forward.score_step();
  T* columns = w.row(0);
  std::fill_n(columns, round_up(n, pack::width), T(0));
  for (index_t i = n - 1; i >= 0; --i) {
    const T* product = w.products.data() + i * step;
    T *mixed = w.mixed.data() + i * step, *d_scores = out.scores + i * step;
    pack straddling(T(0));
    for (index_t j = 0; j <= i; j += pack::width) {
      const pack decay = pack(alpha) * decays.between(i, j);
      const auto outside = decay == pack(T(0));  // what is stored there may be anything
      const pack score = simd::select(outside, pack(T(0)), pack::load(scores + i * step + j));
      const pack dm = simd::select(outside, pack(T(0)), pack::load(product + j));
      const pack weight = pack::load(w.decays.weight() + j), weighted = decay * weight;
      const pack m = weighted * score, ds = weighted * dm;
      m.store(mixed + j);
      (out.first ? ds : ds + pack::load(d_scores + j)).store(d_scores + j);
      const pack sum = simd::fma(decay * score, dm, pack::load(columns + j));
      sum.store(columns + j);
      if (j + pack::width <= i) {
        straddling = simd::fma(sum, weight, straddling);
      } else {
        straddling = simd::fma(pack::load_part(columns + j, i - j), weight, straddling);
      }
    }
    out.log_a[i] = simd::horizontal_sum(straddling);
    mixed[i] += d;
    d_skip += product[i];
  }
}

template <Real T>
void ssd_backward_run<T>::chunk_vjp(ssd_backward_work<T>& w, index_t begin, index_t lane,
                                    const T* scores, const T* state, T* d_state,
                                    const ssd_chunk_sums<T>& out, T& d_skip) const {
  using pack = simd::pack<T>;
  const ssd_decays<T>& decays = w.decays;
  const index_t n = decays.size(), h = lanes.head(lane), width = lanes.width(lane);
  const index_t keys = p.key_size(), step = forward.score_step();
  const view<const T, 2> x = lane_rows(p.x, begin, n, lane), dout = lane_rows(dy, begin, n, lane);
  const view<const T, 2> q = rows(p.q, begin, n, h), k = rows(p.k, begin, n, h);
  const view<const T, 2> s = matrix(state, keys, width, width);
  const view<T, 2> ds = matrix(d_state, keys, width, width);

  gemm_lower<T>(T(1), dout, transposed(x), T(0), matrix(w.products.data(), n, n, step));
  const T d = p.d ? p.d(head_group(h, p.heads, p.d.extent(0))) : T(0);
  chunk_scores_vjp(w, scores, d, p.alpha, out, d_skip);

  // Through the state after the chunk.
  const view<T, 2> temporary = matrix(w.rows.data(), n, width, width);
  gemm<T>(T(1), k, view<const T, 2>(ds), T(0), temporary);
  T *columns = w.row(0), *outgoing = w.row(1), *incoming = w.row(2), *factor = w.row(3);
  for (index_t j = 0; j < n; ++j) {
    const T reach = decays.to_end()[j];
    const T r = reach == T(0)
                    ? T(0)
                    : reach * dot(width, x.data + j * x.strides[0], temporary.data + j * width);
    out.weight[j] = columns[j] + r;
    outgoing[j] = decays.weight()[j] * r;
    factor[j] = p.alpha * decays.from_start()[j];
  }
  if (out.x) {
    gemm_upper_left<T>(T(1), transposed(matrix<const T>(w.mixed.data(), n, n, step)), dout,
                       out.x_beta, out.x);
    for (index_t j = 0; j < n; ++j) {
      const pack f(decays.weighted_to_end()[j]);
      T* to = out.x.data + j * out.x.strides[0];
      simd::map<T>(width, to, temporary.data + j * width, to,
                   [f](pack a, pack b) { return simd::fma(f, b, a); });
    }
  }
  scaled_rows<T>(x, decays.weighted_to_end(), temporary);
  gemm<T>(T(1), temporary, transposed(view<const T, 2>(ds)), T(out.first ? 0 : 1),
          matrix(out.k, n, keys, keys));

  // Through the state before it.
  const T kept = decays.total() == T(0) ? T(0) : decays.total() * dot(keys * width, state, d_state);
  scaled_rows<T>(dout, factor, temporary);
  const view<T, 2> dq = matrix(w.keys.data(), n, keys, keys);
  gemm<T>(T(1), temporary, transposed(s), T(0), dq);
  for (index_t i = 0; i < n; ++i) {
    incoming[i] = factor[i] == T(0) ? T(0) : dot(keys, q.data + i * q.strides[0], &dq(i, 0));
  }
  if (out.first) {
    copy_matrix<T>(dq, matrix(out.q, n, keys, keys));
  } else {
    add_matrix<T>(dq, matrix(out.q, n, keys, keys));
  }
  gemm<T>(T(1), transposed(q), temporary, decays.total(), ds);

  T after = kept;
  for (index_t t = n - 1; t >= 0; --t)
    out.log_a[t] += after += incoming[t];
  T before = T(0);
  for (index_t t = 0; t < n; ++t) {
    out.log_a[t] += before;
    before += outgoing[t];
  }
}

}  // namespace detail
}  // namespace ssm::kernels
