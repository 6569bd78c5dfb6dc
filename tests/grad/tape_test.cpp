#include "support/catch.hpp"
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/tensor/random.hpp>

using namespace ssm;

TEST_CASE("grad/tape: the gradient of a slice is that slice of the gradient", "[grad][tape]") {
  const auto x = uniform<double, 3>({1, 4, 6}, -1, 1, 1);
  tape<double> t;
  t.watch(x);
  const auto y = eval(x.slice(2, 0, 3) * x.slice(2, 3, 6), &t);
  t.gradient(y).fill(1);
  t.backward();
  const auto g = t.gradient(x);
  for (index_t i = 0; i < 4; ++i) {
    for (index_t c = 0; c < 3; ++c) {
      CHECK(g(0, i, c) == x(0, i, c + 3));
      CHECK(g(0, i, c + 3) == x(0, i, c));
    }
  }
}

TEST_CASE("grad/tape: a tensor that is used twice gets both gradients, over passes too",
          "[grad][tape]") {
  const auto x = uniform<double, 3>({1, 2, 2}, -1, 1, 2);
  tape<double> t;
  t.watch(x);
  for (int pass = 1; pass <= 2; ++pass) {
    const auto y = eval(x * x + x, &t);
    t.gradient(y).fill(1);
    t.backward();
    CHECK(t.gradient(x)(0, 1, 1) == ssm_test::approx(pass * (2 * x(0, 1, 1) + 1)));
  }
  t.zero_gradients();
  CHECK(t.gradient(x)(0, 1, 1) == 0);
}

TEST_CASE("grad/tape: what nobody watches is not recorded", "[grad][tape]") {
  const auto x = uniform<double, 3>({1, 2, 2}, -1, 1, 2);
  tape<double> t;
  const auto y = eval(x * x, &t);
  CHECK(t.mark() == 0);
  CHECK_FALSE(t.wants(y));
  CHECK_FALSE(static_cast<bool>(t.gradient(x)));
}

TEST_CASE("grad/tape: checkpointing changes no bit of a gradient", "[grad][tape]") {
  const auto x = uniform<float, 3>({2, 30, 8}, -1, 1, 3),
             w = uniform<float, 3>({2, 30, 8}, -1, 1, 4);
  const auto f = [&](const tensor<float, 3>& in, tape<float>* t) {
    const auto h = eval(silu(in * w), t);
    const auto h4 = h.reshape(2, 30, 2, 4);
    return eval(softmax(h4 * transpose(h4) + causal) * h4, t).reshape(2, 30, 8);
  };
  tape<float> plain, saving;
  for (tape<float>* t : {&plain, &saving}) {
    t->watch(x);
    t->watch(w);
    const auto y = t == &plain ? f(x, t) : checkpoint(x, t, f);
    t->gradient(y).fill(1);
    t->backward();
  }
  for (const auto& p : {x, w}) {
    const auto a = plain.gradient(p), b = saving.gradient(p);
    for (index_t i = 0; i < a.size(); ++i)
      REQUIRE(a.data()[i] == b.data()[i]);
  }
}

TEST_CASE("grad/tape: a node may outlive the tensors it was made from", "[grad][tape]") {
  const auto make = [] {
    const auto q = uniform<float, 4>({1, 20, 2, 4}, -1, 1, 5);
    const auto v = uniform<float, 4>({1, 20, 2, 4}, -1, 1, 6);
    return softmax(q * transpose(q) + causal) * v;
  };
  const auto kept = make();
  const auto again = make();
  const auto a = eval(kept), b = eval(again);
  for (index_t i = 0; i < a.size(); ++i)
    REQUIRE(a.data()[i] == b.data()[i]);
}
