#include "support/catch.hpp"
#include "support/gradient_check.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

// Gradients that are stored instead of added to zeros, and gradients that terms of a sum share.

namespace {

using namespace ssm;
using ssm::detail::on_backend;
using ssm::detail::on_host;

/// Leaves NaN in the memory that the next tensors of the usual sizes get.
template <class T, class B>
void poison() {
  std::vector<tensor<T, 3, B>> all;
  for (int i = 0; i < 16; ++i) {
    for (const index_t features : {16, 24, 40})
      all.push_back(tensor<T, 3, B>::full({2, 5, features}, T(NAN)));
  }
}

/// The gradients of x, y, z, (2, 5, 24) each, and of w (40, 24), for f(pass, x, y, z, w), after one
/// or two backward passes from two outputs.
template <class T, class B, class F>
std::vector<tensor<double, 1>> gradients_of(F f, int passes) {
  using W = accum_t<T>;
  // The same numbers for all types: those that bf16 holds.
  const auto numbers = []<std::size_t R>(const std::array<index_t, R>& extents,
                                         std::uint64_t seed) {
    return cast<float>(cast<bf16>(uniform<float, static_cast<int>(R)>(extents, -1, 1, seed)));
  };
  const auto operand = [&](std::uint64_t seed) {
    return on_backend<B>(cast<T>(numbers(shape<3>{2, 5, 24}, seed)));
  };
  const auto x = operand(1), y = operand(2), z = operand(3);
  const auto w = on_backend<B>(cast<W>(numbers(shape<2>{40, 24}, 4)));
  tape<T, B> t;
  t.watch(x), t.watch(y), t.watch(z), t.watch(w);
  for (int i = 0; i < passes; ++i) {
    const tensor<T, 3, B> out = f(pass<T, B>{.tape = &t}, x, y, z, w);
    t.gradient(out).copy_from(on_backend<B>(cast<T>(numbers(out.extents(), 9))));
    poison<T, B>();
    t.backward();
  }
  std::vector<tensor<double, 1>> all;
  for (const auto& operand_gradient : {t.gradient(x), t.gradient(y), t.gradient(z)})
    all.push_back(cast<double>(on_host(operand_gradient.reshape(operand_gradient.size()))));
  all.push_back(cast<double>(on_host(t.gradient(w).reshape(w.size()))));
  return all;
}

template <class F>
void check_gradients(F f) {
  const int passes = GENERATE(1, 2);
  const auto wanted = gradients_of<double, cpu>(f, passes),
             got = gradients_of<double, cuda>(f, passes),
             rounded = gradients_of<bf16, cuda>(f, passes);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    CAPTURE(i, passes);
    CHECK(ssm_test::relative_error(got[i], wanted[i]) < 1e-12);
    CHECK(ssm_test::relative_error(rounded[i], wanted[i]) < 2e-2);
  }
}

}  // namespace

TEST_CASE("cuda/gradients: what nobody used of an output has the gradient zero",
          "[cuda][gradients]") {
  check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
    const auto wide = op::linear(p, x, w);  // (2, 5, 40); its features 8 to 32 are used
    const auto narrow = wide.slice(2, 8, 32);
    return op::swiglu(p, eval(p, narrow + y), z);
  });
}

TEST_CASE("cuda/gradients: parts of an output that overlap have the sum of both gradients",
          "[cuda][gradients]") {
  check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
    const auto wide = op::linear(p, x, w);
    const auto a = op::swiglu(p, wide.slice(2, 0, 24), y);
    const auto b = op::swiglu(p, wide.slice(2, 16, 40), z);
    return op::swiglu(p, a, b);
  });
}

TEST_CASE("cuda/gradients: parts of an output that touch fill all of its gradient",
          "[cuda][gradients]") {
  check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
    const auto wide = op::linear(p, x, w);
    const auto a = op::swiglu(p, wide.slice(2, 0, 24), y);
    const auto b = op::gelu_tanh(p, wide.slice(2, 24, 40));
    const auto c = op::linear(p, b, w.slice(1, 0, 16));
    return eval(p, op::swiglu(p, a, c.slice(2, 0, 24)) + z);
  });
}

TEST_CASE("cuda/gradients: one tensor as both operands gets both gradients", "[cuda][gradients]") {
  check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
    const auto u = op::linear(p, x, w).slice(2, 0, 24);
    const auto v = op::swiglu(p, u, u);
    return eval(p, eval(p, v + v) + op::swiglu(p, y, z));
  });
}

