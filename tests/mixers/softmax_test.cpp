#include "mixers/recurrent_checks.hpp"
#include <ssmlib/lower/kv_state.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

struct softmax_case {
  index_t q_heads = 2, k_heads = 2, x_heads = 2, keys = 16, features = 16;
  bool is_causal = true;
  index_t window = 0;
  double scale = 0.3;

  template <class T>
  auto operator()(index_t batch, index_t length) const {
    const auto q = normal<T, 4>({batch, length, q_heads, keys}, 1, 1);
    const auto k = normal<T, 4>({batch, length, k_heads, keys}, 1, 2);
    return over(q * transpose(k), normal<T, 4>({batch, length, x_heads, features}, 1, 3));
  }
  template <class T>
  auto over(const gram<T>& logits, const tensor<T, 4>& x) const {
    if (window > 0) return softmax(logits * scale + ssm::window(window)) * x;
    return (is_causal ? softmax(logits * scale + causal) : softmax(logits * scale)) * x;
  }
};

constexpr softmax_case plain{};
constexpr softmax_case full{.is_causal = false};
constexpr softmax_case windowed{.keys = 8, .features = 24, .window = 10};
constexpr softmax_case wide_window{.keys = 5, .features = 7, .window = 97};
constexpr softmax_case grouped{.q_heads = 6, .k_heads = 2, .x_heads = 2, .keys = 13, .features = 9};
constexpr softmax_case one_key_head{.q_heads = 5, .k_heads = 1, .x_heads = 1, .features = 3};
constexpr softmax_case one_head{.q_heads = 1, .k_heads = 1, .x_heads = 1, .keys = 64};
// Neither head count of keys and values divides the other; queries shared by heads.
constexpr softmax_case crossed{.q_heads = 6, .k_heads = 2, .x_heads = 3, .keys = 4, .features = 5};
constexpr softmax_case shared_queries{.q_heads = 1, .k_heads = 4, .x_heads = 2, .is_causal = false};
constexpr softmax_case cases[] = {plain,        full,     windowed, wide_window,   grouped,
                                  one_key_head, one_head, crossed,  shared_queries};

/// Central differences of sum(dy * dense() X) along a random direction of each operand, in double.
template <class Alg>
void check_gradient(const softmax_case& make, index_t batch, index_t length, Alg algorithm) {
  CAPTURE(batch, length, algorithm.name, make.q_heads, make.k_heads, make.x_heads, make.window);
  const auto e = make.operator()<double>(batch, length).with(algorithm);
  using E = std::remove_cvref_t<decltype(e)>;
  const auto dy = normal<double, 4>(e.extents(), 1, 902);
  const auto g = vjp(e, dy);
  auto probe = e;
  index_t operand_index = 0;
  E::operands(probe, [&](std::string_view name, tensor<double, 4>& value, operand) {
    CAPTURE(std::string(name));
    tensor<double, 4> gradient;
    index_t other = 0;
    E::operands(g, [&](std::string_view, const tensor<double, 4>& t, operand) {
      if (other++ == operand_index) gradient = t;
    });
    ++operand_index;
    const auto saved = value;
    const auto direction = normal<double, 4>(value.extents(), 1, 904);
    const auto loss_at = [&](double step) {
      value = saved.clone();
      for (index_t i = 0; i < value.size(); ++i)
        value.data()[i] += step * direction.data()[i];
      const auto y = dense_product(probe);
      double sum = 0;
      for (index_t i = 0; i < y.size(); ++i)
        sum += y.data()[i] * dy.data()[i];
      return sum;
    };
    const double slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
    value = saved;
    double along = 0, size = 0;
    for (index_t i = 0; i < direction.size(); ++i) {
      along += direction.data()[i] * gradient.data()[i];
      size += gradient.data()[i] * gradient.data()[i];
    }
    // Truncation leaves 1e-10 of the third derivative, rounding 1e-11 of the loss.
    CHECK(std::abs(slope - along) <= 1e-7 * (1e-2 + std::sqrt(size)));
  });
}

