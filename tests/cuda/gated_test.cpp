#include "cuda/mixer_operands.hpp"
#include "support/catch.hpp"

#include <string>
#include <string_view>
#include <utility>

// Gated linear attention and the gated delta rule, and alg::recurrent of the others: results, final
// states and all gradients against the CPU in double.

using namespace ssm;
using namespace ssm_test;

namespace {

struct named_numbers {
  std::string name;
  numbers values;
};

template <Floating T, Backend B>
tensor<T, 4, B> random_like(const shape<4>& extents, double low, std::uint64_t seed) {
  return detail::on_backend<B>(cast<T>(cast<bf16>(uniform<double, 4>(extents, low, 1, seed))));
}

template <class E>
shape<4> state_shape(const E& e) {
  const index_t sequences = layout_of(e.mixer).sequences(), features = e.x.extent(3);
  if constexpr (RecurrentMixer<typename E::mixer_type>) {
    return {sequences, e.heads(), e.mixer.key_size(), e.mixer.state_features(features)};
  } else {  // a mask by itself
    return {sequences, e.heads(), 1, features};
  }
}

/// Result, states and gradients. @param start  what gradients are added to
template <class E>
std::vector<named_numbers> everything(const E& e, bool with_state, double start) {
  using T = typename E::value_type;
  using B = typename E::backend;
  using real = accum_t<T>;
  std::vector<named_numbers> r;
  const auto dy = random_like<T, B>(e.extents(), -1, 21);
  E gradients = zeros_like(e);
  E::operands(gradients, [&](std::string_view, auto& t, operand) {
    using V = typename std::remove_cvref_t<decltype(t)>::value_type;
    t.fill(V(static_cast<float>(start)));
  });
  const tensor<T, 4, B> y(e.extents());
  if (with_state) {
    const shape<4> extents = state_shape(e);
    const auto initial = random_like<real, B>(extents, 0.5, 22);
    const auto d_final = random_like<real, B>(extents, -1, 23);
    const auto d_initial = tensor<real, 4, B>::full(extents, real(start));
    const tensor<real, 4, B> final(extents);
    eval_into(e, y, {initial, final, {}, 0, nullptr});
    vjp_into(e, dy, gradients, carry_gradient<T, B>{initial, d_final, d_initial});
    r.push_back({"final state", numbers_of(final)});
    r.push_back({"d initial state", numbers_of(d_initial)});
  } else {
    eval_into(e, y);
    vjp_into(e, dy, gradients, carry_gradient<T, B>{});
  }
  r.push_back({"y", numbers_of(y)});
  E::operands(gradients, [&](std::string_view name, auto& t, operand) {
    r.push_back({"d " + std::string(name), numbers_of(t)});
  });
  return r;
}

/// bf16: twice the error of rounding the operands and the result, and what products of it round on
/// the way.
template <Floating T>
constexpr double tolerance = std::same_as<T, double>  ? 1e-10
                             : std::same_as<T, float> ? 1e-5
                                                      : 1e-2;

struct options {
  sequence_layout layout{};
  bool with_state = false;
  double looser = 1;
  double start = 0;
};

template <Floating T, class Alg, class Make>
void agree(const std::string& what, const mixer_sizes& s, Alg algorithm, const Make& make,
           const options& o = {}) {
  const auto host = random_operands(s);
  const auto want = everything(make(rounded<T>(host)).packed(o.layout), o.with_state, o.start);
  const auto got =
      everything(make(on_device<T>(host)).packed(o.layout).with(algorithm), o.with_state, o.start);
  REQUIRE(got.size() == want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    INFO(what << ", " << algorithm.name << ", " << sizeof(T) << " bytes: " << got[i].name);
    CHECK(relative_error(got[i].values, want[i].values) <= tolerance<T> * o.looser);
  }
}

/// Every shape with alg::chunked and alg::recurrent.
template <Floating T, class Make>
void check_all(const std::string& name, const Make& make) {
  const auto both = [&](const std::string& shape, const mixer_sizes& s, const options& o) {
    agree<T>(name + ", " + shape, s, alg::chunked{}, make, o);
    agree<T>(name + ", " + shape, s, alg::recurrent{}, make, o);
  };
  const sequence_layout packed = sequence_layout::from_lengths({70, 1, 0, 129, 70});
  both("groups", {}, {});
  both("added to", {}, {.start = 1});
  both("states", {}, {.with_state = true, .start = 1});
  both("packed", {}, {.layout = packed});
  both("packed with states", {}, {.layout = packed, .with_state = true});
  both("one token", {.length = 1}, {.with_state = true});
  both("usual sizes", {.batch = 2, .length = 128, .key_heads = 4, .keys = 64, .features = 64}, {});
  both("shared values",
       {.length = 17, .heads = 2, .query_heads = 6, .key_heads = 3, .mask_heads = 1}, {});
  // Sums over 1009 tokens in float.
  both("odd sizes",
       {.batch = 1, .length = 1009, .heads = 7, .query_heads = 7, .key_heads = 7, .mask_heads = 7},
       {.looser = 3});
}

}  // namespace

