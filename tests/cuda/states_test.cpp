#include "cuda/mixer_operands.hpp"
#include "support/catch.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

// States on the device: one for every kind of mixer.

using namespace ssm;
using namespace ssm_test;

namespace {

/// The product whose per-token operands are f of e's.
template <class E, class F>
E with_tokens(E e, F f) {
  E::operands(e, [&](std::string_view, auto& t, operand kind) {
    if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
      if (kind == operand::per_token && t) t = f(t);
    }
  });
  e.mixer.layout = {};
  return e;
}
/// Tokens [begin, end) of every sequence.
template <class E>
E tokens_of(const E& e, index_t begin, index_t end) {
  return with_tokens(e, [&](const auto& t) { return t.slice(1, begin, end); });
}
/// Sequence i alone.
template <class E>
E sequence_of(const E& e, index_t i) {
  return with_tokens(e, [&](const auto& t) { return t.slice(0, i, i + 1); });
}
/// Tokens [begin[i], begin[i] + count[i]) of every sequence i, packed.
template <class E>
E ragged_tokens_of(const E& e, const std::vector<index_t>& begin,
                   const std::vector<index_t>& count) {
  const sequence_layout layout = sequence_layout::from_lengths(count);
  return with_tokens(
             e,
             [&](const auto& t) {
               auto extents = t.extents();
               extents[0] = 1;
               extents[1] = layout.tokens();
               const std::remove_cvref_t<decltype(t)> packed(extents);
               for (index_t i = 0; i < layout.sequences(); ++i) {
                 const index_t first = begin[static_cast<std::size_t>(i)];
                 packed.slice(1, layout.begin(i), layout.end(i))
                     .copy_from(t.slice(0, i, i + 1).slice(1, first, first + layout.length(i)));
               }
               return packed;
             })
      .packed(layout);
}

/// Advances over the tokens [begin, end), pieces as long as the cycle says.
template <class E, class State>
numbers advance_in(const E& e, State& state, std::initializer_list<index_t> cycle,
                   index_t begin = 0, index_t end = -1) {
  if (end < 0) end = e.x.extent(1);
  const tensor<typename E::value_type, 4, cuda> y(e.extents());
  std::size_t i = 0;
  for (index_t t = begin; t < end;) {
    const index_t n = std::min(end - t, cycle.begin()[i++ % cycle.size()]);
    y.slice(1, t, t + n).copy_from(advance(tokens_of(e, t, t + n), state));
    t += n;
  }
  return numbers_of(y.slice(1, begin, end));
}

template <Floating T, class Make>
auto on_device_of(const mixer_sizes& s, const Make& make) {
  return make(on_device<T>(random_operands(s)));
}

/// bf16: twice the error of rounding the operands and the result.
template <Floating T, class Make>
double bound_of(const mixer_sizes& s, const Make& make, const tensor<double, 4>& want) {
  if (std::same_as<T, double>) return 1e-10;
  if (std::same_as<T, float>) return 1e-5;
  return 2 *
         relative_error(numbers_of(cast<bf16>(want)), numbers_of(eval(make(random_operands(s)))));
}

}  // namespace

TEMPLATE_TEST_CASE("cuda/states: pieces of any size give what one pass on the CPU gives",
                   "[cuda][states]", float, double, bf16) {
  for_each_mixer([](const std::string& name, const auto& make, const mixer_sizes& s) {
    const auto want = eval(make(rounded<TestType>(random_operands(s))));
    const double bound = bound_of<TestType>(s, make, want);
    const auto e = on_device_of<TestType>(s, make);
    const auto check = [&](const char* split, std::initializer_list<index_t> cycle) {
      auto state = make_state(e, s.batch);
      const double error = relative_error(advance_in(e, state, cycle), numbers_of(want));
      INFO(name << ", keys of " << s.keys << ", " << sizeof(TestType) << " bytes, split " << split);
      CHECK(error <= bound);
    };
    check("1", {1});
    check("3 + 5 + 1", {3, 5, 1});
    check("16", {16});
    check("17 + 73", {17, 73});
    check("90", {90});
    check("2 + 40", {2, 40});
  });
}

TEMPLATE_TEST_CASE("cuda/states: steps of up to 16 tokens have the same bits in any split",
                   "[cuda][states]", float, double, bf16) {
  for_each_mixer([](const std::string& name, const auto& make, const mixer_sizes& s) {
    INFO(name << ", keys of " << s.keys << ", " << sizeof(TestType) << " bytes");
    const auto e = on_device_of<TestType>(s, make);
    const index_t sequences = e.x.extent(0), length = e.x.extent(1);
    auto one = make_state(e, sequences), some = make_state(e, sequences),
         many = make_state(e, sequences), ragged = make_state(e, sequences);
    const numbers want = advance_in(e, one, {1});
    CHECK(advance_in(e, some, {3, 5, 1, 16, 2}) == want);
    CHECK(advance_in(e, many, {16}) == want);
    CHECK(some == one);
    CHECK(many == one);

    // Alone, and in a batch whose sequences take different numbers of tokens.
    auto alone = make_state(e, 1);
    const numbers second = advance_in(sequence_of(e, 1), alone, {7});
    const auto each = static_cast<std::ptrdiff_t>(second.size());
    CHECK(std::equal(second.begin(), second.end(), want.begin() + each));

    const tensor<TestType, 4, cuda> y(e.extents());
    std::vector<index_t> at(static_cast<std::size_t>(sequences), 0), count = at;
    constexpr std::array<index_t, 7> steps{1, 16, 0, 5, 3, 7, 2};
    std::size_t next = 0;
    while (std::ranges::any_of(at, [&](index_t p) { return p < length; })) {
      for (std::size_t i = 0; i < at.size(); ++i)
        count[i] = std::min(steps[next++ % steps.size()], length - at[i]);
      const auto rows = advance(ragged_tokens_of(e, at, count), ragged);
      index_t row = 0;
      for (std::size_t i = 0; i < at.size(); ++i) {
        const auto k = static_cast<index_t>(i);
        y.slice(0, k, k + 1)
            .slice(1, at[i], at[i] + count[i])
            .copy_from(rows.slice(1, row, row + count[i]));
        row += count[i];
        at[i] += count[i];
      }
    }
    CHECK(numbers_of(y) == want);
    CHECK(ragged == one);
  });
}