TEST_CASE("cuda/gradients: terms of a sum share its gradient until one gets more",
          "[cuda][gradients]") {
  SECTION("from an operation after the sum") {
    check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
      const auto a = op::linear(p, x, w.slice(0, 0, 24)), b = op::gelu_tanh(p, y);
      const auto s = eval(p, a + b);
      const auto more = op::swiglu(p, b, z);  // b's gradient is there when that of the sum comes
      return eval(p, s + more);
    });
  }
  SECTION("from an operation before the sum") {
    check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
      const auto a = op::linear(p, x, w.slice(0, 0, 24)), b = op::gelu_tanh(p, y);
      const auto more = op::swiglu(p, b, z);  // adds to b's gradient while a's is still wanted
      return op::swiglu(p, eval(p, a + b), more);
    });
  }
  SECTION("the residual stream of parallel layers") {
    check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
      auto stream = op::gelu_tanh(p, x);
      for (int layer = 0; layer < 3; ++layer) {
        const auto n = op::l2_normalize(p, stream.reshape(2, 5, 1, 24)).reshape(2, 5, 24);
        stream = eval(p, stream + op::swiglu(p, n, y) + op::linear(p, n, w.slice(0, 8, 32)));
      }
      return op::swiglu(p, stream, z);
    });
  }
  SECTION("twice the same term") {
    check_gradients([](const auto& p, const auto& x, const auto& y, const auto& z, const auto& w) {
      const auto a = op::linear(p, x, w.slice(0, 0, 24));
      const auto s = eval(p, a + a + op::gelu_tanh(p, y));
      return op::swiglu(p, eval(p, s + s), z);
    });
  }
}

TEST_CASE("cuda/gradients: a gradient that stands for zeros is read as zeros",
          "[cuda][gradients]") {
  const auto x = tensor<bf16, 3, cuda>::full({3, 4, 8}, bf16(2.0f));
  tape<bf16, cuda> t;
  t.watch(x);
  CHECK(t.gradient(x).is_unwritten());
  t.gradient(x).slice(2, 2, 4).fill(bf16(1.0f));
  t.gradient(x).slice(0, 1, 2).slice(2, 5, 6).fill(bf16(3.0f));
  CHECK(t.gradient(x).slice(2, 6, 8).is_unwritten());
  CHECK_FALSE(t.gradient(x).is_unwritten());
  const auto g = cast<double>(on_host(t.gradient(x)));
  CHECK_FALSE(t.gradient(x).slice(2, 6, 8).is_unwritten());
  for (index_t i = 0; i < 3; ++i) {
    for (index_t j = 0; j < 4; ++j) {
      for (index_t k = 0; k < 8; ++k)
        CHECK(g(i, j, k) == (k == 2 || k == 3 ? 1 : i == 1 && k == 5 ? 3 : 0));
    }
  }
}

TEST_CASE("cuda/gradients: attention on a tape has the bits of its vjp", "[cuda][gradients]") {
  const index_t tokens = 130, heads = 4, groups = 2;
  const auto operand = [](const shape<4>& extents, std::uint64_t seed) {
    return on_backend<cuda>(cast<bf16>(uniform<float, 4>(extents, -1, 1, seed)));
  };
  const auto q = operand({2, tokens, heads, 64}, 1), k = operand({2, tokens, groups, 64}, 2),
             v = operand({2, tokens, groups, 64}, 3), dy = operand({2, tokens, heads, 64}, 4);
  tape<bf16, cuda> t;
  t.watch(q), t.watch(k), t.watch(v);
  const auto e = softmax(q * transpose(k) * 0.125 + causal) * v;
  const auto y = eval(e, &t);
  CHECK(ssm_test::same_bits(on_host(y), on_host(eval(e))));
  t.gradient(y).copy_from(dy);
  t.backward();
  const auto wanted = vjp(e, dy);
  CHECK(ssm_test::same_bits(on_host(t.gradient(q)), on_host(wanted.mixer.logits.q)));
  CHECK(ssm_test::same_bits(on_host(t.gradient(k)), on_host(wanted.mixer.logits.k)));
  CHECK(ssm_test::same_bits(on_host(t.gradient(v)), on_host(wanted.x)));
}
