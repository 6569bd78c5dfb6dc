#pragma once

#include <ssmlib/expr/selective.hpp>
#include <ssmlib/kernels/cpu/selective_quadratic.hpp>
#include <ssmlib/lower/evaluate.hpp>
#include <ssmlib/lower/head_gradients.hpp>

#include <concepts>

namespace ssm {

namespace detail {

/// Feature p of (b, T, Hx, P) as the kernels want it, (tokens, H) with unit stride: shared where
/// that is what x is, else gathered, heads repeated where x has fewer.
template <Real T>
[[nodiscard]] tensor<T, 2> feature_plane(const tensor<T, 4>& x, index_t heads, index_t p) {
  if (!x) return {};
  const tensor<T, 3> rows = input_tokens(x);
  if (x.extent(3) == 1 && x.extent(2) == heads && (heads == 1 || rows.strides()[1] == 1)) {
    tensor<T, 2> plane = rows.reshape(rows.extent(0), heads);
    if (plane.strides()[1] == 1) return plane;
  }
  tensor<T, 2> plane(rows.extent(0), heads);
  for (index_t t = 0; t < plane.extent(0); ++t) {
    for (index_t h = 0; h < heads; ++h)
      plane(t, h) = rows(t, group_of(h, heads, x.extent(2)), p);
  }
  return plane;
}

/// The same for writing: `get()` is the plane of x itself or a stand-in (of zeros), which `store`
/// puts back (=) or `add` adds (+=, heads of a group in order).
template <Real T>
class feature_plane_target {
 public:
  feature_plane_target(const tensor<T, 4>& x, index_t heads, index_t p) : x_(x), p_(p) {
    if (!x) return;
    const bool dense = x.extent(3) == 1 && x.extent(2) == heads && is_token_major(x) &&
                       (heads == 1 || x.strides()[2] == 1);
    if (dense) plane_ = feature_plane(x, heads, index_t{0});
    stands_in_ = !dense || (plane_ && plane_.data() != x.data());
    if (stands_in_) plane_ = tensor<T, 2>::zeros(x.extent(0) * x.extent(1), heads);
  }
  [[nodiscard]] const tensor<T, 2>& get() const { return plane_; }
  void store() const {
    each([](T& to, T from) { to = from; });
  }
  void add() const {
    each([](T& to, T from) { to += from; });
  }

 private:
  template <class F>
  void each(F f) const {
    if (!stands_in_) return;
    const index_t heads = plane_.extent(1), time = x_.extent(1);
    for (index_t t = 0; t < plane_.extent(0); ++t) {
      for (index_t h = 0; h < heads; ++h) {
        f(x_(t / time, t % time, group_of(h, heads, x_.extent(2)), p_), plane_(t, h));
      }
    }
  }

  tensor<T, 4> x_;
  tensor<T, 2> plane_;
  index_t p_;
  bool stands_in_ = false;
};

template <Real T>
[[nodiscard]] tensor<T, 4> with_unit_feature(const tensor<T, 3>& t) {
  if (!t) return {};
  return t.reshape(t.extent(0), t.extent(1), t.extent(2), index_t{1});
}

/// A (D, N) with a row for every head.
template <Real T>
[[nodiscard]] tensor<T, 2> repeat_rows(const tensor<T, 2>& a, index_t heads) {
  if (a.extent(0) == heads) return a;
  tensor<T, 2> rows(heads, a.extent(1));
  for (index_t h = 0; h < heads; ++h) {
    const index_t from = group_of(h, heads, a.extent(0));
    rows.slice(0, h, h + 1).copy_from(a.slice(0, from, from + 1));
  }
  return rows;
}

/// Feature p of a state (sequences, H, N, P).
template <Real T>
[[nodiscard]] view<T, 3> state_plane(const tensor<T, 4>& s, index_t p) {
  if (!s) return {};
  return {s.data() + p * s.strides()[3],
          {s.extent(0), s.extent(1), s.extent(2)},
          {s.strides()[0], s.strides()[1], s.strides()[2]}};
}

/// The operands of one call, kept alive while kernels read them.
template <Real T>
struct selective_call {
  selective_call(const selective_mixer<T>& m, index_t heads, const tensor<T, 1>& d = {})
      : layout(layout_of(m)),
        delta(feature_plane(with_unit_feature(m.delta), heads, index_t{0})),
        a(repeat_rows(m.a, heads)),
        c(input_tokens(m.c)),
        b(input_tokens(m.b)) {
    if (d)
      skip = repeat_rows(d.reshape(d.extent(0), index_t{1}), heads).reshape(heads).contiguous();
  }

