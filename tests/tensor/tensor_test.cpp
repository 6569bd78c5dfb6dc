#include "support/catch.hpp"
#include <ssmlib/tensor/layout.hpp>
#include <ssmlib/tensor/random.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <cmath>
#include <limits>
#include <set>
#include <utility>

using namespace ssm;
using ssm_test::contains;

namespace {
tensor<float, 3> counted(index_t a, index_t b, index_t c) {
  tensor<float, 3> t(a, b, c);
  for (index_t i = 0; i < t.size(); ++i)
    t.data()[i] = static_cast<float>(i);
  return t;
}
}  // namespace

TEST_CASE("tensor/tensor: a feature slice splits into heads and merges batch and time in place",
          "[tensor][tensor]") {
  const auto t = counted(2, 5, 24);
  const auto part = t.slice(2, 8, 16);
  CHECK(part.reshape(2, 5, 2, 4)(1, 3, 1, 2) == t(1, 3, 14));
  CHECK(part.reshape(10, 8)(7, 5) == t(1, 2, 13));
  CHECK(part.reshape(1, 10, 2, 4)(0, 7, 1, 1) == t(1, 2, 13));
  CHECK(part.reshape(10, 8).reshape(2, 5, 8)(1, 2, 5) == t(1, 2, 13));
  part.reshape(10, 8)(7, 5) = -1;
  CHECK(t(1, 2, 13) == -1);
}

TEST_CASE("tensor/tensor: a reshape that the strides do not allow is refused", "[tensor][tensor]") {
  const auto part = counted(2, 5, 24).slice(2, 8, 16);
  CHECK_THROWS_WITH((void)part.reshape(80), contains("the strides do not allow it"));
  CHECK_THROWS_WITH((void)part.reshape(7), contains("the numbers of elements differ"));
}

TEST_CASE("tensor/tensor: empty tensors reshape and slice", "[tensor][tensor]") {
  const tensor<float, 3> empty(1, 0, 16);
  CHECK(empty.slice(2, 4, 8).reshape(1, 0, 2, 2).size() == 0);
  CHECK(empty.clone().extents() == shape<3>{1, 0, 16});
}

TEST_CASE("tensor/tensor: copies share, clones do not", "[tensor][tensor]") {
  const auto a = counted(1, 2, 3);
  const auto shared = a;
  const auto cloned = a.clone();
  a(0, 1, 2) = 100;
  CHECK(shared(0, 1, 2) == 100);
  CHECK(cloned(0, 1, 2) == 5);
  CHECK(share_storage(a, shared));
  CHECK_FALSE(share_storage(a, cloned));
}

TEST_CASE("tensor/tensor: what is moved from holds nothing", "[tensor][tensor]") {
  auto a = counted(1, 2, 3);
  const auto b = std::move(a);
  CHECK(b.storage().use_count() == 1);
  CHECK_FALSE(a);  // NOLINT(bugprone-use-after-move): that is the claim
  CHECK(a.size() == 0);
  CHECK(a.extents() == shape<3>{});
  CHECK(a.data() == nullptr);
  a = b;
  CHECK(a(0, 1, 2) == 5);
}

TEST_CASE("tensor/tensor: slices out of range and negative extents are refused",
          "[tensor][tensor][error]") {
  const auto t = counted(1, 4, 3);
  CHECK_THROWS_AS((void)t.slice(1, 2, 5), shape_error);
  CHECK_THROWS_AS((void)t.slice(3, 0, 1), shape_error);
  CHECK_THROWS_AS((void)t.slice(1, 3, 2), shape_error);
  CHECK_THROWS_AS((tensor<float, 2>(2, -1)), shape_error);
  CHECK_THROWS_WITH(t.copy_from(counted(1, 4, 2)), contains("(1 x 4 x 2)"));
}

TEST_CASE("tensor/bf16: rounds to nearest even and keeps NaN and infinity", "[tensor][bf16]") {
  CHECK(float(bf16(1.0f)) == 1.0f);
  CHECK(float(bf16(1.0f + 0x1p-8f)) == 1.0f);  // tie, to even
  CHECK(float(bf16(1.0f + 0x1p-7f + 0x1p-8f)) == 1.0f + 0x1p-6f);
  CHECK(float(bf16(1.0f + 0x1.1p-8f)) == 1.0f + 0x1p-7f);  // above the tie
  CHECK(std::isinf(float(bf16(std::numeric_limits<float>::max()))));
  CHECK(std::isnan(float(bf16(std::numeric_limits<float>::quiet_NaN()))));
  CHECK(float(cast<bf16>(tensor<float, 1>::full({3}, 0.1f))(2)) == float(bf16(0.1f)));
}

TEST_CASE("tensor/random: philox equals the published test vectors", "[tensor][random]") {
  const auto zeros = philox::block(0, 0, 0);
  CHECK(zeros == std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const auto ones = philox::block(~std::uint64_t{0}, ~std::uint64_t{0}, ~std::uint64_t{0});
  CHECK(ones == std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
}

TEST_CASE("tensor/random: moments of uniform and normal numbers", "[tensor][random]") {
  const index_t n = 200000;
  const auto u = uniform<double, 1>({n}, -1, 3, 5), g = normal<double, 1>({n}, 2, 6);
  double mean_u = 0, mean_g = 0, square_g = 0;
  for (index_t i = 0; i < n; ++i) {
    mean_u += u(i) / double(n);
    mean_g += g(i) / double(n);
    square_g += g(i) * g(i) / double(n);
  }
  CHECK(std::abs(mean_u - 1) < 0.015);  // five standard errors
  CHECK(std::abs(mean_g) < 0.025);
  CHECK(std::abs(square_g - 4) < 0.07);
}

TEST_CASE("tensor/random: large tensors hold the numbers of one generator", "[tensor][random]") {
  const index_t n = 2500001;  // several threads' parts
  const auto u = uniform<float, 1>({n}, -1, 3, 5), g = normal<float, 1>({n}, 2, 6);
  philox for_u(5), for_g(6);
  bool are_equal = true;
  for (index_t i = 0; i < n; ++i) {
    are_equal = are_equal && u(i) == static_cast<float>(for_u.uniform(-1, 3)) &&
                g(i) == static_cast<float>(2 * for_g.normal());
  }
  CHECK(are_equal);
}

TEST_CASE("tensor/layout: offsets, lengths and positions", "[tensor][layout]") {
  const auto layout = sequence_layout::from_lengths({3, 0, 5});
  CHECK(layout.sequences() == 3);
  CHECK(layout.tokens() == 8);
  CHECK(layout.begin(2) == 3);
  CHECK(layout.length(1) == 0);
  CHECK(layout.max_length() == 5);
  CHECK(layout.first_position(2) == 0);
  const index_t first[] = {7, 8, 9};
  CHECK(layout.at_positions(first).first_position(2) == 9);
  CHECK_THROWS_AS((void)layout.at_positions(std::span(first, 2)), shape_error);
  CHECK_THROWS_AS((void)sequence_layout::from_lengths({1, -1}), shape_error);
}
