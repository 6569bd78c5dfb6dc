#include "../support/catch.hpp"
#include <ssmlib/mixer/verify.hpp>

#include <cmath>
#include <sstream>
#include <vector>

// verify() must fail what is wrong: a mixer of a user, a leaky sum h_t = exp(log_a_t) h_{t-1} +
// gain x_t with its chunks and its gradient, right or with one flaw.

namespace leaky {

using ssm::index_t;
using ssm::operand;
using ssm::tensor;

enum class flaw {
  none,
  vjp_off_by_a_percent,
  chunks_drop_the_state,
  initial_state_ignored,
  packed_gradient_crosses_boundaries,
  packed_parameter_sees_one_sequence
};

template <class T, flaw Flaw>
struct leaky_sum {
  using value_type = T;
  using backend = ssm::cpu;
  using structure = ssm::structure::one_semiseparable;
  using algorithms = ssm::alg_list<ssm::alg::chunked, ssm::alg::recurrent>;

  tensor<T, 3> log_a;  // (b, T, H)
  tensor<T, 1> gain;   // (H)
  ssm::sequence_layout layout{};

  [[nodiscard]] index_t batch() const { return log_a.extent(0); }
  [[nodiscard]] index_t length() const { return log_a.extent(1); }
  [[nodiscard]] index_t heads() const { return log_a.extent(2); }
  [[nodiscard]] index_t key_size() const { return 1; }
  [[nodiscard]] index_t state_features(index_t p) const { return p; }
  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("log_a", self.log_a, operand::per_token);
    f("gain", self.gain, operand::parameter);
  }
  [[nodiscard]] tensor<double, 4> dense() const {
    const auto sequences = ssm::layout_of(*this);
    const index_t n = layout ? layout.tokens() : length();
    auto m = tensor<double, 4>::zeros(layout ? 1 : batch(), heads(), n, n);
    for (index_t i = 0; i < sequences.sequences(); ++i) {
      const index_t base = layout ? 0 : sequences.begin(i), block = layout ? 0 : i;
      for (index_t h = 0; h < heads(); ++h) {
        for (index_t s = sequences.begin(i); s < sequences.end(i); ++s) {
          double sum = 0;
          for (index_t t = s; t < sequences.end(i); ++t) {
            if (t > s) sum += static_cast<double>(log_a(t / length(), t % length(), h));
            m(block, h, t - base, s - base) = std::exp(sum) * static_cast<double>(gain(h));
          }
        }
      }
    }
    return m;
  }
};

/// f(sequence, head, feature, at(t) -> (batch, time)) for all of them.
template <class M, class F>
void for_each_lane(const M& m, index_t features, F f) {
  const auto layout = ssm::layout_of(m);
  for (index_t i = 0; i < layout.sequences(); ++i) {
    for (index_t h = 0; h < m.heads(); ++h) {
      for (index_t p = 0; p < features; ++p)
        f(i, layout.begin(i), layout.end(i), h, p);
    }
  }
}

template <class T, flaw Flaw>
void run(const leaky_sum<T, Flaw>& m, index_t chunk, const tensor<T, 4>& x, const tensor<T, 4>& y,
         const ssm::carry<T>& c) {
  const index_t n = x.extent(1);
  const auto layout = ssm::layout_of(m);
  for_each_lane(m, x.extent(3), [&](index_t i, index_t begin, index_t end, index_t h, index_t p) {
    const bool ignored = Flaw == flaw::initial_state_ignored && chunk > 1;
    T state = c.initial && !ignored ? c.initial(i, h, 0, p) : T(0);
    for (index_t t = begin; t < end; ++t) {
      if (c.snapshots && chunk == 1) {
        const index_t row = (c.first_position[i] + t - begin) % c.slots * layout.sequences() + i;
        c.snapshots(row, h, 0, p) = state;
      }
      const bool dropped = Flaw == flaw::chunks_drop_the_state && chunk > 1 && t > begin;
      if (dropped && (t - begin) % chunk == 0) state = T(0);
      state = std::exp(m.log_a(t / n, t % n, h)) * state + m.gain(h) * x(t / n, t % n, h, p);
      y(t / n, t % n, h, p) = state;
    }
    if (c.final) c.final(i, h, 0, p) = state;
  });
}

template <class T, flaw Flaw>
void apply_mixer(const ssm::cpu::context&, ssm::alg::chunked, const leaky_sum<T, Flaw>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const ssm::carry<T>& c) {
  run(m, 16, x, y, c);
}
template <class T, flaw Flaw>
void apply_mixer(const ssm::cpu::context&, ssm::alg::recurrent, const leaky_sum<T, Flaw>& m,
                 const tensor<T, 4>& x, const tensor<T, 4>& y, const ssm::carry<T>& c) {
  run(m, 1, x, y, c);
}

