// Every algorithm that mixers have on the CPU beside those of cuda/mixers and cuda/states, on the
// device: Gram matrices, masked products in tiles, Toeplitz masks, masks of a user's own, wrappers
// around them. The reference is the CPU in double from the same, once rounded numbers.

#include "mixer_operands.hpp"
#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/lower/toeplitz.hpp>
#include <ssmlib/lower/user_mask.hpp>

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

using namespace ssm;
using namespace ssm_test;

namespace {

/// The operands of all mixers, and those that masks by themselves want: of the type of X.
template <Floating T, Backend B>
struct operands {
  mixer_operands<T, B> o;
  tensor<accum_t<T>, 2, B> kernel;  // (mask heads, distances)
  tensor<T, 2, B> own_kernel;
  tensor<T, 3, B> own_log_a;
  tensor<T, 1, B> own_gamma;
};

template <Floating T>
struct both_operands {
  operands<double, cpu> host;
  operands<T, cuda> device;

  explicit both_operands(const mixer_sizes& s) {
    using real = accum_t<T>;
    host.o = ssm_test::rounded<T>(random_operands(s));
    device.o = on_device<T>(host.o);
    const index_t distances = s.batch * s.length;
    const auto kernel = cast<bf16>(uniform<double, 2>({s.mask_heads, distances}, -1, 1, 31));
    host.kernel = host.own_kernel = cast<double>(kernel);
    device.kernel = to<cuda>(cast<real>(kernel));
    device.own_kernel = to<cuda>(cast<T>(kernel));
    const auto log_a = cast<bf16>(host.o.log_a);
    host.own_log_a = cast<double>(log_a);
    device.own_log_a = to<cuda>(cast<T>(log_a));
    const auto gamma = cast<bf16>(host.o.gamma);
    host.own_gamma = cast<double>(gamma);
    device.own_gamma = to<cuda>(cast<T>(gamma));
  }
};

/// Random numbers that bf16 holds.
template <Floating T, Backend B>
tensor<T, 4, B> random_like(const shape<4>& extents, std::uint64_t seed) {
  const auto rounded = cast<bf16>(uniform<double, 4>(extents, -1, 1, seed));
  return ssm::detail::on_backend<B>(cast<T>(rounded));
}

struct results {
  std::vector<std::string> names;
  std::vector<numbers> values;
  void add(std::string name, numbers v) {
    names.push_back(std::move(name));
    values.push_back(std::move(v));
  }
};

/// The product and its gradients by the operands' names, added to what is `start` everywhere.
template <class E>
results everything(const E& e, float start = 0) {
  using T = typename E::value_type;
  using B = typename E::backend;
  results r;
  r.add("y", numbers_of(eval(e)));
  const auto dy = random_like<T, B>(e.extents(), 41);
  E gradients = zeros_like(e);
  E::operands(gradients, [&](std::string_view, auto& t, operand) {
    using V = typename std::remove_cvref_t<decltype(t)>::value_type;
    if (start != 0) t.fill(V(start));
  });
  vjp_into(e, dy, gradients, carry_gradient<T, B>{});
  E::operands(gradients, [&](std::string_view name, auto& t, operand) {
    r.add("d " + std::string(name), numbers_of(t));
  });
  return r;
}

/// As in cuda/mixers. bf16: twice the error of rounding the result, and what the operands of a
/// gradient round on the way.
template <Floating T>
constexpr double tolerance = std::same_as<T, double>  ? 1e-10
                             : std::same_as<T, float> ? 1e-5
                                                      : 1e-2;

constexpr mixer_sizes odd_sizes{};
constexpr mixer_sizes groups{.batch = 1,
                             .length = 203,
                             .heads = 2,
                             .query_heads = 4,
                             .key_heads = 1,
                             .mask_heads = 4,
                             .keys = 16,
                             .features = 64};
constexpr mixer_sizes one_token{.batch = 3, .length = 1};

template <class M>
constexpr bool is_own_mask = false;
template <class U>
constexpr bool is_own_mask<user_mask<U>> = true;
template <class U, class T, class B, class Phi>
constexpr bool is_own_mask<masked_gram<user_mask<U>, T, B, Phi>> = true;

/// On the CPU the gradient of alg::quadratic with a mask of one's own takes finite differences.
template <class E>
auto reference(const E& e) {
  if constexpr (is_own_mask<typename E::mixer_type>) {
    return e.with(alg::structured{});
  } else {
    return e.with(alg::quadratic{});
  }
}

/// make(operands) by `algorithm` on the device against the CPU in double, rectangular and packed.
template <Floating T, class Make, class Alg>
void agree(const std::string& what, const mixer_sizes& s, Make make, Alg algorithm,
           double looser = 1) {
  const both_operands<T> both(s);
  std::vector<sequence_layout> layouts{{}};
  if (s.length > 50) {
    const index_t tokens = s.batch * s.length;
    layouts.push_back(sequence_layout::from_lengths({37, 1, 0, tokens - 38}));
  }
  for (const sequence_layout& layout : layouts) {
    const results want = everything(reference(make(both.host).packed(layout)));
    const results got = everything(make(both.device).packed(layout).with(algorithm));
    REQUIRE(got.names == want.names);
    for (std::size_t i = 0; i < got.values.size(); ++i) {
      INFO(what << ", " << algorithm.name << ", " << sizeof(T) << " bytes, T " << s.length
                << (layout ? ", packed: " : ": ") << got.names[i]);
      CHECK(relative_error(got.values[i], want.values[i]) <= tolerance<T> * looser);
    }
  }
}
template <Floating T, class Make, class... Alg>
void agree_by(const std::string& what, Make make, double looser, Alg... algorithms) {
  for (const mixer_sizes& s : {odd_sizes, groups, one_token})
    (agree<T>(what, s, make, algorithms, looser), ...);
}

template <Floating T>
constexpr double transforms = std::same_as<T, double> ? 1.0 : 2.0;  // 16 u log2 n of the column

const auto gram_product = [](const auto& v) { return (v.o.q * transpose(v.o.k) * 0.5) * v.o.x; };
const auto mapped_gram = [](const auto& v) {
  return with_features(feature::elu_plus_one{}, v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto linear_product = [](const auto& v) {
  return hadamard(causal, v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto retention_product = [](const auto& v) {
  return hadamard(decay(v.o.gamma), v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto gated_product = [](const auto& v) {
  return hadamard(semiseparable(v.o.log_a, v.o.weight), v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto window_product = [](const auto& v) {
  return hadamard(window(11), v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto toeplitz_product = [](const auto& v) {
  return hadamard(toeplitz(v.kernel), v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto toeplitz_of_features = [](const auto& v) {
  return hadamard(toeplitz(v.kernel),
                  with_features(feature::exponential{}, v.o.q * transpose(v.o.k) * 0.5)) *
         v.o.x;
};

/// A mask of a user's own: the running sum of what each token weighs, by the library's expressions.
/// Its transposed product is the whole sequence's sum less the running sum, plus the token's own.
template <Floating V, Backend B, bool Transposed>
struct weighted_sum {
  using value_type = V;
  using backend = B;
  tensor<V, 2, B> kernel;

  [[nodiscard]] tensor<V, 4, B> multiply(const tensor<V, 4, B>& z,
                                         const sequence_layout& layout) const {
    return eval(packed(layout, toeplitz(kernel)) * z);
  }
  [[nodiscard]] tensor<V, 4, B> multiply_transposed(
      const tensor<V, 4, B>& z, const sequence_layout& layout) const requires Transposed {
    const auto e = packed(layout, toeplitz(kernel)) * tensor<V, 4, B>::zeros(z.extents());
    auto g = zeros_like(e);
    g.mixer.kernel = {};
    vjp_into(e, z, g, carry_gradient<V, B>{});
    return g.x;
  }
  [[nodiscard]] index_t heads() const { return kernel.extent(0); }
  [[nodiscard]] static causality causal() { return causality::causal; }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("weights", self.kernel, operand::parameter);
  }
  void multiply_vjp(const tensor<V, 4, B>& z, const tensor<V, 4, B>& dy,
                    const sequence_layout& layout, weighted_sum& gradients) const {
    const auto e = packed(layout, toeplitz(kernel)) * z;
    auto g = zeros_like(e);
    g.mixer.kernel = gradients.kernel;
    g.x = {};
    vjp_into(e, dy, g, carry_gradient<V, B>{});
  }
};
template <bool Transposed, Floating V, Backend B>
weighted_sum<V, B, Transposed> weighted(const tensor<V, 2, B>& kernel) {
  return {kernel};
}
const auto own_mask = [](const auto& v) {
  return hadamard(weighted<true>(v.kernel), v.o.q * transpose(v.o.k) * 0.5) * v.o.x;
};
const auto own_mask_of_features = [](const auto& v) {
  return hadamard(weighted<false>(v.kernel),
                  with_features(feature::elu_plus_one{}, v.o.q * transpose(v.o.k) * 0.5)) *
         v.o.x;
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/algorithms: Gram matrices multiply by associativity and in tiles",
                   "[cuda][algorithms]", float, double, bf16) {
  agree_by<TestType>("gram", gram_product, 1, alg::associative{}, alg::quadratic{},
                     alg::automatic{});
  agree_by<TestType>("gram of features", mapped_gram, 1, alg::associative{}, alg::quadratic{});
}

TEMPLATE_TEST_CASE("cuda/algorithms: masked products in tiles are the CPU's", "[cuda][algorithms]",
                   float, double, bf16) {
  agree_by<TestType>("linear attention", linear_product, 1, alg::quadratic{}, alg::automatic{});
  agree_by<TestType>("retention", retention_product, 1, alg::quadratic{}, alg::automatic{});
  agree_by<TestType>("gated", gated_product, 1, alg::quadratic{}, alg::automatic{});
  agree_by<TestType>("window", window_product, 1, alg::quadratic{}, alg::automatic{});
  agree_by<TestType>("Toeplitz", toeplitz_product, 1, alg::quadratic{}, alg::automatic{});
}

TEMPLATE_TEST_CASE("cuda/algorithms: Toeplitz masks multiply through transforms",
                   "[cuda][algorithms]", float, double, bf16) {
  const double looser = transforms<TestType>;
  agree_by<TestType>("Toeplitz", toeplitz_product, looser, alg::structured{});
  agree_by<TestType>("Toeplitz of features", toeplitz_of_features, looser, alg::structured{});
}

TEMPLATE_TEST_CASE("cuda/algorithms: masks by themselves multiply in tiles and through transforms",
                   "[cuda][algorithms]", float, double, bf16) {
  using V = TestType;
  const auto ones = [](const auto& v) {
    using X = std::remove_cvref_t<decltype(v.o.x)>;
    return causal_mask<typename X::value_type, typename X::backend>{} * v.o.x;
  };
  const auto band = [](const auto& v) {
    using X = std::remove_cvref_t<decltype(v.o.x)>;
    return window_mask<typename X::value_type, typename X::backend>{7} * v.o.x;
  };
  const auto powers = [](const auto& v) { return decay(v.own_gamma) * v.o.x; };
  const auto decays = [](const auto& v) { return semiseparable(v.own_log_a, v.own_log_a) * v.o.x; };
  const auto kernel = [](const auto& v) { return toeplitz(v.own_kernel) * v.o.x; };
  agree_by<V>("causal", ones, 1, alg::quadratic{}, alg::automatic{});
  agree_by<V>("window", band, 1, alg::quadratic{}, alg::automatic{});
  agree_by<V>("decay", powers, 1, alg::quadratic{}, alg::automatic{});
  agree_by<V>("semiseparable", decays, 1, alg::quadratic{}, alg::automatic{});
  agree_by<V>("Toeplitz", kernel, 1, alg::quadratic{}, alg::automatic{});
  agree_by<V>("Toeplitz", kernel, transforms<V>, alg::structured{});
}

TEMPLATE_TEST_CASE("cuda/algorithms: a mask of one's own multiplies on the device",
                   "[cuda][algorithms]", float, double, bf16) {
  const double looser = transforms<TestType>;
  agree_by<TestType>("own mask", own_mask, looser, alg::structured{}, alg::quadratic{},
                     alg::automatic{});
  agree_by<TestType>("own mask of features", own_mask_of_features, looser, alg::structured{});
}

TEMPLATE_TEST_CASE("cuda/algorithms: a mask of one's own multiplies by itself",
                   "[cuda][algorithms]", float, double) {
  const auto alone = [](const auto& v) { return mask_node(weighted<false>(v.kernel)) * v.o.x; };
  agree_by<TestType>("own mask", alone, transforms<TestType>, alg::structured{}, alg::quadratic{},
                     alg::automatic{});
}

TEMPLATE_TEST_CASE("cuda/algorithms: wrappers stand around products in tiles and transforms",
                   "[cuda][algorithms]", float, double, bf16) {
  const double looser = transforms<TestType>;
  const auto normalized = [](const auto& v) {
    return normalize_rows(hadamard(window(11), with_features(feature::elu_plus_one{},
                                                             v.o.q * transpose(v.o.k) * 0.5))) *
           v.o.x;
  };
  const auto skip = [](const auto& v) {
    return (hadamard(toeplitz(v.kernel), v.o.q * transpose(v.o.k) * 0.5) + diagonal(v.o.d)) * v.o.x;
  };
  const auto gram_skip = [](const auto& v) {
    return (v.o.q * transpose(v.o.k) * 0.5 + diagonal(v.o.d)) * v.o.x;
  };
  for (const mixer_sizes& s : {odd_sizes, groups}) {  // one token's row is 1 whatever q and k are
    agree<TestType>("normalised window", s, normalized, alg::quadratic{});
    agree<TestType>("normalised window", s, normalized, alg::automatic{});
  }
  agree_by<TestType>("Toeplitz + diagonal", skip, looser, alg::structured{}, alg::quadratic{},
                     alg::automatic{});
  agree_by<TestType>("gram + diagonal", gram_skip, looser, alg::associative{}, alg::quadratic{});
}

TEST_CASE("cuda/algorithms: a decay below zero gives NaN, and in its head only",
          "[cuda][algorithms]") {
  both_operands<float> both({.query_heads = 4, .mask_heads = 4});
  both.device.o.gamma = to<cuda>(cast<float>(uniform<double, 1>({4}, 0.8, 0.9, 51)));
  both.device.o.gamma.slice(0, 2, 3).fill(-0.5f);
  const auto e = retention_product(both.device);
  const auto check = [](const tensor<float, 4>& y) {
    bool all = true, others = true;
    for (index_t t = 1; t < y.extent(1); ++t) {
      for (index_t h = 0; h < 4; ++h)
        (h == 2 ? all : others) &= std::isnan(y(0, t, h, 0)) == (h == 2);
    }
    CHECK(all);
    CHECK(others);
  };
  check(to<cpu>(eval(e)));
  check(to<cpu>(eval(e.with(alg::quadratic{}))));
}

TEST_CASE("cuda/algorithms: automatic takes tiles for few tokens and transforms for many",
          "[cuda][algorithms]") {
  const both_operands<float> both({.keys = 64, .features = 64});
  const auto bare = toeplitz(both.device.kernel);
  CHECK(choose_algorithm(bare, 128, 64) == "quadratic");
  CHECK(choose_algorithm(bare, 4096, 64) == "structured");
  const auto masked = toeplitz_product(both.device).mixer;
  CHECK(choose_algorithm(masked, 4096, 64) == "quadratic");
  CHECK(choose_algorithm(masked, 100000, 64) == "structured");
}

TEST_CASE("cuda/algorithms: automatic is the default of every mixer with a state",
          "[cuda][algorithms]") {
  for_each_mixer([](const char* name, auto make, const mixer_sizes& s) {
    const auto e = make(on_device<float>(random_operands(s)));
    INFO(name);
    CHECK((everything(e.with(alg::automatic{})).values == everything(e).values));
  });
}

TEST_CASE("cuda/algorithms: sequences of very different lengths get transforms of their own",
          "[cuda][algorithms]") {
  const mixer_sizes s{.batch = 1, .length = 1100, .heads = 2, .mask_heads = 2, .features = 5};
  const both_operands<double> both(s);
  const auto layout = sequence_layout::from_lengths({900, 1, 33, 0, 65, 100, 1});
  const auto make = [](const auto& v) { return toeplitz(v.own_kernel) * v.o.x; };
  const results want = everything(make(both.host).packed(layout).with(alg::quadratic{}));
  const results got = everything(make(both.device).packed(layout).with(alg::structured{}));
  for (std::size_t i = 0; i < got.values.size(); ++i) {
    INFO(got.names[i]);
    CHECK(relative_error(got.values[i], want.values[i]) <= 1e-12);
  }
}

TEST_CASE("cuda/algorithms: gradients are added to", "[cuda][algorithms]") {
  const both_operands<double> both(odd_sizes);
  const auto added = [](const std::string& name, const auto& e) {
    const results zero = everything(e), one = everything(e, 1);
    for (std::size_t i = 1; i < zero.values.size(); ++i) {
      numbers from = one.values[i];
      for (double& v : from)
        v -= 1;
      INFO(name << ": " << zero.names[i]);
      CHECK(relative_error(from, zero.values[i]) <= 1e-12);
    }
  };
  added("gram", gram_product(both.device));
  added("gated", gated_product(both.device).with(alg::quadratic{}));
  added("Toeplitz", toeplitz_product(both.device).with(alg::structured{}));
  added("own mask", own_mask(both.device));
}

TEST_CASE("cuda/algorithms: repeats have the same bits", "[cuda][algorithms]") {
  const both_operands<bf16> both({.batch = 2,
                                  .length = 300,
                                  .heads = 2,
                                  .query_heads = 8,
                                  .key_heads = 2,
                                  .mask_heads = 8,
                                  .keys = 64,
                                  .features = 64});
  const auto repeats = [](const std::string& name, const auto& e) {
    const results first = everything(e);
    bool same = true;
    for (int i = 0; i < 20; ++i)
      same = same && everything(e).values == first.values;
    INFO(name);
    CHECK(same);
  };
  repeats("gram", gram_product(both.device));
  repeats("gram in tiles", gram_product(both.device).with(alg::quadratic{}));
  repeats("retention in tiles", retention_product(both.device).with(alg::quadratic{}));
  repeats("gated in tiles", gated_product(both.device).with(alg::quadratic{}));
  repeats("window", window_product(both.device));
  repeats("Toeplitz in tiles", toeplitz_product(both.device).with(alg::quadratic{}));
  repeats("Toeplitz", toeplitz_product(both.device).with(alg::structured{}));
  repeats("own mask", own_mask(both.device));
}

TEST_CASE("cuda/algorithms: materialize gives a device mixer's matrix on the host",
          "[cuda][algorithms]") {
  const both_operands<double> both({.batch = 2, .length = 6, .mask_heads = 2});
  const auto same = [&](auto make) {
    const tensor<double, 4> got = materialize(make(both.device).mixer);
    CHECK((numbers_of(got) == numbers_of(materialize(make(both.host).mixer))));
  };
  same(gram_product);
  same(window_product);
  same(toeplitz_product);
  const tensor<double, 4> own = materialize(own_mask(both.device).mixer);
  CHECK(relative_error(numbers_of(own), numbers_of(materialize(own_mask(both.host).mixer))) <
        1e-13);
}

TEST_CASE("cuda/algorithms: without a token there is nothing to do", "[cuda][algorithms]") {
  const auto q = tensor<float, 4, cuda>::zeros(2, 0, 3, 4);
  const auto x = tensor<float, 4, cuda>::zeros(2, 0, 3, 5);
  const auto kernel = tensor<float, 2, cuda>::zeros(3, 1);
  CHECK(eval((q * transpose(q)) * x).size() == 0);
  CHECK(eval(hadamard(window(3), q * transpose(q)) * x).size() == 0);
  CHECK(eval(hadamard(toeplitz(kernel), q * transpose(q)) * x).size() == 0);
  CHECK(eval((hadamard(toeplitz(kernel), q * transpose(q)) * x).with(alg::quadratic{})).size() ==
        0);
}
