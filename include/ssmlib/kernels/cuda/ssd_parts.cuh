#pragma once

#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/device.cuh>
#include <ssmlib/kernels/cuda/rung.cuh>
#include <ssmlib/kernels/cuda/ssd.hpp>

#include <cmath>
#include <string>

/// @file
/// What the kernels of scalar-gated recurrences share: operands as device code sees them, a token's
/// decay and weight, checks of sizes.

namespace ssm::kernels::cuda::detail {

/// An operand of (tokens, groups, columns), (tokens, groups) or (groups), absent where null.
template <class T>
struct ssd_operand {
  T* data = nullptr;
  index_t token = 0, group = 0, column = 0;  // strides
  int heads_a_group = 1;

  ssd_operand() = default;
  ssd_operand(const view<T, 3>& v, index_t heads)
      : data(v.data), token(v.stride(0)), group(v.stride(1)), column(v.stride(2)) {
    if (v) heads_a_group = static_cast<int>(heads / v.extent(1));
  }
  ssd_operand(const view<T, 2>& v, index_t heads)
      : data(v.data), token(v.stride(0)), group(v.stride(1)) {
    if (v) heads_a_group = static_cast<int>(heads / v.extent(1));
  }
  ssd_operand(const view<T, 1>& v, index_t heads) : data(v.data), group(v.stride(0)) {
    if (v) heads_a_group = static_cast<int>(heads / v.extent(0));
  }

  /// The column 0 of token 0 for head h; a null operand stays null.
  SSMLIB_DEVICE T* head(int h) const {
    return data == nullptr ? nullptr : data + h / heads_a_group * group;
  }
};

template <class T>
struct ssd_state_operand {
  T* data = nullptr;
  index_t sequence = 0, head = 0, row = 0;

  ssd_state_operand() = default;
  explicit ssd_state_operand(const view<T, 4>& v)
      : data(v.data), sequence(v.stride(0)), head(v.stride(1)), row(v.stride(2)) {}

  SSMLIB_DEVICE T* at(index_t s, index_t h) const {
    return data == nullptr ? nullptr : data + s * sequence + h * head;
  }
};

/// ssd_problem as device code takes it.
template <class T>
struct ssd_arguments {
  using real = accum_t<T>;

  int heads, key_size, features;
  ssd_operand<const T> q, k, x;
  ssd_operand<const T> dt;
  ssd_operand<const real> log_a, weight, gamma, d, dt_bias, a;
  real low, high, alpha;
  const index_t* offsets;
  index_t sequences, max_length;

  explicit ssd_arguments(const ssd_problem<T>& p)
      : heads(static_cast<int>(p.heads)),
        key_size(static_cast<int>(p.key_size())),
        features(static_cast<int>(p.features())),
        q(p.q, p.heads),
        k(p.k, p.heads),
        x(p.x, p.heads),
        dt(p.dt, p.heads),
        log_a(p.log_a, p.heads),
        weight(p.weight, p.heads),
        gamma(p.gamma, p.heads),
        d(p.d, p.heads),
        dt_bias(p.dt_bias, p.heads),
        a(p.a, p.heads),
        low(p.low),
        high(p.high),
        alpha(p.alpha),
        offsets(p.offsets),
        sequences(p.sequences),
        max_length(p.max_length) {}

  SSMLIB_DEVICE index_t begin(index_t s) const {
    return offsets == nullptr ? s * max_length : offsets[s];
  }
  SSMLIB_DEVICE index_t end(index_t s) const { return begin(s + 1); }
};

/// The natural logarithm of a token's decay, and its weight.
template <class R>
struct ssd_step {
  R log_a, weight;
};

/// What a token's step is computed from, as it lies in memory.
template <class T>
struct ssd_raw_step {
  T dt;
  accum_t<T> log_a, weight;
};

/// Where the steps of one head come from. Loading and computing are apart, so that a kernel can
/// load a chunk ahead.
template <class T>
class ssd_steps {
 public:
  using real = accum_t<T>;

  SSMLIB_DEVICE ssd_steps(const ssd_arguments<T>& p, int h)
      : dt_(p.dt.head(h)),
        log_a_(p.log_a.head(h)),
        weight_(p.weight.head(h)),
        low_(p.low),
        high_(p.high) {
    stride_ = dt_ != nullptr ? p.dt.token : p.log_a.token;
    weight_stride_ = p.weight.token;
    if (dt_ != nullptr) {
      constant_ = p.dt_bias.data == nullptr ? real(0) : *p.dt_bias.head(h);
      a_ = *p.a.head(h);
    } else if (p.gamma.data != nullptr) {
      constant_ = static_cast<real>(log(static_cast<double>(*p.gamma.head(h))));
    }
  }

  [[nodiscard]] SSMLIB_DEVICE ssd_raw_step<T> load(index_t t) const {
    ssd_raw_step<T> r{T{}, constant_, real(1)};
    if (dt_ != nullptr) r.dt = dt_[t * stride_];
    if (log_a_ != nullptr) r.log_a = log_a_[t * stride_];
    if (weight_ != nullptr) r.weight = weight_[t * weight_stride_];
    return r;
  }
  [[nodiscard]] SSMLIB_DEVICE ssd_step<real> compute(const ssd_raw_step<T>& loaded) const {
    if (dt_ == nullptr) return {loaded.log_a, loaded.weight};
    const real raw = softplus(widen(loaded.dt) + constant_);
    const real step = raw < low_ ? low_ : raw > high_ ? high_ : raw;  // NaN stays NaN
    return {a_ * step, step};
  }
  /// d step / d dt at a loaded value; zero where the step is clamped.
  [[nodiscard]] SSMLIB_DEVICE real slope(const ssd_raw_step<T>& loaded) const {
    const real r = widen(loaded.dt) + constant_, raw = softplus(r);
    if (raw < low_ || raw > high_) return real(0);
    return r > real(20) ? real(1) : real(1) / (real(1) + exp(-r));
  }
  [[nodiscard]] SSMLIB_DEVICE real a() const { return a_; }
  [[nodiscard]] SSMLIB_DEVICE bool discretizes() const { return dt_ != nullptr; }

