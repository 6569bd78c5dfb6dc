#include "support/catch.hpp"
#include <ssmlib/lower/gram.hpp>
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/lower/softmax.hpp>
#include <ssmlib/mixer/panels.hpp>
#include <ssmlib/tensor/random.hpp>

#include <array>
#include <cmath>
#include <limits>

using namespace ssm;

namespace {

constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

// NaN counts as larger than everything.
double larger(double a, double b) {
  return std::isnan(b) || b > a ? b : a;
}

tensor<double, 4> features(index_t batch, index_t length, index_t heads, std::uint64_t seed) {
  return normal<double, 4>({batch, length, heads, 3}, 1, seed);
}
// Decays of every size: slow, fast enough to vanish within a panel, and resets.
tensor<double, 3> log_decays(index_t batch, index_t length, index_t heads) {
  auto a = uniform<double, 3>({batch, length, heads}, -0.05, 0, 5);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t h = 0; h < heads; ++h) {
      for (const index_t t : {0, 70, 71, 100, 128})
        a(b, t, h) = h % 2 == 0 ? minus_infinity : -1.5;
      for (index_t t = 30; t < 50; ++t)
        a(b, t, h) *= h == 1 ? 800 : 1;
    }
  }
  return a;
}

// The largest error of tiles against dense(): whole panels and parts of them.
template <class M>
double largest_error(const M& m) {
  const cpu::context ctx(2);
  const auto p = panels(m, nullptr, ctx);
  const auto dense = m.dense();
  const sequence_layout layout = layout_of(m);
  double worst = 0;
  for (index_t i = 0; i < layout.sequences(); ++i) {
    const index_t begin = layout.begin(i), end = layout.end(i), base = m.layout ? 0 : begin;
    for (index_t s0 = begin; s0 < end; s0 += 64) {
      const index_t s1 = std::min(end, s0 + 64), middle = (s0 + end) / 2;
      const std::array<index_t, 2> ranges[] = {{begin, end}, {s0, end},       {middle, end},
                                               {begin, s0},  {begin, middle}, {s0, s0 + 1}};
      for (const auto [row, row_end] : ranges) {
        const auto values = p->tile(ctx, i, row, row_end, s0, s1);
        REQUIRE(values.extents() == shape<3>{row_end - row, m.heads(), s1 - s0});
        for (index_t t = row; t < row_end; ++t) {
          for (index_t h = 0; h < m.heads(); ++h) {
            for (index_t s = s0; s < s1; ++s) {
              worst = larger(worst, std::abs(values(t - row, h, s - s0) -
                                             dense(m.layout ? 0 : i, h, t - base, s - base)));
            }
          }
        }
      }
    }
  }
  return worst;
}

// The gradients of every operand of a random linear functional of the matrix, by tiles of `rows`
// rows (0: all of them) from the first row of the sequence or from the panel's first.
template <class M>
std::vector<double> gradients(const M& m, matrix_panels<double>& p, tape<double>& t,
                              bool from_panel, index_t rows) {
  const cpu::context ctx(2);
  philox random(11);
  for (index_t i = 0; i < p.layout().sequences(); ++i) {
    const index_t begin = p.layout().begin(i), end = p.layout().end(i);
    for (index_t s0 = begin; s0 < end; s0 += 64) {
      for (index_t row = from_panel ? s0 : begin, next = end; row < end; row = next) {
        next = rows == 0 ? end : std::min(end, row + rows);
        const auto values = p.tile(ctx, i, row, next, s0, std::min(end, s0 + 64));
        tensor<double, 3> d(values.extents());
        for (index_t j = 0; j < d.size(); ++j)
          d.data()[j] = random.normal();
        p.add_vjp(ctx, i, row, s0, values, d);
      }
    }
  }
  std::vector<double> all;
  M copy = m;
  M::operands(copy, [&](std::string_view, auto& x, operand) {
    const auto g = t.gradient(x).clone();
    all.insert(all.end(), g.data(), g.data() + g.size());
  });
  return all;
}
template <class M>
void check_gradients(const M& m) {
  for (const index_t rows : {0, 50}) {
    tape<double> entry_tape, product_tape;
    M copy = m;
    M::operands(copy, [&](std::string_view, auto& x, operand) {
      entry_tape.watch(x);
      product_tape.watch(x);
    });
    detail::product_panels<M> products(m, &product_tape);
    const auto expected = gradients(m, products, product_tape, rows != 0, rows);
    const auto found = gradients(m, *panels(m, &entry_tape), entry_tape, rows != 0, rows);
    REQUIRE(found.size() == expected.size());
    double worst = 0, largest = 0;
    for (std::size_t j = 0; j < found.size(); ++j) {
      const double error = std::abs(found[j] - expected[j]);
      worst = larger(worst, error);
      largest = std::max(largest, std::abs(expected[j]));
    }
    CAPTURE(rows, largest);
    CHECK(largest > 1);
    CHECK(worst < 1e-12 * largest);
  }
}
template <class M>
void check(const M& m) {
  static_assert(detail::semiseparable_parts<M>::exist);
  CHECK(largest_error(m) < 1e-12);
  check_gradients(m);
}

const auto ragged = sequence_layout::from_lengths({1, 150, 0, 64, 131});

}  // namespace

