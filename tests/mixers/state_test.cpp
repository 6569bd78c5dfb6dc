#include "support/catch.hpp"
#include <ssmlib/ssmlib.hpp>

#include <utility>

// What may not be advanced is refused before anything changes.

using namespace ssm;
using ssm_test::contains;

namespace {

tensor<float, 4> tokens(index_t n, index_t heads, index_t features, std::uint64_t seed) {
  return normal<float, 4>({1, n, heads, features}, 1, seed);
}
gram<float> kernel(index_t n, index_t heads = 2, index_t keys = 3) {
  return tokens(n, heads, keys, 1) * transpose(tokens(n, heads, keys, 2));
}

/// M[t, s] = q_t q_s, above the diagonal too unless it is causal: a user's mixer that says nothing.
template <bool Causal>
struct own_mixer {
  using value_type = float;
  using backend = cpu;
  using structure = structure::dense;
  using algorithms = alg_list<alg::quadratic>;

  tensor<float, 4> q;
  sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return q.extent(0); }
  [[nodiscard]] index_t length() const { return q.extent(1); }
  [[nodiscard]] index_t heads() const { return q.extent(2); }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("q", self.q, operand::per_token);
  }
  [[nodiscard]] tensor<double, 4> dense() const {
    const index_t n = length();
    return detail::dense_entries(*this, heads(), [&](index_t t, index_t s, index_t h) {
      if (Causal && s > t) return 0.0;
      return static_cast<double>(q(t / n, t % n, h, 0)) *
             static_cast<double>(q(s / n, s % n, h, 0));
    });
  }
};

/// z plus the mean of the sequence, or plus the token before.
template <bool Causal>
struct own_mask {
  using value_type = float;
  tensor<float, 4> multiply(const tensor<float, 4>& z, const sequence_layout& layout) const {
    tensor<float, 4> y = z.clone();
    const index_t time = z.extent(1);
    for (index_t i = 0; i < layout.sequences(); ++i) {
      for (index_t h = 0; h < z.extent(2); ++h) {
        for (index_t p = 0; p < z.extent(3); ++p) {
          for (index_t t = layout.begin(i); t < layout.end(i); ++t) {
            const index_t s = Causal ? t - 1 : layout.end(i) - 1;
            if (s >= layout.begin(i)) y(t / time, t % time, h, p) += z(s / time, s % time, h, p);
          }
        }
      }
    }
    return y;
  }
};

/// Whether the tokens of x in pieces of these sizes give what one pass gives.
template <class Make>
bool pieces_equal_one_pass(const Make& make, const std::vector<index_t>& sizes) {
  const auto e = make(9);
  const auto whole = eval(e);
  auto state = make_state(e, 1);
  index_t begin = 0;
  double worst = 0;
  for (const index_t n : sizes) {
    const auto y = advance(detail::slice_tokens(e, begin, begin + n), state);
    y.zip_with(whole.slice(1, begin, begin + n), [&](const float& a, const float& b) {
      worst = std::max(worst, std::abs(static_cast<double>(a) - static_cast<double>(b)));
    });
    begin += n;
  }
  return begin == 9 && worst < 1e-5;
}

}  // namespace

TEST_CASE("mixers/state: a gram matrix without a mask has no state", "[mixers][state][error]") {
  const auto x = tokens(5, 2, 4, 3);
  CHECK_THROWS_WITH(make_state(kernel(5) * x, 1), contains("depend on tokens to come"));
  CHECK_THROWS_AS(make_state(low_rank(x, x) * x, 1), value_error);
  CHECK_THROWS_AS(make_state(normalize_rows(kernel(5)) * x, 1), value_error);
  const auto d = tensor<float, 1>::full({2}, 1.0f);
  CHECK_THROWS_AS(make_state((kernel(5) + diagonal(d)) * x, 1), value_error);
}

TEST_CASE("mixers/state: a gram matrix is refused by a state made by hand too",
          "[mixers][state][error]") {
  const auto e = kernel(5) * tokens(5, 2, 4, 3);
  history_state<gram<float>> state(1, 0);
  CHECK_THROWS_AS(advance(e, state), value_error);
  CHECK(state.position(0) == 0);
}

