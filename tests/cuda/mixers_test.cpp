#include "support/catch.hpp"
#include <ssmlib/lower/cuda/quadratic.hpp>
#include <ssmlib/lower/cuda/selective.hpp>
#include <ssmlib/lower/cuda/semiseparable.hpp>
#include <ssmlib/lower/cuda/softmax.hpp>
#include <ssmlib/lower/cuda/wrappers.hpp>
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/gated_linear.hpp>
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/lower/toeplitz.hpp>
#include <ssmlib/tensor/random.hpp>
#include <ssmlib/tensor/transfer.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

using namespace ssm;

namespace {

struct sizes {
  index_t batch = 2, length = 37, heads = 4, query_heads = 4, key_heads = 4, value_heads = 4,
          mask_heads = 4, keys = 24, features = 40;
};

/// Where the device's operands lie: dense, or parts of larger tensors of NaN.
enum class placing { dense, aligned_slices, odd_slices, time_slices };

template <Floating T, Backend B>
struct operands {
  using real = accum_t<T>;
  tensor<T, 4, B> q, k, x;           // (b, T, their heads, keys or features)
  tensor<real, 3, B> log_a, weight;  // (b, T, mask heads)
  tensor<real, 1, B> gamma, d;       // (mask heads), (heads)
  tensor<T, 3, B> own_log_a;         // (b, T, mask heads), for masks by themselves
  tensor<T, 1, B> own_gamma;         // (mask heads)
  tensor<T, 3, B> delta;             // (b, T, mask heads)
  tensor<real, 2, B> a;              // (mask heads, keys)
  tensor<real, 4, B> log_gate;       // (b, T, mask heads, keys)
  tensor<real, 2, B> kernel;         // (mask heads, distances)
};

/// f(member of one, member of the other) for all.
template <class A, class B, class F>
void for_each_pair(A& a, B& b, F f) {
  f(a.q, b.q), f(a.k, b.k), f(a.x, b.x), f(a.log_a, b.log_a), f(a.weight, b.weight);
  f(a.gamma, b.gamma), f(a.d, b.d), f(a.own_log_a, b.own_log_a), f(a.own_gamma, b.own_gamma);
  f(a.delta, b.delta), f(a.a, b.a), f(a.log_gate, b.log_gate), f(a.kernel, b.kernel);
}

template <Element T, int R>
tensor<T, R, cuda> placed(const tensor<T, R>& host, placing where) {
  const tensor<T, R, cuda> dense = to<cuda>(host);
  if (where == placing::dense || R == 1) return dense;
  const int axis = where == placing::time_slices && R > 2 ? 1 : R - 1;
  const index_t before = where == placing::aligned_slices ? 8 : 3;
  const index_t after = where == placing::aligned_slices ? 8 : 2;
  shape<R> extents = host.extents();
  extents[static_cast<std::size_t>(axis)] += before + after;
  const auto whole = tensor<T, R, cuda>::full(extents, T(std::numeric_limits<float>::quiet_NaN()));
  const auto part = whole.slice(axis, before, before + host.extent(axis));
  part.copy_from(dense);
  return part;
}

/// The same numbers on both sides: what T holds, on the CPU in double.
template <Floating T>
struct both_operands {
  operands<double, cpu> host;
  operands<T, cuda> device;