TEMPLATE_TEST_CASE("cuda/states: what is rolled back has never been", "[cuda][states]", float,
                   bf16) {
  for_each_mixer([](const std::string& name, const auto& make, const mixer_sizes& s) {
    INFO(name << ", keys of " << s.keys << ", " << sizeof(TestType) << " bytes");
    const auto e = on_device_of<TestType>(s, make);
    const index_t sequences = e.x.extent(0), length = e.x.extent(1);
    auto state = make_state(e, sequences, 5);
    advance_in(e, state, {4}, 0, 71);
    const auto before = state;
    advance_in(e, state, {3, 1}, 75, 80);  // other tokens than come later
    CHECK_FALSE(state == before);
    state.rollback(5);
    CHECK(state == before);
    CHECK(state.position(0) == 71);
    CHECK(state.can_roll_back(0) == 0);
    CHECK_THROWS_AS(state.rollback(1), value_error);
    auto other = before;
    CHECK(advance_in(e, state, {16}, 71, length) == advance_in(e, other, {2}, 71, length));
    CHECK(state == other);

    // Every sequence by another number: each goes on from its own position.
    const std::vector<index_t> counts{0, 3, 5};
    state.rollback(counts);
    const auto redone =
        advance(ragged_tokens_of(e, {length, length - 3, length - 5}, counts), state);
    CHECK(redone.size() > 0);
    CHECK(state == other);
  });
}

TEMPLATE_TEST_CASE("cuda/states: a long piece can be rolled back too", "[cuda][states]", float,
                   bf16) {
  for_each_mixer([](const std::string& name, const auto& make, const mixer_sizes& s) {
    INFO(name << ", keys of " << s.keys << ", " << sizeof(TestType) << " bytes");
    const auto e = on_device_of<TestType>(s, make);
    const index_t sequences = e.x.extent(0);
    auto state = make_state(e, sequences, 4), reference = make_state(e, sequences);
    advance_in(e, state, {10, 40}, 0, 50);
    state.rollback(3);
    advance_in(e, reference, {10, 36, 1}, 0, 47);
    CHECK(state == reference);
    CHECK(advance_in(e, state, {5}, 47, 80) == advance_in(e, reference, {16}, 47, 80));
  });
}

TEMPLATE_TEST_CASE("cuda/states: a copy is a fork", "[cuda][states]", float, bf16) {
  for_each_mixer([](const std::string& name, const auto& make, const mixer_sizes& s) {
    INFO(name << ", keys of " << s.keys << ", " << sizeof(TestType) << " bytes");
    const auto e = on_device_of<TestType>(s, make);
    auto state = make_state(e, e.x.extent(0), 2);
    advance_in(e, state, {7}, 0, 60);
    const auto kept = state;
    auto fork = state;
    CHECK(fork == state);
    const numbers on = advance_in(e, fork, {16}, 60, 90);
    CHECK_FALSE(fork == state);
    CHECK(state == kept);
    CHECK(advance_in(e, state, {1}, 60, 90) == on);
    CHECK(state == fork);
    fork = kept;
    CHECK(fork == kept);
    CHECK(fork.position(2) == 60);
  });
}

TEST_CASE("cuda/states: a cache with reserved room has the bits of one that grows",
          "[cuda][states]") {
  const auto e = on_device_of<float>({}, causal_attention);
  auto grown = make_state(e, 3), reserved = make_state(e, 3);
  reserved.reserve(90);
  CHECK(advance_in(e, reserved, {11}) == advance_in(e, grown, {11}));
  CHECK(reserved == grown);
  const cuda::context ctx = cuda::current();
  ctx.synchronize();
  auto longer = make_state(e, 3);
  longer.reserve(1000);
  const auto before = ctx.memory().in_use;
  for (index_t t = 0; t < 1000; t += 10)
    (void)advance(tokens_of(e, 0, 10), longer);
  ctx.synchronize();
  CHECK(ctx.memory().in_use == before);
  CHECK(longer.position(1) == 1000);
}

TEST_CASE("cuda/states: what does not fit the state is refused", "[cuda][states]") {
  const auto o = on_device<float>(random_operands({}));
  const auto e = causal_attention(o);
  auto state = make_state(e, 3);
  CHECK_THROWS_AS(advance(sequence_of(e, 0), state), shape_error);
  CHECK_THROWS_AS(advance(window_attention(o), state), shape_error);
  CHECK_THROWS_AS(advance(softmax(o.q * transpose(o.k)) * o.x, state), value_error);
  CHECK(state == make_state(e, 3));
  auto matrix = make_state(retention(o), 2);
  CHECK_THROWS_AS(advance(retention(o), matrix), shape_error);
}