TEST_CASE("mixers/panels: linear attention with groups and a feature map", "[mixers][panels]") {
  check(
      hadamard(causal, with_features(feature::elu_plus_one{},
                                     features(2, 150, 4, 1) * transpose(features(2, 150, 2, 2)))));
}
TEST_CASE("mixers/panels: retention, with its gradient for gamma", "[mixers][panels]") {
  auto gamma = tensor<double, 1>(4);
  for (index_t h = 0; h < 4; ++h)
    gamma(h) = 1 - std::pow(2.0, -1.0 - 2.0 * double(h));
  check(packed(ragged, hadamard(decay(gamma),
                                features(1, 346, 2, 1) * transpose(features(1, 346, 1, 2)) * 0.5)));
}
TEST_CASE("mixers/panels: a semiseparable mask with resets and vanishing decays",
          "[mixers][panels]") {
  check(hadamard(semiseparable(log_decays(2, 150, 2)),
                 features(2, 150, 2, 1) * transpose(features(2, 150, 2, 2))));
}
TEST_CASE("mixers/panels: Mamba-2's matrix over ragged sequences", "[mixers][panels]") {
  const auto weight = uniform<double, 3>({1, 346, 4}, -0.5, 1, 7);
  weight(0, 20, 1) = 0;
  check(packed(ragged, hadamard(semiseparable(log_decays(1, 346, 4), weight),
                                features(1, 346, 2, 1) * transpose(features(1, 346, 2, 2)) * 0.3) +
                           diagonal(normal<double, 1>({4}, 1, 8))));
}
TEST_CASE("mixers/panels: a diagonal with more heads than the matrix", "[mixers][panels]") {
  check(hadamard(semiseparable(log_decays(1, 150, 1)),
                 features(1, 150, 1, 1) * transpose(features(1, 150, 2, 2))) +
        diagonal(normal<double, 1>({4}, 1, 8)));
}
TEST_CASE("mixers/panels: rows over many tasks sum to one gradient", "[mixers][panels]") {
  const index_t length = 4500;
  const auto a = uniform<double, 3>({1, length, 2}, -0.002, 0, 5);
  const auto m =
      hadamard(semiseparable(a), features(1, length, 1, 1) * transpose(features(1, length, 2, 2)));
  const cpu::context ctx(2);
  tape<double> entry_tape, product_tape;
  for (tape<double>* t : {&entry_tape, &product_tape}) {
    t->watch(a);
    t->watch(m.kernel.q);
    t->watch(m.kernel.k);
  }
  const auto entries = panels(m, &entry_tape);
  detail::product_panels products(m, &product_tape);
  const auto values = entries->panel(ctx, 0, 0, 64, 128);
  const auto expected = products.panel(ctx, 0, 0, 64, 128);
  double worst = 0;
  values.zip_with(expected, [&](double x, double y) { worst = larger(worst, std::abs(x - y)); });
  CHECK(worst < 1e-12);
  const auto d = normal<double, 3>(values.extents(), 1, 9);
  entries->add_vjp(ctx, 0, 0, 64, values, d);
  products.add_vjp(ctx, 0, 0, 64, values, d);
  const auto check_same = [](const auto& x, const auto& y) {
    double error = 0, largest = 0;
    x.zip_with(y, [&](double u, double v) {
      error = larger(error, std::abs(u - v));
      largest = std::max(largest, std::abs(v));
    });
    CHECK(largest > 1);
    CHECK(error < 1e-12 * largest);
  };
  check_same(entry_tape.gradient(a), product_tape.gradient(a));
  check_same(entry_tape.gradient(m.kernel.q), product_tape.gradient(m.kernel.q));
  check_same(entry_tape.gradient(m.kernel.k), product_tape.gradient(m.kernel.k));
}
TEST_CASE("mixers/panels: tiles whose decays vanish are constant and zero", "[mixers][panels]") {
  const auto a = tensor<double, 3>::full({1, 900, 2}, -2.0);
  a.slice(2, 1, 2).fill(-4.0);
  const auto kernel = features(1, 900, 1, 1) * transpose(features(1, 900, 1, 2));
  const auto p = panels(hadamard(semiseparable(a), kernel));
  CHECK(p->is_constant(0, 600, 900, 0, 64));
  CHECK_FALSE(p->is_constant(0, 300, 900, 0, 64));
  CHECK_FALSE(p->is_constant(0, 0, 64, 0, 64));
  CHECK_FALSE(panels(hadamard(causal, kernel))->is_constant(0, 600, 900, 0, 64));
  const auto values = p->tile(default_context<cpu>(), 0, 600, 900, 0, 64);
  index_t nonzero = 0;
  for (index_t i = 0; i < values.size(); ++i)
    nonzero += values.data()[i] != 0;
  CHECK(nonzero == 0);
}
TEST_CASE("mixers/panels: windowed softmax attention equals dense()", "[mixers][panels]") {
  const auto logits = features(1, 346, 2, 1) * transpose(features(1, 346, 1, 2));
  CHECK(largest_error(packed(ragged, softmax(logits + window(70)))) < 1e-13);
}
TEST_CASE("mixers/panels: products with the identity equal dense() in any rows",
          "[mixers][panels]") {
  const auto kernel = with_features(feature::exponential{},
                                    features(1, 346, 2, 1) * transpose(features(1, 346, 1, 2)));
  CHECK(largest_error(packed(ragged, normalize_rows(hadamard(causal, kernel)))) < 1e-12);
  CHECK(largest_error(packed(ragged, hadamard(window(70), kernel))) < 1e-10);
}
TEST_CASE("mixers/panels: an operand sliced along time cannot take a gradient",
          "[mixers][panels][error]") {
  const auto all = features(2, 20, 1, 1), k = features(2, 10, 1, 2);
  tape<double> t;
  t.watch(all);
  const auto q = all.slice(1, 0, 10);
  CHECK_NOTHROW(panels(hadamard(causal, q * transpose(k))));
  CHECK_THROWS_AS(panels(hadamard(causal, q * transpose(k)), &t), shape_error);
}
