#pragma once

#include <ssmlib/expr/mix.hpp>
#include <ssmlib/lower/quadratic.hpp>

#include <concepts>
#include <functional>
#include <string_view>

namespace ssm {

/// @file
/// Evaluation of mixer * X. A pairing of a mixer with an algorithm is a pair of overloads, found
/// by argument-dependent lookup in the namespace of the mixer:
///
///   apply_mixer(ctx, algorithm, mixer, x, y, carry)                      y is overwritten
///   apply_mixer_vjp(ctx, algorithm, mixer, x, dy, d_mixer, dx, carry)    gradients are added to;
///                                                                        absent ones are skipped
///
/// x, y, dy, dx are (b, T, heads, features). alg::quadratic always exists (lower/quadratic.hpp).
///
/// Where the gradient wants again what the forward pass has computed, a second pair hands it over;
/// it is taken where a tape records:
///
///   saved = apply_mixer_saving(ctx, algorithm, mixer, x, y)
///   apply_mixer_vjp(ctx, algorithm, mixer, x, dy, d_mixer, dx, saved)

/// The algorithm that alg::automatic takes for this mixer and shape, by name. Mixers overload it
/// with crossovers measured in docs/performance.md; without an overload it is the default.
template <MatrixMixer M>
[[nodiscard]] std::string_view choose_algorithm(const M&, index_t /*length*/, index_t /*width*/) {
  return default_algorithm<M>::name;
}

namespace detail {

/// f(algorithm) with the mixer's algorithm of that name.
template <MatrixMixer M, class F>
void with_algorithm_named(std::string_view name, F&& f) {
  bool done = false;
  M::algorithms::for_each([&](auto algorithm) {
    if (!done && algorithm.name == name) {
      done = true;
      f(algorithm);
    }
  });
  if (!done) f(alg::quadratic{});
}

template <class E, class F>
void with_concrete_algorithm(const E& e, F&& f) {
  using M = typename E::mixer_type;
  if constexpr (std::same_as<typename E::algorithm_type, alg::automatic>) {
    const index_t length = e.mixer.layout ? e.mixer.layout.max_length() : e.mixer.length();
    with_algorithm_named<M>(choose_algorithm(e.mixer, length, e.x.extent(3)), f);
  } else {
    f(e.algorithm);
  }
}

template <int R, Floating T, Backend B>
[[nodiscard]] tensor<T, R, B> demote(const tensor<T, 4, B>& t) {
  if constexpr (R == 4) {
    return t;
  } else if constexpr (R == 3) {
    return t.reshape(t.extent(1), t.extent(2), t.extent(3));
  } else {
    return t.reshape(t.extent(1), t.extent(2) * t.extent(3));
  }
}

}  // namespace detail

/// y = M x, into a given (b, T, H, P) tensor, with a state in and out where the mixer has one.
template <MatrixMixer M, int R, class Alg>
void eval_into(const mix<M, R, Alg>& e,
               const tensor<typename M::value_type, 4, typename M::backend>& y,
               const carry<typename M::value_type, typename M::backend>& c = {},
               const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  static_assert(!std::same_as<typename M::backend, cpu> || Real<typename M::value_type>,
                "ssm: the CPU computes in float and double; convert the operands with cast<float>");
  if (y.extents() != e.extents()) {
    throw shape_error("ssm: eval_into: the result is " + to_string<4>(e.extents()) +
                      ", the destination is " + to_string<4>(y.extents()) + "; wanted the same");
  }
  if (y.size() == 0 && !c.final) return;
  const typename M::backend::scope scope(ctx);
  detail::with_concrete_algorithm(e, [&](auto algorithm) {
    static_assert(
        requires { apply_mixer(ctx, algorithm, e.mixer, e.x, y, c); },
        "ssm: no kernel pairs this algorithm with this mixer; include <ssmlib/ssmlib.hpp>, or add "
        "an apply_mixer overload (docs/adding_a_mixer.md)");
    apply_mixer(ctx, algorithm, e.mixer, e.x, y, c);
  });
}

/// Evaluates mixer * X. @return (b, T, H, P), or of X's rank.
/// @cost that of the algorithm; the result is a new tensor.
template <MatrixMixer M, int R, class Alg>
[[nodiscard]] tensor<typename M::value_type, R, typename M::backend> eval(
    const mix<M, R, Alg>& e,
    const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  const typename M::backend::scope scope(ctx);
  tensor<typename M::value_type, 4, typename M::backend> y(e.extents());
  eval_into(e, y, {}, ctx);
  return detail::demote<R>(y);
}

template <MatrixMixer M, int R, class Alg>
void vjp_into(const mix<M, R, Alg>& e,
              const tensor<typename M::value_type, R, typename M::backend>& dy,
              mix<M, R, Alg>& gradients, const typename M::backend::context& ctx);

/// A product with the function that adds its vector-Jacobian product, for a tape.
template <class E>
struct evaluated {
  tensor<typename E::value_type, E::rank, typename E::backend> y;
  /// (dy, gradients); holds what the forward pass has saved, and the operands
  std::function<void(const tensor<typename E::value_type, E::rank, typename E::backend>&, E&)>
      add_vjp;
};

/// Evaluates mixer * X, and keeps what its gradient wants again where the mixer saves something.
template <MatrixMixer M, int R, class Alg>
[[nodiscard]] evaluated<mix<M, R, Alg>> eval_with_vjp(const mix<M, R, Alg>& e,
                                                      const typename M::backend::context& ctx) {
  using E = mix<M, R, Alg>;
  using B = typename M::backend;
  using T = typename M::value_type;
  const typename B::scope scope(ctx);
  const tensor<T, 4, B> y(e.extents());
  evaluated<E> r{detail::demote<R>(y), [e, &ctx](const tensor<T, R, B>& dy, E& gradients) {
                   vjp_into(e, dy, gradients, ctx);
                 }};
  if (y.size() == 0) return r;
  detail::with_concrete_algorithm(e, [&](auto algorithm) {
    if constexpr (requires { apply_mixer_saving(ctx, algorithm, e.mixer, e.x, y); }) {
      r.add_vjp = [e, &ctx, algorithm, saved = apply_mixer_saving(ctx, algorithm, e.mixer, e.x, y)](
                      const tensor<T, R, B>& dy, E& gradients) {
        apply_mixer_vjp(ctx, algorithm, e.mixer, e.x, detail::promote(dy), gradients.mixer,
                        gradients.x, saved);
      };
    } else {
      eval_into(e, y, {}, ctx);
    }
  });
  return r;
}

template <Floating T, Backend B = cpu>
struct eval_with_state_result {
  tensor<T, 4, B> y;                     ///< (b, T, H, P)
  tensor<accum_t<T>, 4, B> final_state;  ///< (sequences, H, key size, state features)
};

/// Evaluates mixer * X from an initial state and returns the final one too.
/// @param initial  (sequences, H, key size, state_features(P)), or absent for zero
template <RecurrentMixer M, int R, class Alg>
[[nodiscard]] eval_with_state_result<typename M::value_type, typename M::backend> eval_with_state(
    const mix<M, R, Alg>& e,
    const tensor<accum_t<typename M::value_type>, 4, typename M::backend>& initial,
    const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  using T = typename M::value_type;
  using B = typename M::backend;
  const typename B::scope scope(ctx);
  const shape<4> wanted{layout_of(e.mixer).sequences(), e.heads(), e.mixer.key_size(),
                        e.mixer.state_features(e.x.extent(3))};
  if (initial && initial.extents() != wanted) {
    throw shape_error("ssm: eval_with_state: the initial state is " +
                      to_string<4>(initial.extents()) + ", wanted " + to_string<4>(wanted) +
                      ", (sequences x heads x key size x features)");
  }
  eval_with_state_result<T, B> r{tensor<T, 4, B>(e.extents()), tensor<accum_t<T>, 4, B>(wanted)};
  eval_into(e, r.y, {initial, r.final_state, {}, 0, nullptr}, ctx);
  return r;
}

/// Adds the vector-Jacobian product of mixer * X to `gradients`, an expression of the same type
/// whose tensors are gradients; absent tensors are not computed.
/// @throws shape_error  dy is not of the result's shape.
template <MatrixMixer M, int R, class Alg>
void vjp_into(const mix<M, R, Alg>& e,
              const tensor<typename M::value_type, 4, typename M::backend>& dy,
              mix<M, R, Alg>& gradients,
              const carry_gradient<typename M::value_type, typename M::backend>& c,
              const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  const typename M::backend::scope scope(ctx);
  if (dy.extents() != e.extents()) {
    throw shape_error("ssm: vjp: the result is " + to_string<4>(e.extents()) + ", dy is " +
                      to_string<4>(dy.extents()) + "; wanted the same");
  }
  if (dy.size() == 0) {  // no token: the final state is the initial one
    if (c.d_final && c.d_initial) detail::add_to(c.d_initial, c.d_final);
    return;
  }
  detail::with_concrete_algorithm(e, [&](auto algorithm) {
    static_assert(
        requires {
          apply_mixer_vjp(ctx, algorithm, e.mixer, e.x, dy, gradients.mixer, gradients.x, c);
        },
        "ssm: this algorithm of this mixer has no vjp; see docs/adding_a_mixer.md");
    apply_mixer_vjp(ctx, algorithm, e.mixer, e.x, dy, gradients.mixer, gradients.x, c);
  });
}

template <MatrixMixer M, int R, class Alg>
void vjp_into(const mix<M, R, Alg>& e,
              const tensor<typename M::value_type, R, typename M::backend>& dy,
              mix<M, R, Alg>& gradients, const typename M::backend::context& ctx) {
  vjp_into(e, detail::promote(dy), gradients,
           carry_gradient<typename M::value_type, typename M::backend>{}, ctx);
}

/// The vector-Jacobian product of mixer * X: an expression of the same type whose tensors are the
/// gradients of sum(dy * y), for example `g.mixer.kernel.q` and `g.x`.
template <MatrixMixer M, int R, class Alg>
[[nodiscard]] mix<M, R, Alg> vjp(
    const mix<M, R, Alg>& e, const tensor<typename M::value_type, R, typename M::backend>& dy,
    const typename M::backend::context& ctx = default_context<typename M::backend>()) {
  const typename M::backend::scope scope(ctx);
  mix<M, R, Alg> gradients = zeros_like(e);
  vjp_into(e, dy, gradients, ctx);
  return gradients;
}

/// T x T storage on request: dense() of the mixer in its own element type.
template <MatrixMixer M>
[[nodiscard]] tensor<typename M::value_type, 4> materialize(const M& m) {
  return cast<typename M::value_type>(m.dense());
}

}  // namespace ssm