template <class T, class F>
void for_gradients(const mix<softmax_mixer<T>, 4, alg::tiled>& a,
                   const mix<softmax_mixer<T>, 4, alg::tiled>& b, F f) {
  f(a.mixer.logits.q, b.mixer.logits.q);
  f(a.mixer.logits.k, b.mixer.logits.k);
  f(a.x, b.x);
}

/// Advances by the given steps (repeated to the end) and compares each row with one pass.
template <class T>
void check_steps(const softmax_case& make, index_t length, std::vector<index_t> steps,
                 index_t max_rollback = 0, int threads = 2) {
  CAPTURE(length, steps, make.window, threads);
  const cpu::context ctx(threads);
  const auto e = make.operator()<T>(1, length);
  const auto whole = eval(e, ctx);
  auto state = make_state(e, 1, max_rollback);
  bool same = true;
  for (index_t begin = 0, n = 0; begin < length; ++n) {
    const index_t end = std::min(length, begin + steps[static_cast<std::size_t>(n) % steps.size()]);
    const auto y = advance(tokens_of(e, begin, end), state, ctx);
    same = same && same_bits(y, whole.slice(1, begin, end));
    begin = end;
  }
  CHECK(same);
  CHECK(state.position(0) == length);
}

}  // namespace

TEST_CASE("mixers/softmax: every algorithm multiplies by dense()", "[mixers][softmax]") {
  const index_t length = GENERATE(1, 2, 7, 95, 96, 97, 211);
  for (const softmax_case& make : cases) {
    CAPTURE(make.q_heads, make.k_heads, make.x_heads, make.window);
    check_forward(make, 2, length, alg::tiled{});
    check_forward(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/softmax: rows over many segments of keys are those of quadratic",
          "[mixers][softmax]") {
  const index_t length = GENERATE(1536, 1537, 3500);
  for (const softmax_case& make :
       {one_head, softmax_case{.q_heads = 2, .k_heads = 1, .x_heads = 1, .window = 1600},
        softmax_case{.is_causal = false}}) {
    CAPTURE(length, make.window);
    const auto e = make.operator()<double>(1, length);
    CHECK(relative_error(eval(e), eval(e.with(alg::quadratic{}))) < 1e-12);
  }
}

TEST_CASE("mixers/softmax: gradients are those of finite differences of dense()",
          "[mixers][softmax]") {
  const index_t length = GENERATE(1, 5, 53);
  for (const softmax_case& make : cases) {
    check_gradient(make, 2, length, alg::tiled{});
    check_gradient(make, 2, length, alg::quadratic{});
  }
}

TEST_CASE("mixers/softmax: tiled gradients are those of quadratic", "[mixers][softmax]") {
  const index_t length = GENERATE(95, 96, 97, 300);
  for (const softmax_case& make : cases) {
    CAPTURE(length, make.q_heads, make.k_heads, make.x_heads, make.window);
    const auto e = make.operator()<double>(1, length);
    const auto dy = normal<double, 4>(e.extents(), 1, 5);
    const auto tiled = vjp(e, dy);
    const auto quadratic = vjp(e.with(alg::quadratic{}), dy);
    CHECK(relative_error(tiled.mixer.logits.q, quadratic.mixer.logits.q) < 1e-12);
    CHECK(relative_error(tiled.mixer.logits.k, quadratic.mixer.logits.k) < 1e-12);
    CHECK(relative_error(tiled.x, quadratic.x) < 1e-12);
    const auto single = make.operator()<float>(1, length);
    const auto exact = vjp(make.over(cast<double>(single.mixer.logits.q) *
                                         transpose(cast<double>(single.mixer.logits.k)),
                                     cast<double>(single.x)),
                           cast<double>(cast<float>(dy)));
    const auto narrow = vjp(single, cast<float>(dy));
    CHECK(relative_error(narrow.mixer.logits.q, exact.mixer.logits.q) < 1e-5);
    CHECK(relative_error(narrow.mixer.logits.k, exact.mixer.logits.k) < 1e-5);
    CHECK(relative_error(narrow.x, exact.x) < 1e-5);
  }
}

TEST_CASE("mixers/softmax: gradients are added to, and absent ones skipped", "[mixers][softmax]") {
  const softmax_case make = GENERATE(plain, one_key_head, shared_queries);
  const auto e = make.operator()<double>(2, 101);
  const auto dy = normal<double, 4>(e.extents(), 1, 5);
  const auto expected = vjp(e, dy);
  auto g = zeros_like(e);
  g.mixer.logits.q.fill(1.0);
  g.mixer.logits.k = {};
  vjp_into(e, dy, g, carry_gradient<double>{});
  auto shifted = expected.mixer.logits.q.clone();
  for (index_t i = 0; i < shifted.size(); ++i)
    shifted.data()[i] += 1.0;
  CHECK(relative_error(g.mixer.logits.q, shifted) < 1e-14);
  CHECK(same_bits(g.x, expected.x));
}

TEST_CASE("mixers/softmax: packed sequences have the bits that each has alone",
          "[mixers][softmax]") {
  const auto layout = sequence_layout::from_lengths({97, 0, 1, 230, 5});
  for (const softmax_case& make : cases) {
    CAPTURE(make.q_heads, make.k_heads, make.window);
    const auto e = make.operator()<float>(1, layout.tokens());
    const auto together = e.packed(layout);
    const auto dy = normal<float, 4>(e.extents(), 1, 5);
    const auto y = eval(together);
    const auto g = vjp(together, dy);
    for (index_t i = 0; i < layout.sequences(); ++i) {
      const index_t begin = layout.begin(i), end = layout.end(i);
      if (begin == end) continue;
      const auto alone = tokens_of(e, begin, end);
      CHECK(same_bits(y.slice(1, begin, end), eval(alone)));
      for_gradients(vjp(alone, dy.slice(1, begin, end)), g,
                    [&](const tensor<float, 4>& own, const tensor<float, 4>& all) {
                      CHECK(same_bits(own, all.slice(1, begin, end)));
                    });
    }
  }
}

TEST_CASE("mixers/softmax: packed dense() is what every algorithm multiplies by",
          "[mixers][softmax]") {
  const auto layout = sequence_layout::from_lengths({3, 0, 110, 1});
  for (const softmax_case& make : cases) {
    const auto e = make.operator()<double>(1, layout.tokens()).packed(layout);
    const auto expected = dense_product(e);
    CHECK(relative_error(eval(e), expected) < 1e-12);
    CHECK(relative_error(eval(e.with(alg::quadratic{})), expected) < 1e-12);
  }
}

TEST_CASE("mixers/softmax: one thread and two give the same bits", "[mixers][softmax][threads]") {
  for (const softmax_case& make : {plain, one_head, one_key_head, windowed}) {
    check_threads(make, 1, 500, alg::tiled{});
    check_threads(make, 2, 130, alg::quadratic{});
  }
}

TEST_CASE("mixers/softmax: later tokens leave earlier rows as they are, to the bit",
          "[mixers][softmax]") {
  const softmax_case make = GENERATE(plain, windowed, grouped);
  const auto e = make.operator()<float>(1, 200);
  const auto before = eval(e);
  const index_t changed = 133;
  e.mixer.logits.q.slice(1, changed, 200).fill(3.0f);
  e.mixer.logits.k.slice(1, changed, 200).fill(-50.0f);
  e.x.slice(1, changed, 200).fill(1e30f);
  CHECK(same_bits(eval(e).slice(1, 0, changed), before.slice(1, 0, changed)));
}

TEST_CASE("mixers/softmax: operands may be parts of one projection", "[mixers][softmax]") {
  const index_t b = 2, n = 70, h = 3, d = 8;
  const auto all = normal<double, 3>({b, n, 3 * h * d}, 1, 1);
  const auto part = [&](index_t i) {
    return all.slice(2, i * h * d, (i + 1) * h * d).reshape(b, n, h, d);
  };
  const auto e = softmax(part(0) * transpose(part(1)) + causal) * part(2);
  const auto copies =
      softmax(part(0).clone() * transpose(part(1).clone()) + causal) * part(2).clone();
  const auto dy = normal<double, 4>(e.extents(), 1, 2);
  CHECK(same_bits(eval(e), eval(copies)));
  const auto gradient = tensor<double, 3>::zeros(all.extents());
  auto g = e;
  decltype(g)::operands(
      g, [&](std::string_view, auto& t, operand) { t = t.rebind(gradient.storage()); });
  vjp_into(e, dy, g, carry_gradient<double>{});
  for_gradients(g, vjp(copies, dy), [](const auto& a, const auto& b2) { CHECK(same_bits(a, b2)); });
}

TEST_CASE("mixers/softmax: logits far from zero give finite, right results", "[mixers][softmax]") {
  const double scale = GENERATE(1e-3, 30.0, 1e4);
  const softmax_case make{.scale = scale};
  const auto e = make.operator()<double>(1, 120);
  CHECK(relative_error(eval(e), dense_product(e)) < 1e-10);
  const auto single = make.operator()<float>(1, 120);
  const auto y = eval(single);
  const auto g = vjp(single, y);
  for (const tensor<float, 4>& t : {y, g.mixer.logits.q, g.mixer.logits.k, g.x}) {
    bool finite = true;
    for (index_t i = 0; i < t.size(); ++i)
      finite = finite && std::isfinite(t.data()[i]);
    CHECK(finite);
  }
}

TEST_CASE("mixers/softmax: long attention needs memory linear in the length", "[mixers][softmax]") {
  const index_t length = 8192;
  const softmax_case make{.q_heads = 1, .k_heads = 1, .x_heads = 1, .keys = 8, .features = 8};
  const auto e = make.operator()<float>(1, length);
  auto& pool = cpu_memory_pool::instance();
  const cpu::context one(1);
  pool.reset_peak();
  const std::size_t before = pool.stats().in_use;
  (void)vjp(e, eval(e, one), one);
  const std::size_t bytes = pool.stats().peak - before;
  CAPTURE(bytes);
  CHECK(bytes < 3000 * static_cast<std::size_t>(length));  // a T x T matrix: 32768 a token
}

TEST_CASE("mixers/softmax: any split into steps has the bits of one pass", "[mixers][softmax]") {
  check_steps<float>(plain, 210, {1});
  check_steps<float>(grouped, 210, {5, 1, 16, 2});
  check_steps<float>(one_key_head, 110, {1, 2, 1, 3});
  for (const index_t step : {2, 3, 4})
    check_steps<float>(one_head, 110, {step});
  check_steps<double>(crossed, 210, {3, 100, 1});
  check_steps<float>(one_head, 3300, {3200, 1, 7, 16}, 0, 2);
  check_steps<float>(one_key_head, 1700, {1600, 1, 7}, 0, 1);
}

TEST_CASE("mixers/softmax: any split has the bits of one pass with a window", "[mixers][softmax]") {
  check_steps<float>(windowed, 400, {1});
  check_steps<float>(windowed, 700, {1, 250, 16, 3, 97});
  check_steps<double>(wide_window, 700, {1, 250, 16, 3, 97}, 3);
  check_steps<float>(softmax_case{.window = 1}, 300, {1, 120, 2}, 200);
}

TEST_CASE("mixers/softmax: sequences of a batch advance by different lengths",
          "[mixers][softmax]") {
  const softmax_case make = GENERATE(grouped, windowed);
  const auto a = make.operator()<float>(1, 130);
  const auto layout = sequence_layout::from_lengths({40, 0, 90});
  auto state = make_state(a, 3);
  const auto first = advance(a.packed(layout), state);
  const auto second = advance(a.packed(layout), state);
  auto alone = make_state(a, 1);
  (void)advance(tokens_of(a, 40, 130), alone);
  CHECK(same_bits(second.slice(1, 40, 130), advance(tokens_of(a, 40, 130), alone)));
  CHECK(same_bits(first.slice(1, 0, 40), eval(tokens_of(a, 0, 40))));
  CHECK(state.position(0) == 80);
  CHECK(state.position(1) == 0);
  CHECK(state.position(2) == 180);
}

TEST_CASE("mixers/softmax: a copied state goes its own way", "[mixers][softmax]") {
  const softmax_case make = GENERATE(plain, windowed);
  const auto e = make.operator()<float>(1, 60);
  auto state = make_state(e, 1);
  (void)advance(tokens_of(e, 0, 50), state);
  auto fork = state;
  CHECK(fork == state);
  (void)advance(tokens_of(e, 0, 10), fork);
  CHECK_FALSE(fork == state);
  CHECK(same_bits(advance(tokens_of(e, 50, 60), state), eval(e).slice(1, 50, 60)));
}

TEST_CASE("mixers/softmax: rollback undoes the last tokens", "[mixers][softmax]") {
  const softmax_case make = GENERATE(plain, windowed, wide_window);
  const index_t rollback = GENERATE(1, 4, 150);
  CAPTURE(make.window, rollback);
  const auto e = make.operator()<float>(1, 600);
  auto state = make_state(e, 1, rollback);
  (void)advance(tokens_of(e, 0, 300), state);
  const auto before = state;
  (void)advance(tokens_of(e, 600 - rollback, 600), state);
  CHECK(state.can_roll_back(0) == rollback);
  state.rollback(rollback);
  CHECK(state == before);
  CHECK(same_bits(advance(tokens_of(e, 300, 420), state), eval(e).slice(1, 300, 420)));
}

TEST_CASE("mixers/softmax: rollback counts by sequence, and refuses more than was kept",
          "[mixers][softmax]") {
  const auto e = plain.operator()<float>(2, 20);
  auto state = make_state(e, 2, 3);
  (void)advance(e, state);
  CHECK_THROWS_WITH(state.rollback(4), contains("rollback(4)") && contains("max_rollback 3"));
  const index_t too_many[] = {1, 5};
  CHECK_THROWS_AS(state.rollback(too_many), value_error);
  CHECK(state.position(0) == 20);
  const index_t counts[] = {0, 2};
  state.rollback(counts);
  CHECK(state.position(0) == 20);
  CHECK(state.position(1) == 18);
  CHECK_THROWS_AS(state.rollback(2), value_error);
}

TEST_CASE("mixers/softmax: reserved steps allocate nothing", "[mixers][softmax]") {
  const cpu::context alone(1);  // two threads may or may not need their working memory at once
  const auto e = plain.operator()<float>(1, 300);
  auto state = make_state(e, 1);
  state.reserve(301);
  (void)advance(tokens_of(e, 0, 1), state, alone);
  const auto allocations = [] { return cpu_memory_pool::instance().stats().system_allocations; };
  const auto before = allocations();
  for (index_t t = 1; t < 300; ++t)
    (void)advance(tokens_of(e, t, t + 1), state, alone);
  CHECK(allocations() == before);
}

TEST_CASE("mixers/softmax: advance refuses what it cannot continue", "[mixers][softmax]") {
  const auto e = plain.operator()<float>(1, 5);
  auto state = make_state(e, 1);
  CHECK_THROWS_WITH(advance(full.operator()<float>(1, 5), state), contains("+ causal"));
  CHECK_THROWS_AS(advance(plain.operator()<float>(2, 5), state), shape_error);
  CHECK_THROWS_AS(advance(grouped.operator()<float>(1, 5), state), shape_error);
  CHECK_THROWS_WITH(advance(softmax_case{.window = 4}.operator()<float>(1, 5), state),
                    contains("with window 0"));
  CHECK(state.position(0) == 0);
}

TEST_CASE("mixers/softmax: a state in or out belongs to advance, and eval says so",
          "[mixers][softmax]") {
  const auto e = plain.operator()<float>(1, 5);
  tensor<float, 4> y(e.extents());
  const auto algorithm = [&](auto a) {
    CHECK_THROWS_WITH(eval_into(e.with(a), y, {y, {}, {}, 0, nullptr}), contains("advance()"));
  };
  algorithm(alg::tiled{});
  algorithm(alg::quadratic{});
}
