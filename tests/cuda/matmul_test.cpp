#include "../support/catch.hpp"
#include "compare.hpp"
#include <ssmlib/lower/cuda/matmul.hpp>

using namespace ssm;
using namespace ssm_test;

namespace {

/// The products and both gradients, added to zero, against the CPU's. Sums have up to 67 terms, or
/// 67 * 6 where one matrix serves all.
template <class T, int RA, int RB>
void check_product(const tensor<double, RA>& a, const tensor<double, RB>& b,
                   matmul_options options) {
  CAPTURE(RA, RB, options.transpose_a, options.transpose_b);
  const auto ra = rounded<T>(a);
  const auto rb = rounded<T>(b);
  const auto expected = matmul(ra, rb, options);
  const auto da = on_device<T>(a);
  const auto db = on_device<T>(b);
  const auto y = matmul(da, db, options);
  CHECK(error_of(y, expected) < tolerance<T>);
  const auto dy = rounded<T>(normal<double, RA>(expected.extents(), 1.0, 9));
  const auto wanted_a = tensor<double, RA>::zeros(a.extents());
  const auto wanted_b = tensor<double, RB>::zeros(b.extents());
  matmul_vjp(ra, rb, dy, wanted_a, wanted_b, options);
  const auto found_a = tensor<T, RA, cuda>::zeros(a.extents());
  const auto found_b = tensor<T, RB, cuda>::zeros(b.extents());
  matmul_vjp(da, db, on_device<T>(dy), found_a, found_b, options);
  CHECK(error_of(found_a, wanted_a) < tolerance<T>);
  // A shared matrix of bf16 is rounded once for each matrix that is added to it.
  const double additions = RA > RB && options.transpose_a ? 6 : 1;
  CHECK(error_of(found_b, wanted_b) < additions * tolerance<T>);
}

}  // namespace

TEMPLATE_TEST_CASE("cuda/matmul: products and gradients equal the CPU's", "[cuda][matmul]", bf16,
                   float, double) {
  using T = TestType;
  const matmul_options options{GENERATE(false, true), GENERATE(false, true)};
  const index_t m = 67, k = 24, n = 35;
  const auto make = [](auto leading, index_t rows, index_t columns, bool transpose,
                       std::uint64_t seed) {
    shape<leading.size() + 2> extents{};
    std::copy(leading.begin(), leading.end(), extents.begin());
    extents[leading.size()] = transpose ? columns : rows;
    extents[leading.size() + 1] = transpose ? rows : columns;
    return normal<double, static_cast<int>(leading.size()) + 2>(extents, 1.0, seed);
  };
  const auto a2 = make(shape<0>{}, m, k, options.transpose_a, 1);
  const auto b2 = make(shape<0>{}, k, n, options.transpose_b, 2);
  const auto a3 = make(shape<1>{6}, m, k, options.transpose_a, 3);
  const auto b3 = make(shape<1>{6}, k, n, options.transpose_b, 4);
  const auto a4 = make(shape<2>{2, 3}, m, k, options.transpose_a, 5);
  const auto b4 = make(shape<2>{2, 3}, k, n, options.transpose_b, 6);
  check_product<T>(a2, b2, options);
  check_product<T>(a3, b3, options);
  check_product<T>(a3, b2, options);
  check_product<T>(a4, b4, options);
  check_product<T>(a4, b2, options);
}

TEMPLATE_TEST_CASE("cuda/matmul: strided batches of heads are multiplied where they lie",
                   "[cuda][matmul]", bf16, float, double) {
  using T = TestType;
  // Two of three rows of each of two sequences: the matrices are not one batch.
  const auto a = normal<double, 4>({2, 3, 40, 24}, 1.0, 1),
             b = normal<double, 4>({2, 3, 24, 16}, 1.0, 2);
  const auto part = [](const auto& t) { return t.slice(1, 1, 3); };
  const auto expected = matmul(part(rounded<T>(a)), part(rounded<T>(b)));
  CHECK(error_of(matmul(part(on_device<T>(a)), part(on_device<T>(b))), expected) < tolerance<T>);
}

TEST_CASE("cuda/matmul: extents that do not fit are refused", "[cuda][matmul][error]") {
  const auto a = tensor<float, 2, cuda>::zeros(3, 4);
  const auto b = tensor<float, 2, cuda>::zeros(5, 6);
  CHECK_THROWS_WITH(matmul(a, b), contains("a is (3 x 4), b is (5 x 6)"));
}
