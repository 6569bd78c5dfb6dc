#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/embedding.hpp>

namespace {

using namespace ssm;
using ssm_test::flat;

tensor<std::int32_t, 2> some_ids(index_t b, index_t length, index_t vocabulary) {
  tensor<std::int32_t, 2> ids(b, length);
  philox random(5);
  for (index_t i = 0; i < ids.size(); ++i) {
    ids.data()[i] = static_cast<std::int32_t>(random.below(vocabulary));
  }
  return ids;
}

TEST_CASE("nn/embedding: every token is its row of the table", "[nn][embedding]") {
  const auto layer = embedding<float>::make(11, 6, 1);
  const auto ids = some_ids(2, 7, 11);
  const auto y = layer(pass<float>{}, ids);
  REQUIRE(y.extents() == shape<3>{2, 7, 6});
  for (index_t i = 0; i < 2; ++i) {
    for (index_t t = 0; t < 7; ++t) {
      for (index_t f = 0; f < 6; ++f)
        CHECK(y(i, t, f) == layer.weight(ids(i, t), f));
    }
  }
}

TEST_CASE("nn/embedding: the gradient adds up the tokens with the same id", "[nn][embedding]") {
  const auto layer = embedding<double>::make(5, 6, 1);
  const auto ids = some_ids(2, 9, 5);
  CHECK(ssm_test::gradient_error({flat(layer.weight)}, [&](const pass<double>& p) {
          return std::vector{flat(layer(p, ids))};
        }) < 1e-7);
}

TEST_CASE("nn/embedding: the gradient has the same bits with any number of threads",
          "[nn][embedding][threads]") {
  const auto layer = embedding<float>::make(7, 320, 1);
  const auto ids = some_ids(3, 200, 7);
  tensor<float, 2> first;
  for (const int threads : {1, 2, 3}) {
    const cpu::context ctx(threads);
    tape<float> tape;
    tape.watch(layer.weight);
    const auto y = layer(pass<float>{ctx, &tape}, ids);
    tape.gradient(y).copy_from(uniform<float, 3>(y.extents(), -1, 1, 2));
    tape.backward();
    if (!first) first = tape.gradient(layer.weight).clone();
    CHECK(ssm_test::same_bits(tape.gradient(layer.weight), first));
  }
}

TEST_CASE("nn/embedding: an id outside the vocabulary is refused by value",
          "[nn][embedding][error]") {
  const auto layer = embedding<float>::make(5, 6, 1);
  auto ids = tensor<std::int32_t, 2>::zeros(1, 3);
  ids(0, 2) = 5;
  CHECK_THROWS_WITH(layer(pass<float>{}, ids),
                    ssm_test::contains("token 2 has id 5, the vocabulary has 5 entries"));
  ids(0, 2) = -1;
  CHECK_THROWS_AS(layer(pass<float>{}, ids), value_error);
}

}  // namespace