 private:
  /// The threshold is that of the published models.
  SSMLIB_DEVICE static real softplus(real r) { return r > real(20) ? r : log1p(exp(r)); }

  const T* dt_;
  const real *log_a_, *weight_;
  index_t stride_, weight_stride_;
  real low_, high_, constant_ = real(0), a_ = real(0);
};

// -------------------------------------------------------------------------------------- checks

[[noreturn]] inline void ssd_fail(const std::string& what) {
  throw shape_error("ssm: ssd on cuda: " + what);
}
inline void ssd_check_groups(const char* name, index_t groups, index_t heads) {
  if (groups >= 1 && heads % groups == 0) return;
  ssd_fail(std::string(name) + " has " + std::to_string(groups) + " groups for " +
           std::to_string(heads) + " heads; the groups must divide the heads");
}
template <class T, int R>
void ssd_check_tokens(const char* name, const view<T, R>& v, index_t tokens) {
  if (!v || v.extent(0) == tokens) return;
  ssd_fail(std::string(name) + " has " + std::to_string(v.extent(0)) + " tokens, q has " +
           std::to_string(tokens));
}

template <class T>
void ssd_check(const ssd_problem<T>& p) {
  const index_t tokens = p.q.extent(0);
  if (p.k.extent(2) != p.q.extent(2)) {
    ssd_fail("q has key size " + std::to_string(p.q.extent(2)) + ", k has " +
             std::to_string(p.k.extent(2)));
  }
  if (p.key_size() < 1 || p.features() < 1) ssd_fail("key size and features must be at least 1");
  ssd_check_tokens("k", p.k, tokens);
  ssd_check_tokens("x", p.x, tokens);
  ssd_check_tokens("log_a", p.log_a, tokens);
  ssd_check_tokens("weight", p.weight, tokens);
  ssd_check_tokens("dt", p.dt, tokens);
  if (p.offsets == nullptr && tokens != p.sequences * p.max_length) {
    ssd_fail(std::to_string(p.sequences) + " sequences of " + std::to_string(p.max_length) +
             " tokens are not the " + std::to_string(tokens) + " tokens of q");
  }
  ssd_check_groups("q", p.q.extent(1), p.heads);
  ssd_check_groups("k", p.k.extent(1), p.heads);
  ssd_check_groups("x", p.x.extent(1), p.heads);
  if (p.log_a) ssd_check_groups("log_a", p.log_a.extent(1), p.heads);
  if (p.weight) ssd_check_groups("weight", p.weight.extent(1), p.heads);
  if (p.gamma) ssd_check_groups("gamma", p.gamma.extent(0), p.heads);
  if (p.d) ssd_check_groups("d", p.d.extent(0), p.heads);
  if (p.dt) ssd_check_groups("dt", p.dt.extent(1), p.heads);
  if (p.dt_bias) ssd_check_groups("dt_bias", p.dt_bias.extent(0), p.heads);
  if (p.a) ssd_check_groups("a", p.a.extent(0), p.heads);
  if (p.log_a && p.gamma) ssd_fail("log_a and gamma are both given; give one");
  if (p.dt && (p.log_a || p.gamma || p.weight)) {
    ssd_fail("dt is given with log_a, gamma or weight, which it stands for; give one of them");
  }
  if (p.dt && !p.a) ssd_fail("dt is given without a");
}
template <class T, class S>
void ssd_check_state(const ssd_problem<T>& p, const char* name, const view<S, 4>& s) {
  if (!s) return;
  if (s.extents != shape<4>{p.sequences, p.heads, p.key_size(), p.features()} || s.stride(3) != 1) {
    ssd_fail(std::string(name) + " is " + to_string(s.extents) +
             ", wanted (sequences x heads x key size x features) with a unit inner stride");
  }
}

template <class T>
void ssd_check_gradients(const ssd_problem<T>& p, const view<const T, 3>& dy,
                         const ssd_gradients<T>& g) {
  if (dy.extents != shape<3>{p.q.extent(0), p.heads, p.features()}) {
    ssd_fail("dy is " + to_string(dy.extents) + ", wanted (tokens x heads x features)");
  }
  const auto same = [](const char* name, const auto& gradient, const auto& operand) {
    if (!gradient || gradient.extents == operand.extents) return;
    ssd_fail("the gradient of " + std::string(name) + " is " + to_string(gradient.extents) +
             ", the operand is " + to_string(operand.extents));
  };
  same("q", g.q, p.q), same("k", g.k, p.k), same("x", g.x, p.x), same("dt", g.dt, p.dt);
  same("log_a", g.log_a, p.log_a), same("weight", g.weight, p.weight);
  same("gamma", g.gamma, p.gamma), same("d", g.d, p.d), same("a", g.a, p.a);
  same("dt_bias", g.dt_bias, p.dt_bias);
  ssd_check_state(p, "the gradient of the final state", g.d_final);
  ssd_check_state(p, "the gradient of the initial state", g.d_initial);
}

/// Blocks of a launch, which lie along the first dimension of the grid.
inline unsigned ssd_blocks(index_t n) {
  if (n > std::numeric_limits<int>::max()) {
    ssd_fail(std::to_string(n) + " blocks are more than a grid takes; cut the batch");
  }
  return static_cast<unsigned>(n);
}

}  // namespace ssm::kernels::cuda::detail