  [[nodiscard]] kernels::selective_operands<T> with(const tensor<T, 2>& u) const {
    return {delta.const_view(), a.const_view(),   c.const_view(),     b.const_view(),
            u.const_view(),     layout.offsets(), layout.sequences(), skip.const_view()};
  }

  sequence_layout layout;
  tensor<T, 2> delta, a;
  tensor<T, 3> c, b;
  tensor<T, 1> skip;
};

/// f(operands, plane of y, initial, final, ring) for every feature of x: a feature is a scan.
template <Real T, class F>
void for_each_selective(const selective_mixer<T>& m, const tensor<T, 4>& x, const tensor<T, 4>& y,
                        const carry<T>& c, const tensor<T, 1>& d, F f) {
  const selective_call<T> call(m, y.extent(2), d);
  for (index_t p = 0; p < y.extent(3); ++p) {
    const tensor<T, 2> u = feature_plane(x, y.extent(2), p);
    const feature_plane_target<T> out(y, y.extent(2), p);
    f(call.with(u), out.get().view(), state_plane(c.initial, p), state_plane(c.final, p),
      kernels::selective_ring<T>{state_plane(c.snapshots, p), c.slots, c.first_position});
    out.store();
  }
}

template <Real T>
void run_selective_scan(const cpu::context& ctx, const selective_mixer<T>& m, const tensor<T, 4>& x,
                        const tensor<T, 4>& y, const carry<T>& c, index_t block,
                        const tensor<T, 1>& d = {}) {
  for_each_selective(m, x, y, c, d,
                     [&](const auto& operands, auto out, auto initial, auto final, auto ring) {
                       kernels::selective_scan<T>(ctx, operands, block, initial, final, ring, out);
                     });
}

/// f(operands, initial, plane of dy, d_final, gradients) for every feature.
template <Real T, class F>
void for_each_selective_vjp(const selective_mixer<T>& m, const tensor<T, 4>& x,
                            const tensor<T, 4>& dy, selective_mixer<T>& dm, const tensor<T, 4>& dx,
                            const carry_gradient<T>& c, const tensor<T, 1>& d,
                            const tensor<T, 1>& dd, F f) {
  const index_t heads = dy.extent(2);
  const selective_call<T> call(m, heads, d);
  const tensor<T, 1> d_skip = dd ? tensor<T, 1>::zeros(heads) : tensor<T, 1>{};
  const feature_plane_target<T> d_delta(with_unit_feature(dm.delta), heads, index_t{0});
  const bool own_rows = !dm.a || dm.a.extent(0) == heads;
  const tensor<T, 2> d_a = own_rows ? dm.a : tensor<T, 2>::zeros(heads, dm.a.extent(1));
  const output_tokens<T, 4> d_c(dm.c), d_b(dm.b);
  for (index_t p = 0; p < dy.extent(3); ++p) {
    const tensor<T, 2> u = feature_plane(x, heads, p), out = feature_plane(dy, heads, p);
    const feature_plane_target<T> d_u(dx, heads, p);
    f(call.with(u), state_plane(c.initial, p), out.const_view(), state_plane(c.d_final, p),
      kernels::selective_gradients<T>{d_delta.get().view(), d_a.view(), d_c.get().view(),
                                      d_b.get().view(), d_u.get().view(),
                                      state_plane(c.d_initial, p), d_skip.view()});
    d_u.add();
  }
  for (index_t h = 0; dd && h < heads; ++h)
    dd(group_of(h, heads, dd.extent(0))) += d_skip(h);
  d_delta.add();
  d_c.finish();
  d_b.finish();
  for (index_t h = 0; !own_rows && h < heads; ++h) {
    const index_t to = group_of(h, heads, dm.a.extent(0));
    add_to(dm.a.slice(0, to, to + 1), d_a.slice(0, h, h + 1));
  }
}

template <Real T>
void run_selective_vjp(const cpu::context& ctx, const selective_mixer<T>& m, const tensor<T, 4>& x,
                       const tensor<T, 4>& dy, selective_mixer<T>& dm, const tensor<T, 4>& dx,
                       const carry_gradient<T>& c, const tensor<T, 1>& d = {},
                       const tensor<T, 1>& dd = {}) {
  for_each_selective_vjp(
      m, x, dy, dm, dx, c, d, dd,
      [&](const auto& operands, auto initial, auto out, auto d_final, const auto& gradients) {
        kernels::selective_scan_vjp<T>(ctx, operands, initial, out, d_final, gradients);
      });
}

}  // namespace detail

/// The scan over blocks of time in parallel. @cost T D N exponentials for wide inputs.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::scan s, const selective_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_snapshots(c);
  detail::run_selective_scan(ctx, m, x, y, c, s.size);
}
/// Token by token: the same bits however a sequence is split.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::recurrent, const selective_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::run_selective_scan(ctx, m, x, y, c, kernels::whole_sequences);
}
/// By the matrix, in double.
template <Real T>
void apply_mixer(const cpu::context& ctx, alg::quadratic, const selective_mixer<T>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const carry<T>& c) {
  detail::refuse_snapshots(c);
  detail::for_each_selective(
      m, x, y, c, {}, [&](const auto& operands, auto out, auto initial, auto final, const auto&) {
        kernels::selective_quadratic<T>(ctx, operands, initial, final, out);
      });
}

