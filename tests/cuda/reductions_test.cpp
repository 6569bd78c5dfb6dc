#include "compare.hpp"
#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/grad/operations.hpp>
#include <ssmlib/tensor/random.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace {

using namespace ssm;
using namespace ssm_test;

/// f(x, tape) on the device against the CPU in double: the result, and the gradient of sum(w y)
/// added to ones.
template <class T, int R, class F>
void agree(const std::string& what, const tensor<double, R>& exact, bool strided, F f) {
  const tensor<double, R> x = rounded<T>(exact);
  tape<double> here;
  here.watch(x);
  const auto want = f(x, &here);
  constexpr int result_rank = std::remove_cvref_t<decltype(want)>::rank;
  const auto w = rounded<bf16>(normal<double, result_rank>(want.extents(), 1.0, 5));
  here.gradient(x).fill(1);
  here.gradient(want).copy_from(w);
  here.backward();

  tensor<T, R, cuda> there = on_device<T>(x);
  if (strided) {
    shape<R> extents = x.extents();
    extents[R - 1] += 3;
    const auto whole = tensor<T, R, cuda>::full(extents, T(7.0f));
    const auto part = whole.slice(R - 1, 1, x.extent(R - 1) + 1);
    part.copy_from(there);
    there = part;
  }
  tape<T, cuda> t;
  t.watch(there);
  const auto y = f(there, &t);
  t.gradient(there).fill(T(1.0f));
  t.gradient(y).copy_from(on_device<T>(w));
  t.backward();
  INFO(what << ", " << sizeof(T) << " bytes, " << to_string<R>(x.extents())
            << (strided ? ", strided" : ""));
  CHECK(error_of(y, want) <= tolerance<T>);
  CHECK(error_of(t.gradient(there), here.gradient(x)) <= tolerance<T>);
}

template <class T, int R>
void all_agree(const tensor<double, R>& x) {
  for (const bool strided : {false, true}) {
    agree<T>("sum_rows", x, strided, [](const auto& v, auto* t) { return sum_rows(v, t); });
    agree<T>("mean_rows", x, strided, [](const auto& v, auto* t) { return mean_rows(v, t); });
    agree<T>("max_rows", x, strided, [](const auto& v, auto* t) { return max_rows(v, t); });
    agree<T>("softmax_rows", x, strided, [](const auto& v, auto* t) { return softmax_rows(v, t); });
    agree<T>("sum", x, strided, [](const auto& v, auto* t) { return sum(v, t); });
    agree<T>("mean", x, strided, [](const auto& v, auto* t) { return mean(v, t); });
  }
}

}  // namespace

// All numbers of one sign: a sum that cancels has no relative error to speak of. Of equal largest
// numbers, which rounding makes, the first gets the gradient on both sides.
TEMPLATE_TEST_CASE("cuda/reductions: sums, means, maxima and softmax are the CPU's, with gradients",
                   "[cuda][reductions]", float, double, bf16) {
  using T = TestType;
  all_agree<T>(uniform<double, 1>({4099}, 0.1, 1, 1));
  all_agree<T>(uniform<double, 2>({70, 33}, 0.1, 1, 2));
  all_agree<T>(uniform<double, 3>({3, 5, 1000}, 0.1, 1, 3));
  all_agree<T>(uniform<double, 4>({2, 3, 4, 8}, 0.1, 1, 4));
  all_agree<T>(uniform<double, 2>({2, 90001}, 0.1, 1, 5));
}

TEST_CASE("cuda/reductions: the largest of all is the CPU's", "[cuda][reductions]") {
  const auto x = normal<float, 3>({5, 7, 1001}, 1.0, 6);
  CHECK(to<cpu>(max(to<cuda>(x)))(0) == max(x)(0));
  const auto turned = to<cuda>(x).slice(2, 3, 900);
  CHECK(to<cpu>(max(turned))(0) == max(x.slice(2, 3, 900))(0));
}

TEST_CASE("cuda/reductions: empty operands are summed to zero, and refused where there is no value",
          "[cuda][reductions]") {
  const auto rows = tensor<float, 2, cuda>::zeros(3, 0);
  const auto sums = to<cpu>(sum_rows(rows));
  CHECK(sums.extent(0) == 3);
  CHECK((sums(0) == 0 && sums(1) == 0 && sums(2) == 0));
  CHECK(to<cpu>(sum(rows))(0) == 0);
  CHECK(softmax_rows(rows).size() == 0);
  CHECK(sum_rows(tensor<float, 2, cuda>::zeros(0, 4)).size() == 0);
  CHECK_THROWS_WITH(mean_rows(rows), contains("mean_rows of (3 x 0)"));
  CHECK_THROWS_WITH(max_rows(rows), contains("max_rows of (3 x 0)"));
  CHECK_THROWS_WITH(mean(rows), contains("there is no element"));
  CHECK_THROWS_WITH(max(rows), contains("there is no element"));
}

TEST_CASE("cuda/reductions: repeats have the same bits", "[cuda][reductions]") {
  const auto x = to<cuda>(normal<float, 2>({3, 200003}, 1.0, 8));
  const auto bits = [&] {
    const auto a = to<cpu>(sum_rows(x)), b = to<cpu>(sum(x));
    const auto c = to<cpu>(softmax_rows(x));
    std::vector<float> all{a(0), a(1), a(2), b(0)};
    all.insert(all.end(), c.data(), c.data() + c.size());
    return all;
  };
  const auto first = bits();
  bool same = true;
  for (int i = 0; i < 20; ++i)
    same = same && bits() == first;
  CHECK(same);
}