  explicit both_operands(const sizes& s, placing where = placing::dense) {
    const index_t b = s.batch, n = s.length, m = s.mask_heads;
    host.q = uniform<double, 4>({b, n, s.query_heads, s.keys}, -1, 1, 1);
    host.k = uniform<double, 4>({b, n, s.key_heads, s.keys}, -0.4, 0.4, 2);
    host.x = uniform<double, 4>({b, n, s.value_heads, s.features}, -1, 1, 3);
    host.log_a = uniform<double, 3>({b, n, m}, -0.4, 0, 4);
    host.weight = uniform<double, 3>({b, n, m}, 0.1, 1, 5);
    host.gamma = uniform<double, 1>({m}, 0.8, 1, 6);
    host.d = uniform<double, 1>({s.heads}, -1, 1, 7);
    host.own_log_a = uniform<double, 3>({b, n, m}, -0.4, 0, 8);
    host.own_gamma = uniform<double, 1>({m}, 0.8, 1, 9);
    host.delta = uniform<double, 3>({b, n, m}, 0.01, 0.3, 10);
    host.a = uniform<double, 2>({m, s.keys}, -2, -0.1, 11);
    host.log_gate = uniform<double, 4>({b, n, m, s.keys}, -0.4, 0, 12);
    host.kernel = uniform<double, 2>({m, b * n}, -1, 1, 13);
    for_each_pair(host, device, [&](auto& exact, auto& target) {
      const auto rounded = cast<typename std::remove_cvref_t<decltype(target)>::value_type>(exact);
      exact = cast<double>(rounded);
      target = placed(rounded, where);
    });
  }
};

using numbers = std::vector<double>;

template <Element T, int R, Backend B>
numbers numbers_of(const tensor<T, R, B>& t) {
  const tensor<double, R> exact = cast<double>(detail::on_host(t)).contiguous();
  return {exact.data(), exact.data() + exact.size()};
}

/// |got - want| / |want|; infinite where anything is NaN.
double relative_error(const numbers& got, const numbers& want) {
  REQUIRE(got.size() == want.size());
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(got[i])) return std::numeric_limits<double>::infinity();
    error += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

/// A product's result, its gradients by the operands' names, and what they do with states.
struct results {
  std::vector<std::string> names;
  std::vector<numbers> values;
  void add(std::string name, numbers v) {
    names.push_back(std::move(name));
    values.push_back(std::move(v));
  }
};

/// Random numbers that bf16 holds, of the type and backend wanted.
template <Floating T, Backend B>
tensor<T, 4, B> random_like(const shape<4>& extents, std::uint64_t seed) {
  const auto rounded = cast<bf16>(uniform<double, 4>(extents, -1, 1, seed));
  return detail::on_backend<B>(cast<T>(rounded));
}

/// Everything that an expression computes. @param start  what gradients are added to
template <class E>
results everything(const E& e, bool with_state = false, double start = 0) {
  using M = typename E::mixer_type;
  using T = typename E::value_type;
  using B = typename E::backend;
  using real = accum_t<T>;
  results r;
  const auto dy = random_like<T, B>(e.extents(), 21);
  E gradients = zeros_like(e);
  if (start != 0) {
    E::operands(gradients, [&](std::string_view, auto& t, operand) {
      using V = typename std::remove_cvref_t<decltype(t)>::value_type;
      t.fill(V(static_cast<float>(start)));
    });
  }
  const tensor<T, 4, B> y(e.extents());
  if (with_state) {
    shape<4> extents{layout_of(e.mixer).sequences(), e.heads(), 1, e.x.extent(3)};  // of a mask
    if constexpr (RecurrentMixer<M>) {
      extents[2] = e.mixer.key_size();
      extents[3] = e.mixer.state_features(e.x.extent(3));
    }
    // Away from zero: a normalised mixer divides by what its last column says.
    const auto initial =
        detail::on_backend<B>(cast<real>(cast<bf16>(uniform<double, 4>(extents, 0.5, 1, 22))));
    const auto d_final = random_like<real, B>(extents, 23);
    const auto d_initial = tensor<real, 4, B>::zeros(extents);
    const tensor<real, 4, B> final(extents);
    eval_into(e, y, {initial, final, {}, 0, nullptr});
    r.add("final state", numbers_of(final));
    vjp_into(e, dy, gradients, carry_gradient<T, B>{initial, d_final, d_initial});
    r.add("d initial state", numbers_of(d_initial));
  } else {
    eval_into(e, y);
    vjp_into(e, dy, gradients, carry_gradient<T, B>{});
  }
  r.add("y", numbers_of(y));
  E::operands(gradients, [&](std::string_view name, auto& t, operand) {
    r.add("d " + std::string(name), numbers_of(t));
  });
  return r;
}

/// bf16: twice the error of rounding the result, and what products of it round on the way.
/// float: its rounding times the root of the terms.
template <Floating T>
constexpr double tolerance = std::same_as<T, double>  ? 1e-10
                             : std::same_as<T, float> ? 1e-5
                                                      : 1e-2;

struct options {
  placing where = placing::dense;
  sequence_layout layout{};
  bool with_state = false;
  double looser = 1;
};

/// make(operands) on the device by `algorithm` against make(operands) on the CPU in double.
template <Floating T, class Alg, class Make>
void agree(const std::string& what, const sizes& s, Alg algorithm, Make make,
           const options& o = {}) {
  const both_operands<T> both(s, o.where);
  const results want = everything(make(both.host).packed(o.layout), o.with_state);
  const results got = everything(make(both.device).packed(o.layout).with(algorithm), o.with_state);
  REQUIRE(got.names == want.names);
  for (std::size_t i = 0; i < got.values.size(); ++i) {
    INFO(what << ", " << sizeof(T) << " bytes, T " << s.length << ": " << got.names[i]);
    CHECK(relative_error(got.values[i], want.values[i]) <= tolerance<T> * o.looser);
  }
}

/// Features elu + 1 are near 1, and normalised rows cancel what they share: rounding the features
/// to bf16, nothing else, moves the gradient of q by 0.0083 of its norm in these problems, and the
/// products round their operands once more.
template <Floating T>
options normalized(options o) {
  if (std::same_as<T, bf16>) o.looser *= 3;
  return o;
}

/// The shapes that every mixer is tried with; f(name, sizes, options).
template <class F>
void for_each_shape(F f) {
  f("two sequences", sizes{}, options{});
  f("one token", sizes{.batch = 3, .length = 1}, options{});
  f("groups",
    sizes{.heads = 8,
          .query_heads = 4,
          .key_heads = 4,
          .value_heads = 8,
          .mask_heads = 8,
          .keys = 16,
          .features = 64},
    options{});
  f("grouped values",
    sizes{.heads = 6,
          .query_heads = 6,
          .key_heads = 2,
          .value_heads = 2,
          .mask_heads = 3,
          .keys = 16,
          .features = 24},
    options{});
  f("packed", sizes{}, options{.layout = sequence_layout::from_lengths({30, 1, 0, 43})});
  f("equal lengths, packed", sizes{}, options{.layout = sequence_layout::from_lengths({37, 37})});
  f("aligned slices", sizes{}, options{.where = placing::aligned_slices});
  f("odd slices", sizes{}, options{.where = placing::odd_slices});
  f("time slices", sizes{}, options{.where = placing::time_slices});
  // Sums over 1009 tokens in float.
  f("odd sizes",
    sizes{.batch = 1,
          .length = 1009,
          .heads = 7,
          .query_heads = 7,
          .key_heads = 7,
          .value_heads = 7,
          .mask_heads = 7,
          .keys = 24,
          .features = 40},
    options{.looser = 3});
}

const auto full_attention = [](const auto& o) { return softmax(o.q * transpose(o.k) * 0.7) * o.x; };
const auto causal_attention = [](const auto& o) {
  return softmax(o.q * transpose(o.k) * 0.7 + causal) * o.x;
};
const auto window_attention = [](const auto& o) {
  return softmax(o.q * transpose(o.k) * 0.7 + window(9)) * o.x;
};
const auto linear_attention = [](const auto& o) {
  return hadamard(causal, o.q * transpose(o.k) * 0.5) * o.x;
};
const auto retention = [](const auto& o) {
  return hadamard(decay(o.gamma), o.q * transpose(o.k) * 0.5) * o.x;
};
const auto mamba2 = [](const auto& o) {
  return (hadamard(semiseparable(o.log_a, o.weight), o.q * transpose(o.k) * 0.5) + diagonal(o.d)) *
         o.x;
};
const auto normalized_attention = [](const auto& o) {
  return normalize_rows(
             hadamard(causal, with_features(feature::elu_plus_one{}, o.q * transpose(o.k) * 0.5))) *
         o.x;
};
const auto mamba1 = [](const auto& o) {
  return (selective(o.delta, o.a, o.q, o.k) + diagonal(o.d)) * o.x;
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/mixers: tiled attention has the CPU's results and gradients",
                   "[cuda][mixers]", float, double, bf16) {
  for_each_shape([](const std::string& name, const sizes& s, const options& o) {
    agree<TestType>("causal attention, " + name, s, alg::tiled{}, causal_attention, o);
    agree<TestType>("attention to all, " + name, s, alg::tiled{}, full_attention, o);
  });
  agree<TestType>("window attention", {}, alg::tiled{}, window_attention);
  agree<TestType>("window attention, packed", {}, alg::tiled{}, window_attention,
                  {.layout = sequence_layout::from_lengths({30, 1, 0, 43})});
}

TEMPLATE_TEST_CASE("cuda/mixers: the chunked semiseparable family has the CPU's results",
                   "[cuda][mixers]", float, double, bf16) {
  for_each_shape([](const std::string& name, const sizes& s, const options& o) {
    agree<TestType>("mamba2, " + name, s, alg::chunked{}, mamba2, o);
  });
  const sequence_layout packed = sequence_layout::from_lengths({30, 1, 0, 43});
  for (const options& o : {options{}, options{.layout = packed}}) {
    agree<TestType>("linear attention", {}, alg::chunked{}, linear_attention, o);
    agree<TestType>("retention", {}, alg::chunked{}, retention, o);
    agree<TestType>(
        "gated", {}, alg::chunked{},
        [](const auto& v) { return hadamard(semiseparable(v.log_a), v.q * transpose(v.k)) * v.x; },
        o);
  }
}

TEMPLATE_TEST_CASE("cuda/mixers: chunked products start from a state and return one",
                   "[cuda][mixers]", float, double, bf16) {
  const sequence_layout packed = sequence_layout::from_lengths({30, 1, 0, 43});
  for (const options& o :
       {options{.with_state = true}, options{.layout = packed, .with_state = true},
        options{.where = placing::odd_slices, .with_state = true}}) {
    agree<TestType>("mamba2", {}, alg::chunked{}, mamba2, o);
    agree<TestType>("retention", {}, alg::chunked{}, retention, o);
    agree<TestType>("normalised linear attention", {}, alg::chunked{}, normalized_attention,
                    normalized<TestType>(o));
  }
}

TEMPLATE_TEST_CASE("cuda/mixers: masks by themselves are scans", "[cuda][mixers]", float, double,
                   bf16) {
  const sequence_layout packed = sequence_layout::from_lengths({30, 1, 0, 43});
  const auto mask = [](const auto& o) { return semiseparable(o.own_log_a, o.own_log_a) * o.x; };
  const auto powers = [](const auto& o) { return decay(o.own_gamma) * o.x; };
  const auto ones = [](const auto& o) {
    using X = std::remove_cvref_t<decltype(o.x)>;
    return causal_mask<typename X::value_type, typename X::backend>{} * o.x;
  };
  for (const bool with_state : {false, true}) {
    agree<TestType>("semiseparable", {}, alg::chunked{}, mask, {.with_state = with_state});
    agree<TestType>("semiseparable, packed", {}, alg::chunked{}, mask,
                    {.layout = packed, .with_state = with_state});
    agree<TestType>("decay", {}, alg::chunked{}, powers, {.with_state = with_state});
    agree<TestType>("causal", {}, alg::chunked{}, ones, {.with_state = with_state});
  }
}

TEMPLATE_TEST_CASE("cuda/mixers: feature maps act on queries and keys", "[cuda][mixers]", float,
                   double, bf16) {
  const auto with = [](auto phi) {
    return [phi](const auto& o) {
      return hadamard(causal, with_features(phi, o.q * transpose(o.k) * 0.5)) * o.x;
    };
  };
  for (const placing where : {placing::dense, placing::odd_slices}) {
    agree<TestType>("elu + 1", {}, alg::chunked{}, with(feature::elu_plus_one{}), {.where = where});
    agree<TestType>("relu", {}, alg::chunked{}, with(feature::relu{}), {.where = where});
    agree<TestType>("exp", {}, alg::chunked{}, with(feature::exponential{}), {.where = where});
  }
}

TEMPLATE_TEST_CASE("cuda/mixers: the selective scan has the CPU's results", "[cuda][mixers]", float,
                   double, bf16) {
  const sequence_layout packed = sequence_layout::from_lengths({30, 1, 0, 43});
  const sizes mamba{.heads = 24,
                    .query_heads = 1,
                    .key_heads = 1,
                    .value_heads = 24,
                    .mask_heads = 24,
                    .keys = 16,
                    .features = 1};
  const auto without = [](const auto& o) { return selective(o.delta, o.a, o.q, o.k) * o.x; };
  for (const bool with_state : {false, true}) {
    agree<TestType>("mamba", mamba, alg::scan{}, mamba1, {.with_state = with_state});
    agree<TestType>("no skip", mamba, alg::scan{}, without, {.with_state = with_state});
    agree<TestType>("packed", mamba, alg::scan{}, mamba1,
                    {.layout = packed, .with_state = with_state});
  }
  for (const placing where : {placing::aligned_slices, placing::odd_slices, placing::time_slices})
    agree<TestType>("slices", mamba, alg::scan{}, mamba1, {.where = where});
  sizes groups = mamba;
  groups.query_heads = 2, groups.key_heads = 4, groups.keys = 20;
  agree<TestType>("groups", groups, alg::scan{}, mamba1);
  // Several features a channel, and channels that share delta, A, D or x.
  const sizes shared{.heads = 2,
                     .query_heads = 1,
                     .key_heads = 2,
                     .value_heads = 8,
                     .mask_heads = 4,
                     .keys = 7,
                     .features = 3};
  const sizes shared_x{.heads = 8,
                       .query_heads = 1,
                       .key_heads = 1,
                       .value_heads = 2,
                       .mask_heads = 8,
                       .keys = 7,
                       .features = 3};
  for (const bool with_state : {false, true}) {
    agree<TestType>("shared channels", shared, alg::scan{}, mamba1, {.with_state = with_state});
    agree<TestType>("shared x", shared_x, alg::scan{}, mamba1, {.with_state = with_state});
  }
  agree<TestType>("one token", {.length = 1, .query_heads = 1, .key_heads = 1, .features = 1},
                  alg::scan{}, mamba1);
  agree<TestType>("long",
                  {.batch = 1,
                   .length = 1009,
                   .heads = 7,
                   .query_heads = 1,
                   .key_heads = 1,
                   .value_heads = 7,
                   .mask_heads = 7,
                   .keys = 16,
                   .features = 1},
                  alg::scan{}, mamba1, {.looser = 3});
}

TEMPLATE_TEST_CASE("cuda/mixers: wrappers work around any mixer", "[cuda][mixers]", float, double,
                   bf16) {
  const auto skip = [](const auto& o) {
    return (softmax(o.q * transpose(o.k) + causal) + diagonal(o.d)) * o.x;
  };
  const auto both = [](const auto& o) {
    using X = std::remove_cvref_t<decltype(o.x)>;
    return normalize_rows(
               softmax(o.q * transpose(o.k)) +
               diagonal(tensor<accum_t<typename X::value_type>, 1, typename X::backend>::full(
                   {2}, 0.5f))) *
           o.x;
  };
  for_each_shape([&](const std::string& name, const sizes& s, const options& o) {
    agree<TestType>("attention + diagonal, " + name, s, alg::tiled{}, skip, o);
    if (s.length == 1) return;  // such a row is 1 whatever q and k are: their gradients are 0
    agree<TestType>("normalised linear attention, " + name, s, alg::chunked{}, normalized_attention,
                    normalized<TestType>(o));
  });
  agree<TestType>("normalised", {}, alg::tiled{}, both);
}

TEMPLATE_TEST_CASE("cuda/mixers: every mixer has the quadratic reference", "[cuda][mixers]", float,
                   double, bf16) {
  const sequence_layout packed = sequence_layout::from_lengths({8, 1, 0, 9});
  const sizes small{.batch = 2,
                    .length = 9,
                    .heads = 2,
                    .query_heads = 2,
                    .key_heads = 1,
                    .value_heads = 2,
                    .mask_heads = 2,
                    .keys = 3,
                    .features = 5};
  const auto quadratic = [&](const std::string& name, auto make) {
    for (const options& o : {options{}, options{.layout = packed}}) {
      agree<TestType>(name, small, alg::quadratic{}, make, o);
    }
  };
  quadratic("attention", causal_attention);
  quadratic("window attention", window_attention);
  quadratic("mamba2", mamba2);
  quadratic("retention", retention);
  quadratic("normalised linear attention", normalized_attention);
  quadratic("mamba", mamba1);
  quadratic("gram", [](const auto& o) { return (o.q * transpose(o.k) * 0.5) * o.x; });
  quadratic("window",
            [](const auto& o) { return hadamard(window(4), o.q * transpose(o.k)) * o.x; });
  quadratic("toeplitz",
            [](const auto& o) { return hadamard(toeplitz(o.kernel), o.q * transpose(o.k)) * o.x; });
  quadratic("gated", [](const auto& o) { return gated(o.log_gate, o.q * transpose(o.k)) * o.x; });
  quadratic("delta rule", [](const auto& o) {
    return delta_rule(o.log_a, o.weight, o.q * transpose(o.k)) * o.x;
  });
  quadratic("mask", [](const auto& o) { return semiseparable(o.own_log_a) * o.x; });
}

TEST_CASE("cuda/mixers: the reference starts from a state and returns one", "[cuda][mixers]") {
  agree<float>("mamba2", {}, alg::quadratic{}, mamba2, {.with_state = true});
}

TEST_CASE("cuda/mixers: gradients are added to", "[cuda][mixers]") {
  const auto added = [](const std::string& name, const sizes& s, auto make, auto algorithm) {
    const both_operands<double> both(s);
    const auto e = make(both.device).with(algorithm);
    const results zero = everything(e), one = everything(e, false, 1);
    for (std::size_t i = 0; i < zero.values.size(); ++i) {
      numbers from = one.values[i];
      if (zero.names[i] != "y") {
        for (double& v : from)
          v -= 1;
      }
      INFO(name << ": " << zero.names[i]);
      CHECK(relative_error(from, zero.values[i]) <= 1e-12);
    }
  };
  const sizes mamba{.query_heads = 1, .key_heads = 1, .features = 1};
  added("attention", {}, causal_attention, alg::tiled{});
  added("mamba2", {}, mamba2, alg::chunked{});
  added("normalised linear attention", {}, normalized_attention, alg::chunked{});
  added("mamba", mamba, mamba1, alg::scan{});
  added("quadratic", {}, mamba2, alg::quadratic{});
}

TEST_CASE("cuda/mixers: repeats have the same bits", "[cuda][mixers]") {
  const auto repeats = [](const std::string& name, const sizes& s, auto make, auto algorithm) {
    const both_operands<bf16> both(s);
    const auto e = make(both.device).with(algorithm);
    const results first = everything(e);
    for (int i = 0; i < 3; ++i) {
      INFO(name);
      CHECK((everything(e).values == first.values));  // in brackets: not printed number by number
    }
  };
  const sizes wide{.batch = 2,
                   .length = 300,
                   .heads = 8,
                   .query_heads = 8,
                   .key_heads = 2,
                   .value_heads = 2,
                   .mask_heads = 8,
                   .keys = 64,
                   .features = 64};
  const sizes mamba{.length = 300, .query_heads = 1, .key_heads = 1, .features = 1};
  repeats("attention", wide, causal_attention, alg::tiled{});
  repeats(
      "attention + diagonal", wide,
      [](const auto& o) { return (softmax(o.q * transpose(o.k)) + diagonal(o.d)) * o.x; },
      alg::tiled{});
  repeats("mamba2", wide, mamba2, alg::chunked{});
  repeats("normalised linear attention", wide, normalized_attention, alg::chunked{});
  repeats("mamba", mamba, mamba1, alg::scan{});
}

TEST_CASE("cuda/mixers: without a token the final state is the initial one", "[cuda][mixers]") {
  const auto q = tensor<float, 4, cuda>::zeros(2, 0, 3, 4);
  const auto x = tensor<float, 4, cuda>::zeros(2, 0, 3, 5);
  const auto e = hadamard(causal, q * transpose(q)) * x;
  const auto initial = to<cuda>(uniform<float, 4>({2, 3, 4, 5}, -1, 1, 1));
  const auto r = eval_with_state(e, initial);
  CHECK(r.y.size() == 0);
  CHECK(numbers_of(r.final_state) == numbers_of(initial));
  CHECK(numbers_of(eval_with_state(e, tensor<float, 4, cuda>{}).final_state) == numbers(120, 0.0));
}

TEST_CASE("cuda/mixers: automatic takes the linear or tiled algorithm at every length",
          "[cuda][mixers]") {
  const both_operands<float> both({});
  for (const index_t length : {1, 8, 100000}) {
    CHECK(choose_algorithm(mamba2(both.device).mixer, length, 40) == "chunked");
    CHECK(choose_algorithm(retention(both.device).mixer, length, 40) == "chunked");
    CHECK(choose_algorithm(normalized_attention(both.device).mixer, length, 40) == "chunked");
    CHECK(choose_algorithm(causal_attention(both.device).mixer, length, 40) == "tiled");
    CHECK(choose_algorithm(mamba1(both.device).mixer, length, 1) == "scan");
    CHECK(choose_algorithm(decay(both.device.gamma), length, 40) == "chunked");
    CHECK(choose_algorithm(both.device.q * transpose(both.device.k), length, 40) == "associative");
  }
}

TEST_CASE("cuda/mixers: dense() of a node on the device is that of its twin on the host",
          "[cuda][mixers]") {
  const both_operands<float> both({.batch = 2,
                                   .length = 6,
                                   .heads = 2,
                                   .query_heads = 2,
                                   .key_heads = 1,
                                   .value_heads = 2,
                                   .mask_heads = 2,
                                   .keys = 3});
  const auto same = [&](auto make) {
    CHECK(
        (numbers_of(make(both.device).mixer.dense()) == numbers_of(make(both.host).mixer.dense())));
  };
  same(causal_attention);
  same(mamba2);
  same(mamba1);
  same(normalized_attention);
  same([](const auto& o) { return gated(o.log_gate, o.q * transpose(o.k)) * o.x; });
  std::vector<double> device(6), host(6);
  semiseparable(both.device.log_a).column(6, 12, 7, 1, device.data());
  semiseparable(both.host.log_a).column(6, 12, 7, 1, host.data());
  CHECK(device == host);
}