TEST_CASE("mixers/state: softmax without a mask is refused inside a wrapper",
          "[mixers][state][error]") {
  const auto d = tensor<float, 1>::full({2}, 1.0f);
  const auto x = tokens(5, 2, 4, 3);
  CHECK_THROWS_AS(make_state((softmax(kernel(5)) + diagonal(d)) * x, 1), value_error);
  const auto make = [&](index_t n) {
    return (softmax(kernel(n) + causal) + diagonal(d)) * tokens(n, 2, 4, 3);
  };
  CHECK(pieces_equal_one_pass(make, {1, 4, 1, 3}));
}

TEST_CASE("mixers/state: an own mixer that looks ahead is found by its matrix",
          "[mixers][state][error]") {
  const auto e = own_mixer<false>{tokens(5, 2, 1, 1), {}} * tokens(5, 2, 4, 3);
  auto state = make_state(e, 1);
  CHECK_THROWS_WITH(advance(e, state), contains("entry (0, 1) of the mixer's matrix is not zero"));
  CHECK(state.position(0) == 0);
}

TEST_CASE("mixers/state: an own mixer that looks ahead is found by single steps",
          "[mixers][state][error]") {
  const auto e = own_mixer<false>{tokens(5, 2, 1, 1), {}} * tokens(5, 2, 4, 3);
  auto state = make_state(e, 1);
  (void)advance(detail::slice_tokens(e, 0, 1), state);
  CHECK_THROWS_AS(advance(detail::slice_tokens(e, 1, 2), state), value_error);
  CHECK(state.position(0) == 1);
}

TEST_CASE("mixers/state: an own mask that looks ahead is found, alone and over a gram matrix",
          "[mixers][state][error]") {
  const auto x = tokens(5, 2, 4, 3);
  const auto alone = mask_node(own_mask<false>{}) * x;
  auto first = make_state(alone, 1);
  CHECK_THROWS_AS(advance(alone, first), value_error);
  const auto over = hadamard(own_mask<false>{}, kernel(5)) * x;
  auto second = make_state(over, 1);
  CHECK_THROWS_AS(advance(over, second), value_error);
}

TEST_CASE("mixers/state: causal mixers of every kind advance in pieces", "[mixers][state]") {
  const auto x = [](index_t n) { return tokens(n, 2, 4, 3); };
  const std::vector<index_t> sizes = {1, 4, 1, 3};
  CHECK(pieces_equal_one_pass(
      [&](index_t n) {
        return own_mixer<true>{tokens(n, 2, 1, 1), {}} * x(n);
      },
      sizes));
  CHECK(
      pieces_equal_one_pass([&](index_t n) { return mask_node(own_mask<true>{}) * x(n); }, sizes));
  CHECK(pieces_equal_one_pass(
      [&](index_t n) { return hadamard(own_mask<true>{}, kernel(n)) * x(n); }, sizes));
  CHECK(pieces_equal_one_pass([&](index_t n) { return hadamard(window(3), kernel(n)) * x(n); },
                              sizes));
  const auto distances = normal<float, 2>({2, 9}, 1, 7);
  CHECK(pieces_equal_one_pass(
      [&](index_t n) { return hadamard(toeplitz(distances), kernel(n)) * x(n); }, sizes));
}

TEST_CASE("mixers/state: states of other sizes and moved-from ones are refused",
          "[mixers][state][error]") {
  const auto refuses = [](const auto& e, auto state) {
    CHECK_THROWS_AS(advance(e, state), shape_error);
    const auto before = state;
    CHECK(state == before);
    auto mine = make_state(e, 1);
    const auto taken = std::move(mine);
    CHECK_THROWS_AS(advance(e, mine), shape_error);
    decltype(state) empty;
    CHECK_THROWS_AS(advance(e, empty), shape_error);
  };
  const auto attention = [](index_t heads, index_t keys, index_t features) {
    return softmax(kernel(5, heads, keys) + causal) * tokens(5, heads, features, 3);
  };
  const auto linear = [](index_t heads, index_t keys, index_t features) {
    return hadamard(causal, kernel(5, heads, keys)) * tokens(5, heads, features, 3);
  };
  const auto all = [&](const auto& make) {
    const auto e = make(2, 3, 4);
    refuses(e, make_state(make(4, 3, 4), 1));
    refuses(e, make_state(make(2, 5, 4), 1));
    refuses(e, make_state(make(2, 3, 8), 1));
    refuses(e, make_state(e, 2));
  };
  all(attention);
  all(linear);
}