TEMPLATE_TEST_CASE("cuda/gated: gated linear attention has the CPU's results and gradients",
                   "[cuda][gated]", float, double, bf16) {
  check_all<TestType>("gated", gated_attention);
}

TEMPLATE_TEST_CASE("cuda/gated: the gated delta rule has the CPU's results and gradients",
                   "[cuda][gated]", float, double, bf16) {
  check_all<TestType>("delta rule", delta_attention);
}

TEMPLATE_TEST_CASE("cuda/recurrent: token by token has the CPU's results and gradients",
                   "[cuda][recurrent]", float, double, bf16) {
  const sequence_layout packed = sequence_layout::from_lengths({70, 1, 0, 129, 70});
  const auto check = [&](const std::string& name, const auto& make) {
    for (const options& o :
         {options{}, options{.with_state = true}, options{.layout = packed, .with_state = true}}) {
      agree<TestType>(name, {}, alg::recurrent{}, make, o);
    }
  };
  check("retention", retention);
  check("mamba2", mamba2);
  check("mamba1", mamba1);
}

TEMPLATE_TEST_CASE("cuda/recurrent: normalised rows have the CPU's results and gradients",
                   "[cuda][recurrent]", float, double, bf16) {
  // Features elu + 1 are near 1, and normalised rows cancel what they share: rounding the features
  // to bf16, nothing else, moves the gradient of q by 0.0097 of its norm here, and the gradient of
  // the row sums is rounded too.
  const double looser = std::same_as<TestType, bf16> ? 3 : 1;
  const sequence_layout packed = sequence_layout::from_lengths({70, 1, 0, 129, 70});
  for (const options& o : {options{.looser = looser}, options{.with_state = true, .looser = looser},
                           options{.layout = packed, .with_state = true, .looser = looser}}) {
    agree<TestType>("normalised", {}, alg::recurrent{}, normalized_attention, o);
  }
}

TEMPLATE_TEST_CASE("cuda/recurrent: masks by themselves are scans token by token",
                   "[cuda][recurrent]", float, double) {
  const auto powers = [](const auto& o) { return decay(o.gamma) * o.x; };
  const auto mask = [](const auto& o) { return semiseparable(o.log_a, o.weight) * o.x; };
  for (const bool with_state : {false, true}) {
    agree<TestType>("decay", {}, alg::recurrent{}, powers, {.with_state = with_state});
    agree<TestType>("semiseparable", {}, alg::recurrent{}, mask, {.with_state = with_state});
  }
}

TEST_CASE("cuda/gated: no chunk has a negative size", "[cuda][gated]") {
  const auto o = on_device<float>(random_operands({}));
  CHECK_THROWS_AS(eval(gated_attention(o).with(alg::chunked{-1})), value_error);
  CHECK_THROWS_AS(eval(delta_attention(o).with(alg::chunked{-1})), value_error);
}