template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::scan, const selective_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, selective_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::run_selective_vjp(ctx, m, x, dy, dm, dx, c);
}
template <Real T>
void apply_mixer_vjp(const cpu::context& ctx, alg::recurrent, const selective_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, selective_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::run_selective_vjp(ctx, m, x, dy, dm, dx, c);
}
template <Real T>
void apply_mixer_vjp(const cpu::context&, alg::quadratic, const selective_mixer<T>& m,
                     const tensor<T, 4>& x, const tensor<T, 4>& dy, selective_mixer<T>& dm,
                     const tensor<T, 4>& dx, const carry_gradient<T>& c) {
  detail::for_each_selective_vjp(
      m, x, dy, dm, dx, c, {}, {},
      [&](const auto& operands, auto initial, auto out, auto d_final, const auto& gradients) {
        kernels::selective_quadratic_vjp<T>(operands, initial, out, d_final, gradients);
      });
}

/// selective(...) + diagonal(d): the scans add the skip connection on the way.
template <Real T, class Alg>
requires std::same_as<Alg, alg::scan> || std::same_as<Alg, alg::recurrent>
void apply_mixer_plus_diagonal(const cpu::context& ctx, Alg algorithm, const selective_mixer<T>& m,
                               const tensor<T, 1>& d, const tensor<T, 4>& x, const tensor<T, 4>& y,
                               const carry<T>& c) {
  index_t block = kernels::whole_sequences;
  if constexpr (std::same_as<Alg, alg::scan>) {
    detail::refuse_snapshots(c);
    block = algorithm.size;
  }
  detail::run_selective_scan(ctx, m, x, y, c, block, d);
}
template <Real T, class Alg>
requires std::same_as<Alg, alg::scan> || std::same_as<Alg, alg::recurrent>
void apply_mixer_plus_diagonal_vjp(const cpu::context& ctx, Alg, const selective_mixer<T>& m,
                                   const tensor<T, 1>& d, const tensor<T, 4>& x,
                                   const tensor<T, 4>& dy, selective_mixer<T>& dm,
                                   const tensor<T, 1>& dd, const tensor<T, 4>& dx,
                                   const carry_gradient<T>& c) {
  detail::run_selective_vjp(ctx, m, x, dy, dm, dx, c, d, dd);
}

}  // namespace ssm
