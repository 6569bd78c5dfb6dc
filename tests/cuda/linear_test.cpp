#include "../support/catch.hpp"
#include "compare.hpp"
#include <ssmlib/lower/matmul.hpp>
#include <ssmlib/nn/cuda/linear.hpp>

#include <cmath>
#include <vector>

using namespace ssm;
using namespace ssm_test;

namespace {

struct linear_sizes {
  index_t batch, time, in, out;
};

/// Sums of `terms` products: float errs by about sqrt(terms) roundings of 6e-8, well below
/// the tolerance; a bf16 weight is rounded once more, from float, on the device.
template <class T>
auto as_weight(const tensor<double, 2>& w) {
  return rounded<T>(rounded<accum_t<T>>(w));
}

template <class T>
void check_linear(const linear_sizes& n, bool with_bias, bool fixed_order, bool sliced) {
  CAPTURE(n.batch, n.time, n.in, n.out, with_bias, fixed_order, sliced);
  using P = accum_t<T>;
  const index_t wider = sliced ? n.in + 8 : n.in;
  const auto all = rounded<T>(normal<double, 3>({n.batch, n.time, wider}, 1.0, 1));
  const auto w = rounded<P>(normal<double, 2>({n.out, n.in}, 1.0, 2));
  const auto b = with_bias ? rounded<P>(normal<double, 1>({n.out}, 1.0, 3)) : tensor<double, 1>();
  const auto dy = rounded<T>(normal<double, 3>({n.batch, n.time, n.out}, 1.0, 4));
  const auto part = [&](const auto& t) { return t.slice(2, wider - n.in, wider); };

  tape<double> expected_tape;
  expected_tape.watch(all), expected_tape.watch(w);
  if (b) expected_tape.watch(b);
  // The bias goes into fast products as T.
  const auto used_bias = b && !fixed_order ? rounded<T>(b) : b;
  if (used_bias && used_bias.data() != b.data()) expected_tape.watch(used_bias);
  const auto used_weight = as_weight<T>(w);
  expected_tape.watch(used_weight);
  const auto expected =
      op::linear(pass<double>{.tape = &expected_tape}, part(all), used_weight, used_bias);
  expected_tape.gradient(expected).copy_from(dy);
  expected_tape.backward();

  const auto x = on_device<T>(all);
  const auto weight = on_device<P>(w);
  const auto bias = b ? on_device<P>(b) : tensor<P, 1, cuda>();
  tape<T, cuda> t;
  t.watch(x), t.watch(weight);
  if (bias) t.watch(bias);
  const pass<T, cuda> p{.tape = &t, .fixed_order = fixed_order};
  const auto y = op::linear(p, part(x), weight, bias);
  CHECK(error_of(y, expected) < tolerance<T>);
  t.gradient(y).copy_from(on_device<T>(dy));
  t.backward();
  CHECK(error_of(t.gradient(x), expected_tape.gradient(all)) < tolerance<T>);
  CHECK(error_of(t.gradient(weight), expected_tape.gradient(used_weight)) < tolerance<P>);
  if (b) CHECK(error_of(t.gradient(bias), expected_tape.gradient(used_bias)) < tolerance<P>);
}

constexpr linear_sizes sizes[] = {{1, 1, 24, 40},   {2, 17, 40, 24},  {1, 1009, 280, 96},
                                  {3, 17, 35, 7},   {1, 16, 7, 1009}, {2, 500, 56, 24},
                                  {1, 130, 63, 130}};

}  // namespace

TEMPLATE_TEST_CASE("cuda/linear: values and gradients equal the CPU's", "[cuda][linear]", bf16,
                   float, double) {
  for (const linear_sizes& n : sizes) {
    check_linear<TestType>(n, false, false, false);
    check_linear<TestType>(n, true, false, true);
  }
}

TEMPLATE_TEST_CASE("cuda/linear: a fixed order of sums gives the same values", "[cuda][linear]",
                   bf16, float, double) {
  for (const linear_sizes& n : sizes) {
    check_linear<TestType>(n, false, true, true);
    check_linear<TestType>(n, true, true, false);
  }
}

