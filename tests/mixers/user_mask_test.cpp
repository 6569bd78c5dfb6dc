#include "mixers/stateless_checks.hpp"
#include <ssmlib/lower/user_mask.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

/// z[t] - z[t - 2] / 2 + the mean of all tokens of the sequence: only multiply() is known.
template <class T>
struct plain_mask {
  using value_type = T;

  tensor<T, 4> multiply(const tensor<T, 4>& z, const sequence_layout& layout) const {
    tensor<T, 4> y(z.extents());
    const index_t time = z.extent(1);
    for (index_t i = 0; i < layout.sequences(); ++i) {
      const index_t begin = layout.begin(i), end = layout.end(i);
      for (index_t h = 0; h < z.extent(2); ++h) {
        for (index_t p = 0; p < z.extent(3); ++p) {
          const auto at = [&](index_t t) -> T { return z(t / time, t % time, h, p); };
          T mean = 0;
          for (index_t t = begin; t < end; ++t)
            mean += at(t) / static_cast<T>(end - begin);
          for (index_t t = begin; t < end; ++t) {
            y(t / time, t % time, h, p) = at(t) + mean - (t - begin >= 2 ? at(t - 2) / 2 : T(0));
          }
        }
      }
    }
    return y;
  }
};

/// L[t, s] = g_h for t >= s: everything that a mask may bring.
template <class T>
struct full_mask {
  using value_type = T;
  tensor<T, 1> g;

  [[nodiscard]] index_t heads() const { return g.extent(0); }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("g", self.g, operand::parameter);
  }
  template <class F>
  static void running_sum(const tensor<T, 4>& z, const sequence_layout& layout, bool backwards,
                          F f) {
    const index_t time = z.extent(1);
    for (index_t i = 0; i < layout.sequences(); ++i) {
      const index_t n = layout.length(i);
      for (index_t h = 0; h < z.extent(2); ++h) {
        for (index_t p = 0; p < z.extent(3); ++p) {
          T sum = 0;
          for (index_t j = 0; j < n; ++j) {
            const index_t t = layout.begin(i) + (backwards ? n - 1 - j : j);
            sum += z(t / time, t % time, h, p);
            f(t / time, t % time, h, p, sum);
          }
        }
      }
    }
  }
  T factor(index_t h, index_t count) const { return g(h * heads() / count); }
  tensor<T, 4> multiply(const tensor<T, 4>& z, const sequence_layout& layout,
                        bool backwards = false) const {
    tensor<T, 4> y(z.extents());
    running_sum(z, layout, backwards, [&](index_t b, index_t t, index_t h, index_t p, T sum) {
      y(b, t, h, p) = factor(h, z.extent(2)) * sum;
    });
    return y;
  }
  tensor<T, 4> multiply_transposed(const tensor<T, 4>& z, const sequence_layout& layout) const {
    return multiply(z, layout, true);
  }
  void multiply_vjp(const tensor<T, 4>& z, const tensor<T, 4>& dy, const sequence_layout& layout,
                    full_mask& gradients) const {
    running_sum(z, layout, false, [&](index_t b, index_t t, index_t h, index_t p, T sum) {
      gradients.g(h * heads() / z.extent(2)) += sum * dy(b, t, h, p);
    });
  }
};

struct plain_case {
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto q = normal<T, 4>({batch, length, 4, 5}, 1, 2);
    const auto k = normal<T, 4>({batch, length, 2, 5}, 1, 3);
    return hadamard(plain_mask<T>{}, q * transpose(k) * 0.7) *
           normal<T, 4>({batch, length, 1, 40}, 1, 4);
  }
};
struct full_case {
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto q = normal<T, 4>({batch, length, 1, 3}, 1, 2);
    const auto k = normal<T, 4>({batch, length, 2, 3}, 1, 3);
    return hadamard(full_mask<T>{normal<T, 1>({4}, 1, 5)},
                    with_features(feature::elu_plus_one{}, q * transpose(k))) *
           normal<T, 4>({batch, length, 2, 7}, 1, 4);
  }
};
struct bare_case {
  template <class T>
  auto operator()(index_t batch, index_t length) const {
    return mask_node(full_mask<T>{normal<T, 1>({4}, 1, 5)}) *
           normal<T, 4>({batch, length, 2, 7}, 1, 4);
  }
};

TEST_CASE("mixers/user_mask: the definition is the product with the identity",
          "[mixers][user_mask]") {
  const auto q = tensor<double, 3>::full({3, 1, 1}, 1.0);
  const auto m = hadamard(plain_mask<double>{}, q * transpose(q)).dense();
  CHECK(m(0, 0, 0, 0) == approx(1 + 1.0 / 3));
  CHECK(m(0, 0, 0, 2) == approx(1.0 / 3));
  CHECK(m(0, 0, 2, 0) == approx(1.0 / 3 - 0.5));
  CHECK(m(0, 0, 2, 1) == approx(1.0 / 3));
}

TEST_CASE("mixers/user_mask: structured equals dense()", "[mixers][user_mask]") {
  for (const index_t length : {1, 2, 9, 40}) {
    check_forward(plain_case{}, 2, length, alg::structured{});
    check_forward(full_case{}, 2, length, alg::structured{});
    check_forward(bare_case{}, 2, length, alg::structured{});
  }
}

TEST_CASE("mixers/user_mask: gradients equal finite differences, with and without L^T",
          "[mixers][user_mask]") {
  for (const index_t length : {1, 9}) {
    check_stateless_vjp(plain_case{}, 2, length, alg::structured{});
    check_stateless_vjp(full_case{}, 2, length, alg::structured{});
    check_stateless_vjp(bare_case{}, 2, length, alg::structured{});
  }
}

TEST_CASE("mixers/user_mask: the quadratic reference takes it too", "[mixers][user_mask]") {
  check_forward(plain_case{}, 2, 9, alg::quadratic{});
  check_forward(bare_case{}, 1, 9, alg::quadratic{});
}

TEST_CASE("mixers/user_mask: packed sequences have the bits that they have alone",
          "[mixers][user_mask]") {
  check_stateless_packed(plain_case{}, {7, 0, 1, 30}, alg::structured{});
  check_stateless_packed(full_case{}, {7, 0, 1, 30}, alg::structured{});
}

/// A mask with a tensor and no multiply_vjp.
struct opaque_mask : full_mask<float> {
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("g", self.g, operand::parameter);
  }
  void multiply_vjp() const = delete;
};
/// A mask that returns another shape.
struct wrong_mask {
  using value_type = float;
  tensor<float, 4> multiply(const tensor<float, 4>&, const sequence_layout&) const {
    return tensor<float, 4>::zeros(1, 1, 1, 1);
  }
};

TEST_CASE("mixers/user_mask: what a mask lacks is said", "[mixers][user_mask][error]") {
  const auto x = tensor<float, 4>::full({1, 4, 4, 2}, 1.0f);
  const auto e = mask_node(opaque_mask{{tensor<float, 1>::full({4}, 1.0f)}}) * x;
  CHECK_THROWS_WITH(vjp(e, x), contains("has tensors but no multiply_vjp"));
  auto only_x = zeros_like(e);
  only_x.mixer.mask.g = {};
  vjp_into(e, x, only_x, default_context<cpu>());
  CHECK(only_x.x(0, 0, 0, 0) == 4.0f);
  CHECK_THROWS_WITH(eval(hadamard(wrong_mask{}, x * transpose(x)) * x),
                    contains("gave (1 x 1 x 1 x 1); wanted the same shape"));
}

}  // namespace