// g_t = dy_t + exp(log_a_{t+1}) g_{t+1} is the gradient of h_t.
template <class Alg, class T, flaw Flaw>
requires(!std::same_as<Alg, ssm::alg::quadratic>) void apply_mixer_vjp(
    const ssm::cpu::context& ctx, Alg, const leaky_sum<T, Flaw>& m, const tensor<T, 4>& x,
    const tensor<T, 4>& dy, leaky_sum<T, Flaw>& dm, const tensor<T, 4>& dx,
    const ssm::carry_gradient<T>& c) {
  const index_t n = x.extent(1);
  tensor<T, 4> states(x.extents());
  apply_mixer(ctx, ssm::alg::recurrent{}, m, x, states,
              ssm::carry<T>{c.initial, {}, {}, 0, nullptr});
  for_each_lane(m, x.extent(3), [&](index_t i, index_t begin, index_t end, index_t h, index_t p) {
    T g = c.d_final ? c.d_final(i, h, 0, p) : T(0);
    for (index_t t = end - 1; t >= begin; --t) {
      g += dy(t / n, t % n, h, p);
      const T decay = std::exp(m.log_a(t / n, t % n, h));
      const bool crosses =
          Flaw == flaw::packed_gradient_crosses_boundaries && m.layout && t == begin && t > 0;
      const T before = t > begin || crosses ? states((t - 1) / n, (t - 1) % n, h, p)
                       : c.initial          ? c.initial(i, h, 0, p)
                                            : T(0);
      const T factor = Flaw == flaw::vjp_off_by_a_percent ? T(1.01) : T(1);
      if (dx) dx(t / n, t % n, h, p) += m.gain(h) * g;
      const bool seen = Flaw != flaw::packed_parameter_sees_one_sequence || !m.layout || i == 0;
      if (dm.gain && seen) dm.gain(h) += x(t / n, t % n, h, p) * g;
      if (dm.log_a) dm.log_a(t / n, t % n, h) += factor * decay * before * g;
      g *= decay;
    }
    if (c.d_initial) c.d_initial(i, h, 0, p) += g;
  });
}

template <class T, flaw Flaw>
ssm::verify_report report() {
  return ssm::verify(
      [](index_t batch, index_t length, ssm::philox& random) {
        const std::uint64_t seed = random.bits();
        return leaky_sum<T, Flaw>{ssm::uniform<T, 3>({batch, length, 2}, -0.5, 0, seed),
                                  ssm::uniform<T, 1>({2}, 0.5, 1, seed + 2),
                                  {}} *
               ssm::uniform<T, 4>({batch, length, 2, 3}, -1, 1, seed + 1);
      },
      {.lengths = {1, 2, 17, 65}});
}

/// Whether the failed checks are those, and only those, whose claim is among the given.
bool fails_only(const ssm::verify_report& r, const std::vector<std::string>& claims) {
  bool only = r.failures() > 0;
  for (const ssm::verify_check& c : r.checks) {
    if (!c.passed()) only = only && std::ranges::find(claims, c.claim) != claims.end();
  }
  return only;
}

std::string table(const ssm::verify_report& r) {
  std::ostringstream text;
  text << r;
  return text.str();
}

TEMPLATE_TEST_CASE("properties/verify: a user's mixer without a flaw passes",
                   "[properties][verify]", float, double) {
  const auto r = report<TestType, flaw::none>();
  INFO(table(r));
  CHECK(r.passed());
}

TEMPLATE_TEST_CASE("properties/verify: a vjp that is 1 % off fails", "[properties][verify]", float,
                   double) {
  const auto r = report<TestType, flaw::vjp_off_by_a_percent>();
  INFO(table(r));
  CHECK_FALSE(r.passed());
  CHECK(fails_only(r, {"vjp equals finite differences"}));
}

TEMPLATE_TEST_CASE("properties/verify: chunks that drop the carried state fail",
                   "[properties][verify]", float, double) {
  const auto r = report<TestType, flaw::chunks_drop_the_state>();
  INFO(table(r));
  CHECK_FALSE(r.passed());
  CHECK(fails_only(r, {"forward equals dense()", "pieces from a state equal one pass"}));
}

TEMPLATE_TEST_CASE("properties/verify: a chunked form that ignores the initial state fails",
                   "[properties][verify]", float, double) {
  const auto r = report<TestType, flaw::initial_state_ignored>();
  INFO(table(r));
  CHECK_FALSE(r.passed());
  CHECK(fails_only(r, {"pieces from a state equal one pass"}));
}

TEMPLATE_TEST_CASE("properties/verify: a packed gradient that crosses a boundary fails",
                   "[properties][verify]", float, double) {
  const auto r = report<TestType, flaw::packed_gradient_crosses_boundaries>();
  INFO(table(r));
  CHECK_FALSE(r.passed());
  CHECK(fails_only(r, {"packed vjp equals separate, to the bit"}));
}

TEMPLATE_TEST_CASE("properties/verify: a packed parameter's gradient of one sequence only fails",
                   "[properties][verify]", float, double) {
  const auto r = report<TestType, flaw::packed_parameter_sees_one_sequence>();
  INFO(table(r));
  CHECK_FALSE(r.passed());
  CHECK(fails_only(r, {"packed vjp equals the sum of separate"}));
}

}  // namespace leaky