TEMPLATE_TEST_CASE("cuda/linear: in a fixed order the bits of a row do not depend on the others",
                   "[cuda][linear]", bf16, float, double) {
  using T = TestType;
  const index_t in = GENERATE(280, 35), rows = 150;
  CAPTURE(in);
  // Odd row strides: rows of a slice are aligned differently than rows by themselves.
  const auto x = on_device<T>(normal<double, 3>({1, rows, in + 3}, 1.0, 1)).slice(2, 1, in + 1);
  const auto w = on_device<accum_t<T>>(normal<double, 2>({72, in}, 1.0, 2));
  const auto b = on_device<accum_t<T>>(normal<double, 1>({72}, 1.0, 3));
  const pass<T, cuda> p{.fixed_order = true};
  const auto all = to<cpu>(op::linear(p, x, w, b));
  for (const index_t count : {1, 2, 5, 16, 33, 64, 100}) {
    for (const index_t first : {index_t{0}, index_t{7}, rows - count}) {
      const auto some = to<cpu>(op::linear(p, x.slice(1, first, first + count), w, b));
      CHECK(same_bits(some, all.slice(1, first, first + count)));
      const auto alone = to<cpu>(op::linear(p, x.slice(1, first, first + count).clone(), w, b));
      CHECK(same_bits(alone, all.slice(1, first, first + count)));
    }
  }
}

TEMPLATE_TEST_CASE("cuda/linear: gradients are added, with the same bits each time",
                   "[cuda][linear]", bf16, float, double) {
  using T = TestType;
  using P = accum_t<T>;
  const cuda::context& ctx = default_context<cuda>();
  const auto x = on_device<T>(normal<double, 2>({3001, 136}, 1.0, 1));
  const auto w = on_device<T>(normal<double, 2>({72, 136}, 1.0, 2));
  const auto dy = on_device<T>(normal<double, 2>({3001, 72}, 1.0, 3));
  const auto gradients = [&](P begin) {
    const auto dw = tensor<P, 2, cuda>::full({72, 136}, begin);
    const auto db = tensor<P, 1, cuda>::full({72}, begin);
    const auto dx = tensor<T, 2, cuda>::full({3001, 136}, T(static_cast<float>(begin)));
    apply_linear_vjp(ctx, x, w, dy, dx, dw, db);
    return std::vector{on_cpu(dw.reshape(dw.size())), on_cpu(db), on_cpu(dx.reshape(dx.size()))};
  };
  const auto from_zero = gradients(P(0)), from_four = gradients(P(4));
  for (std::size_t k = 0; k < from_zero.size(); ++k) {
    auto expected = from_zero[k].clone();
    for (index_t i = 0; i < expected.size(); ++i)
      expected(i) += 4;
    CHECK(relative_error(from_four[k], expected) < (k == 2 ? tolerance<T> : tolerance<P>));
  }
  for (int run = 0; run < 20; ++run) {
    const auto again = gradients(P(0));
    for (std::size_t k = 0; k < again.size(); ++k)
      CHECK(same_bits(again[k], from_zero[k]));
  }
}

TEST_CASE("cuda/linear: no tokens, no work", "[cuda][linear]") {
  const auto x = tensor<bf16, 3, cuda>(2, 0, 24);
  const auto w = tensor<float, 2, cuda>::zeros(40, 24);
  CHECK(op::linear(pass<bf16, cuda>{}, x, w).extents() == shape<3>{2, 0, 40});
}

TEMPLATE_TEST_CASE("cuda/gemm: strides, transposes, factors and batches as they should be",
                   "[cuda][gemm]", float, double) {
  using T = TestType;
  using kernels::cuda::exchanged;
  const cuda::context& ctx = default_context<cuda>();
  const bool transpose_a = GENERATE(false, true), transpose_b = GENERATE(false, true);
  const bool transpose_c = GENERATE(false, true), general = GENERATE(false, true);
  const index_t batch = GENERATE(1, 5), m = 33, n = GENERATE(24, 65), k = GENERATE(1, 47);
  CAPTURE(transpose_a, transpose_b, transpose_c, general, batch, n, k);
  const auto make = [&](index_t rows, index_t columns, bool transpose, std::uint64_t seed) {
    // Three columns more than are used, so that rows are strided.
    const shape<3> stored{batch, transpose ? columns : rows, (transpose ? rows : columns) + 3};
    return normal<double, 3>(stored, 1.0, seed);
  };
  const auto a = make(m, k, transpose_a, 1), b = make(k, n, transpose_b, 2),
             c = make(m, n, transpose_c, 3);
  const auto read = [](const auto& t, bool transpose) {
    const auto v = t.slice(2, 0, t.extent(2) - 3).view();
    return transpose ? exchanged(v) : v;
  };
  const auto ca = rounded<T>(a), cb = rounded<T>(b), expected = rounded<T>(c);
  const auto va = read(ca, transpose_a), vb = read(cb, transpose_b),
             vc = read(expected, transpose_c);
  for (index_t g = 0; g < batch; ++g) {
    for (index_t i = 0; i < m; ++i) {
      for (index_t j = 0; j < n; ++j) {
        double sum = 0;
        for (index_t r = 0; r < k; ++r)
          sum += va(g, i, r) * vb(g, r, j);
        vc(g, i, j) = 0.75 * sum - 2 * vc(g, i, j);
      }
    }
  }
  const auto da = on_device<T>(a), db = on_device<T>(b), dc = on_device<T>(c);
  const kernels::cuda::gemm_problem<T, T> p{
      read(da, transpose_a), read(db, transpose_b), read(dc, transpose_c), nullptr, 0.75, -2.0};
  general ? kernels::cuda::gemm_general(ctx.stream(), p) : kernels::cuda::gemm(ctx, p);
  CHECK(error_of(dc, expected) < tolerance<T>);
}

TEST_CASE("cuda/gemm: float keeps its bits unless TF32 is asked for", "[cuda][gemm]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  const auto a = normal<double, 2>({256, 512}, 1.0, 1), b = normal<double, 2>({512, 256}, 1.0, 2);
  const auto expected = matmul(rounded<float>(a), rounded<float>(b));
  const auto error = [&] {
    using kernels::cuda::single;
    const auto x = to<cuda>(cast<float>(a), ctx), y = to<cuda>(cast<float>(b), ctx);
    const tensor<float, 2, cuda> z(256, 256);
    kernels::cuda::gemm(ctx, kernels::cuda::gemm_problem<float, float>{
                                 single(x.const_view()), single(y.const_view()), single(z.view())});
    return relative_error(cast<double>(to<cpu>(z, ctx)), expected);
  };
  CHECK(error() < 1e-6);
  ctx.set_allow_tf32(true);
  CHECK(error() > 1e-5);  // 10 bits of mantissa: about 2^-12 for each product
  CHECK(error() < 1e-3);
}

TEST_CASE("cuda/gemm: a captured product allocates nothing and runs again", "[cuda][gemm]") {
  using kernels::cuda::single;
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  const auto a = to<cuda>(cast<bf16>(normal<double, 2>({300, 128}, 1.0, 1)), ctx);
  const auto b = to<cuda>(cast<bf16>(normal<double, 2>({128, 256}, 1.0, 2)), ctx);
  const tensor<float, 2, cuda> direct(300, 256), captured(300, 256);
  const auto multiply = [&](const tensor<float, 2, cuda>& c) {
    kernels::cuda::gemm(ctx, kernels::cuda::gemm_problem<bf16, float>{
                                 single(a.const_view()), single(b.const_view()), single(c.view())});
  };
  cudaGraph_t graph = nullptr;
  REQUIRE(cudaStreamBeginCapture(ctx.stream(), cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  CHECK_THROWS_WITH(multiply(captured), contains("inside a graph capture"));
  REQUIRE(cudaStreamEndCapture(ctx.stream(), &graph) == cudaSuccess);
  REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);

  multiply(direct);
  ctx.synchronize();
  const std::size_t before = ctx.memory().in_use;
  REQUIRE(cudaStreamBeginCapture(ctx.stream(), cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  multiply(captured);
  REQUIRE(cudaStreamEndCapture(ctx.stream(), &graph) == cudaSuccess);
  cudaGraphExec_t exec = nullptr;
  REQUIRE(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  CHECK(ctx.memory().in_use == before);
  captured.fill(std::nanf(""));
  REQUIRE(cudaGraphLaunch(exec, ctx.stream()) == cudaSuccess);
  CHECK(same_bits(to<cpu>(captured, ctx), to<cpu>(direct, ctx)));
  REQUIRE(cudaGraphExecDestroy(exec) == cudaSuccess);
  REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
}

TEST_CASE("cuda/gemm: factors that do not fit are refused by shape", "[cuda][gemm][error]") {
  using kernels::cuda::single;
  const auto a = tensor<float, 2, cuda>::zeros(3, 4), b = tensor<float, 2, cuda>::zeros(5, 6);
  const tensor<float, 2, cuda> c(3, 6);
  CHECK_THROWS_WITH(
      kernels::cuda::gemm(default_context<cuda>(),
                          kernels::cuda::gemm_problem<float, float>{
                              single(a.const_view()), single(b.const_view()), single(c.view())}),
      contains("a is (1 x 3 x 4), b is (1 x 5 x 6)"));
}
