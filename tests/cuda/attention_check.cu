#include <ssmlib/kernels/cuda/attention_backward.cuh>
#include <ssmlib/kernels/cuda/attention_forward.cuh>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

/// @file
/// Checks softmax attention on a CUDA device against plain loops in double, and times it.
/// Exits with 0, with 1 after a failed check, with 2 without a device.

namespace {

using ssm::bf16;
using ssm::index_t;
using ssm::view;
namespace cuda = ssm::kernels::cuda;
using cuda::rung;

// ----------------------------------------------------------------------------------- memory

template <class T>
class buffer {
 public:
  explicit buffer(index_t n) : size_(n) {
    SSMLIB_CHECK_CUDA(cudaMalloc(&data_, std::max<index_t>(1, n) * sizeof(T)));
    SSMLIB_CHECK_CUDA(cudaMemset(data_, 0xff, n * sizeof(T)));  // NaN in every type
  }
  explicit buffer(const std::vector<T>& from) : buffer(static_cast<index_t>(from.size())) {
    SSMLIB_CHECK_CUDA(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~buffer() { cudaFree(data_); }
  buffer(const buffer&) = delete;
  buffer& operator=(const buffer&) = delete;

  [[nodiscard]] T* get() const { return data_; }
  [[nodiscard]] std::vector<T> host() const {
    std::vector<T> to(static_cast<std::size_t>(size_));
    SSMLIB_CHECK_CUDA(cudaMemcpy(to.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  index_t size_;
  T* data_ = nullptr;
};

template <class T>
view<T, 3> dense(T* data, index_t tokens, index_t heads, index_t size) {
  return {data, {tokens, heads, size}, {heads * size, size, 1}};
}

template <class T>
double value_of(T x) {
  return static_cast<double>(x);
}
double value_of(bf16 x) {
  return static_cast<double>(static_cast<float>(x));
}

template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// -------------------------------------------------------------------------------- reference

struct shape_case {
  index_t heads, q_heads, k_heads, v_heads, size, value_size;
  std::vector<index_t> lengths, key_lengths;  // key_lengths empty: as lengths
  bool packed, causal;
  index_t window = 0;
  rung most = rung::sm_90a;
  index_t poisoned = -1;  // a sequence of NaN, which must not reach the others
};

struct case_data {
  std::vector<index_t> offsets{0}, key_offsets{0};
  index_t max_length = 0, max_key_length = 0;
  std::vector<double> q, k, v, dy;
  std::vector<double> y, log_sum, dq, dk, dv;
};

/// One result head of one sequence, by the definition.
void reference_head(const shape_case& c, case_data& d, double scale, index_t i, index_t h,
                    std::vector<double>& dq, std::vector<double>& dk, std::vector<double>& dv) {
  const index_t D = c.size, P = c.value_size, H = c.heads;
  const index_t qh = h * c.q_heads / H, kh = h * c.k_heads / H, vh = h * c.v_heads / H;
  const index_t q0 = d.offsets[i], n = d.offsets[i + 1] - q0;
  const index_t k0 = d.key_offsets[i], m = d.key_offsets[i + 1] - k0;
  std::vector<double> p(static_cast<std::size_t>(m)), dp(p.size());
  for (index_t t = 0; t < n; ++t) {
    const index_t position = t + m - n;
    const index_t last = c.causal ? std::min(m, position + 1) : m;
    const index_t first = c.window > 0 ? std::max<index_t>(0, position + 1 - c.window) : 0;
    const double* q = &d.q[((q0 + t) * c.q_heads + qh) * D];
    const double* dy = &d.dy[((q0 + t) * H + h) * P];
    double* y = &d.y[((q0 + t) * H + h) * P];
    double high = -INFINITY, sum = 0, delta = 0;
    for (index_t s = first; s < last; ++s) {
      const double* k = &d.k[((k0 + s) * c.k_heads + kh) * D];
      double dot = 0;
      for (index_t f = 0; f < D; ++f)
        dot += q[f] * k[f];
      p[s] = dot * scale;
      high = std::max(high, p[s]);
    }
    for (index_t s = first; s < last; ++s)
      sum += p[s] = std::exp(p[s] - high);
    std::fill_n(y, P, 0.0);
    for (index_t s = first; s < last; ++s) {
      const double* v = &d.v[((k0 + s) * c.v_heads + vh) * P];
      p[s] /= sum;
      dp[s] = 0;
      for (index_t f = 0; f < P; ++f) {
        y[f] += p[s] * v[f];
        dp[s] += dy[f] * v[f];
        dv[((k0 + s) * H + h) * P + f] += p[s] * dy[f];
      }
      delta += p[s] * dp[s];
    }
    d.log_sum[h * d.offsets.back() + q0 + t] = first < last ? high + std::log(sum) : -INFINITY;
    for (index_t s = first; s < last; ++s) {
      const double ds = scale * p[s] * (dp[s] - delta);
      const double* k = &d.k[((k0 + s) * c.k_heads + kh) * D];
      for (index_t f = 0; f < D; ++f) {
        dq[((q0 + t) * H + h) * D + f] += ds * k[f];
        dk[((k0 + s) * H + h) * D + f] += ds * q[f];
      }
    }
  }
}

std::vector<double> sum_heads(const std::vector<double>& x, index_t heads, index_t groups,
                              index_t size) {
  const index_t tokens = static_cast<index_t>(x.size()) / (heads * size);
  std::vector<double> to(static_cast<std::size_t>(tokens * groups * size));
  for (index_t t = 0; t < tokens; ++t)
    for (index_t h = 0; h < heads; ++h)
      for (index_t f = 0; f < size; ++f)
        to[(t * groups + h * groups / heads) * size + f] += x[(t * heads + h) * size + f];
  return to;
}

template <class T>
case_data make_case(const shape_case& c, double scale, unsigned seed) {
  case_data d;
  for (std::size_t i = 0; i < c.lengths.size(); ++i) {
    const index_t keys = c.key_lengths.empty() ? c.lengths[i] : c.key_lengths[i];
    d.offsets.push_back(d.offsets.back() + c.lengths[i]);
    d.key_offsets.push_back(d.key_offsets.back() + keys);
    d.max_length = std::max(d.max_length, c.lengths[i]);
    d.max_key_length = std::max(d.max_key_length, keys);
  }
  const index_t n = d.offsets.back(), m = d.key_offsets.back();
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const auto fill = [&](std::vector<double>& x, index_t count) {
    x.resize(static_cast<std::size_t>(count));
    for (double& e : x)
      e = value_of(rounded<T>(normal(random)));
  };
  fill(d.q, n * c.q_heads * c.size);
  fill(d.k, m * c.k_heads * c.size);
  fill(d.v, m * c.v_heads * c.value_size);
  fill(d.dy, n * c.heads * c.value_size);
  d.y.assign(d.dy.size(), 0.0);
  d.log_sum.assign(static_cast<std::size_t>(n * c.heads), 0.0);
  std::vector<double> dq(n * c.heads * c.size), dk(m * c.heads * c.size),
      dv(m * c.heads * c.value_size);
  const index_t tasks = static_cast<index_t>(c.lengths.size()) * c.heads;
  const index_t workers = std::min<index_t>(tasks, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (index_t w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      for (index_t task = w; task < tasks; task += workers)
        reference_head(c, d, scale, task / c.heads, task % c.heads, dq, dk, dv);
    });
  }
  for (std::thread& t : threads)
    t.join();
  d.dq = sum_heads(dq, c.heads, c.q_heads, c.size);
  d.dk = sum_heads(dk, c.heads, c.k_heads, c.size);
  d.dv = sum_heads(dv, c.heads, c.v_heads, c.value_size);
  return d;
}

// ------------------------------------------------------------------------------------ checks

int failures = 0;

/// ||out - ref|| / ||ref|| over the tokens that are not poisoned; NaN where something is missing.
template <class T>
double error_of(const std::vector<T>& out, const std::vector<double>& ref,
                const std::vector<index_t>& offsets, index_t poisoned) {
  const index_t each = offsets.back() > 0 ? static_cast<index_t>(ref.size()) / offsets.back() : 0;
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < ref.size(); ++i) {
    const index_t token = static_cast<index_t>(i) / each;
    if (poisoned >= 0 && token >= offsets[poisoned] && token < offsets[poisoned + 1]) continue;
    const double x = value_of(out[i]), r = ref[i];
    if (x == r) continue;  // infinities
    difference += (x - r) * (x - r);
    norm += r * r;
  }
  if (norm == 0) return difference;
  return std::sqrt(difference / norm);
}

template <class T>
struct run_result {
  std::vector<T> y, dq, dk, dv;
  std::vector<cuda::attention_stat<T>> log_sum;
  [[nodiscard]] bool same_bits(const run_result& o) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    return same(y, o.y) && same(dq, o.dq) && same(dk, o.dk) && same(dv, o.dv) &&
           same(log_sum, o.log_sum);
  }
};

template <class T>
std::vector<T> converted(const std::vector<double>& x, const std::vector<index_t>& offsets,
                         index_t poisoned) {
  std::vector<T> to;
  to.reserve(x.size());
  for (const double e : x)
    to.push_back(rounded<T>(e));
  if (poisoned >= 0) {
    const std::size_t each = x.size() / static_cast<std::size_t>(offsets.back());
    for (std::size_t i = offsets[poisoned] * each; i < offsets[poisoned + 1] * each; ++i)
      to[i] = rounded<T>(std::numeric_limits<double>::quiet_NaN());
  }
  return to;
}

/// ||a - b|| / ||b|| over the numbers that are there.
double distance_of(const std::vector<bf16>& a, const std::vector<bf16>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = value_of(a[i]), y = value_of(b[i]);
    if (std::isnan(x) && std::isnan(y)) continue;
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return norm == 0 ? difference : std::sqrt(difference / norm);
}

template <class T>
run_result<T> run_case(const shape_case& c, const case_data& d, double scale) {
  const index_t n = d.offsets.back(), m = d.key_offsets.back(), H = c.heads;
  const buffer<T> q(converted<T>(d.q, d.offsets, c.poisoned)),
      k(converted<T>(d.k, d.key_offsets, c.poisoned)),
      v(converted<T>(d.v, d.key_offsets, c.poisoned)),
      dy(converted<T>(d.dy, d.offsets, c.poisoned));
  const buffer<index_t> offsets(d.offsets), key_offsets(d.key_offsets);
  cuda::attention_problem<T> p;
  p.q = dense<const T>(q.get(), n, c.q_heads, c.size);
  p.k = dense<const T>(k.get(), m, c.k_heads, c.size);
  p.v = dense<const T>(v.get(), m, c.v_heads, c.value_size);
  p.heads = H;
  p.sequences = static_cast<index_t>(c.lengths.size());
  p.max_length = d.max_length;
  if (c.packed) p.offsets = offsets.get();
  if (!c.key_lengths.empty()) {
    p.max_key_length = d.max_key_length;
    if (c.packed) p.key_offsets = key_offsets.get();
  }
  p.scale = scale;
  p.causal = c.causal;
  p.window = c.window;
  p.most = c.most;
  const buffer<T> y(n * H * c.value_size), dq(n * c.q_heads * c.size), dk(m * c.k_heads * c.size),
      dv(m * c.v_heads * c.value_size);
  using stat = cuda::attention_stat<T>;
  const buffer<stat> log_sum(n * H);
  const buffer<unsigned char> workspace(
      static_cast<index_t>(cuda::attention_backward_workspace_bytes(p)));
  const view<T, 3> y_view = dense(y.get(), n, H, c.value_size);
  const view<stat, 2> sums{log_sum.get(), {H, n}, {n, 1}};
  cuda::attention_forward<T>(nullptr, p, y_view, sums);
  cuda::attention_backward<T>(
      nullptr, p, y_view, sums, dense<const T>(dy.get(), n, H, c.value_size),
      dense(dq.get(), n, c.q_heads, c.size), dense(dk.get(), m, c.k_heads, c.size),
      dense(dv.get(), m, c.v_heads, c.value_size), workspace.get());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  return {y.host(), dq.host(), dk.host(), dv.host(), log_sum.host()};
}

template <class T>
run_result<T> check(const char* name, const shape_case& c, const case_data& d, double scale) {
  const run_result<T> out = run_case<T>(c, d, scale), again = run_case<T>(c, d, scale);
  const double e[5] = {error_of(out.y, d.y, d.offsets, c.poisoned),
                       c.poisoned >= 0 ? 0 : error_of(out.log_sum, d.log_sum, d.offsets, -1),
                       error_of(out.dq, d.dq, d.offsets, c.poisoned),
                       error_of(out.dk, d.dk, d.key_offsets, c.poisoned),
                       error_of(out.dv, d.dv, d.key_offsets, c.poisoned)};
  // Rounding: the result's and the weights' to bf16 (2^-9 each, not all of one sign).
  const double unit = std::is_same_v<T, bf16> ? 5e-3 : std::is_same_v<T, float> ? 3e-6 : 1e-14;
  const bool bits = out.same_bits(again);
  const bool good = bits && e[0] < unit && e[1] < (std::is_same_v<T, double> ? 1e-14 : 1e-6) &&
                    e[2] < 2 * unit && e[3] < 2 * unit && e[4] < 2 * unit;
  if (!good) ++failures;
  std::printf("%-4s %-34s %8.1e %8.1e %8.1e %8.1e %8.1e %s\n", good ? "ok" : "FAIL", name, e[0],
              e[1], e[2], e[3], e[4], bits ? "" : "bits differ between runs");
  return out;
}
template <class T>
void check(const char* name, const shape_case& c, unsigned seed) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.size));
  check<T>(name, c, make_case<T>(c, scale, seed), scale);
}

/// Both rungs of the tensor cores, where the card has both, and how far they are apart.
void check_rungs(const char* what, shape_case c, unsigned seed) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.size));
  const case_data d = make_case<bf16>(c, scale, seed);
  const std::string name = "bf16 D" + std::to_string(c.size) + " " + what;
  c.most = rung::sm_80;
  const run_result<bf16> low = check<bf16>(("80  " + name).c_str(), c, d, scale);
  if (cuda::usable_rung(rung::sm_90a) != rung::sm_90a) return;
  c.most = rung::sm_90a;
  const run_result<bf16> high = check<bf16>(("90a " + name).c_str(), c, d, scale);
  const double e[4] = {distance_of(low.y, high.y), distance_of(low.dq, high.dq),
                       distance_of(low.dk, high.dk), distance_of(low.dv, high.dv)};
  const bool good = e[0] < 4e-3 && e[1] < 8e-3 && e[2] < 8e-3 && e[3] < 8e-3;
  if (!good) ++failures;
  std::printf("%-4s %-34s %8.1e %8s %8.1e %8.1e %8.1e\n", good ? "ok" : "FAIL", "  80 to 90a", e[0],
              "", e[1], e[2], e[3]);
}

void check_all() {
  using v = std::vector<index_t>;
  std::printf("%-4s %-34s %8s %8s %8s %8s %8s\n", "", "case", "y", "log_sum", "dq", "dk", "dv");
  check<double>("f64 causal 2x37 D40", {4, 4, 2, 2, 40, 40, v{37, 37}, {}, false, true}, 1);
  check<double>("f64 window heads 4/2/1 D24 P70",
                {4, 2, 1, 4, 24, 70, v{97, 0, 1, 130}, {}, true, true, 33}, 2);
  check<float>("f32 causal 2x130 D64", {4, 4, 2, 2, 64, 64, v{130, 130}, {}, false, true}, 3);
  check<float>("f32 full 3 packed D80 P200", {6, 6, 1, 3, 80, 200, v{65, 1, 200}, {}, true, false},
               4);
  check<float>("f32 window keys longer D256",
               {2, 2, 2, 2, 256, 256, v{30, 64}, v{130, 100}, true, true, 50}, 5);
  check<float>("f32 keys shorter D31", {2, 2, 2, 2, 31, 31, v{90, 64}, v{40, 30}, true, true}, 6);
  check<bf16>("bf16 general T1009 H7 D40 P24",
              {7, 7, 7, 7, 40, 24, v{1009}, {}, false, true, 0, rung::general}, 7);
  for (const index_t size : {64, 96, 128}) {
    check_rungs("full 2x256", {4, 4, 2, 2, size, size, v{256, 256}, {}, false, false}, 10);
    check_rungs("causal 2x512 8/2", {8, 8, 2, 2, size, size, v{512, 512}, {}, false, true}, 11);
    check_rungs("causal 1x1", {1, 1, 1, 1, size, size, v{1}, {}, false, true}, 12);
    check_rungs("full 3x333 MQA", {4, 4, 1, 1, size, size, v{333, 333, 333}, {}, false, false}, 13);
    check_rungs("window 1x700", {2, 2, 2, 2, size, size, v{700}, {}, false, true, 130}, 14);
    check_rungs("window 1 1x300", {2, 2, 2, 2, size, size, v{300}, {}, false, true, 1}, 15);
    check_rungs("causal packed", {4, 4, 2, 2, size, size, v{100, 0, 1, 400, 129}, {}, true, true},
                16);
    check_rungs("full packed, NaN beside",
                {4, 4, 2, 2, size, size, v{100, 70, 1, 300}, {}, true, false, 0, rung::sm_90a, 1},
                17);
    check_rungs("causal packed, NaN beside",
                {4, 4, 2, 2, size, size, v{100, 70, 1, 300}, {}, true, true, 0, rung::sm_90a, 3},
                18);
    check_rungs("keys longer 2x(100, 333)",
                {2, 2, 1, 1, size, size, v{100, 100}, v{333, 333}, false, true}, 19);
    check_rungs("keys shorter packed",
                {2, 2, 2, 2, size, size, v{200, 300, 5}, v{70, 130, 0}, true, true}, 20);
    check_rungs("window keys longer packed",
                {2, 2, 2, 2, size, size, v{200, 30}, v{270, 300}, true, true, 77}, 21);
  }
  check_rungs("P24 T1009 H7", {7, 7, 7, 7, 40, 24, v{1009}, {}, false, true}, 30);
  check_rungs("P112", {6, 6, 3, 3, 80, 112, v{257, 257}, {}, false, true}, 31);
  check_rungs("causal", {4, 4, 2, 2, 256, 256, v{300, 300}, {}, false, true}, 32);
  check_rungs("P128 packed", {4, 4, 2, 2, 192, 128, v{300, 131}, {}, true, false}, 33);
  check_rungs("heads 4/2/1", {4, 2, 1, 4, 64, 64, v{200}, {}, false, true}, 34);
}

// -------------------------------------------------------- large sizes, against the general path

__global__ void fill_kernel(bf16* to, index_t n, unsigned seed) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < n; i += step) {
    float sum = -6.0f;  // twelve uniform numbers: nearly normal
    unsigned long long x = static_cast<unsigned long long>(i) * 0x9e3779b97f4a7c15ull + seed;
    for (int k = 0; k < 3; ++k) {
      x ^= x >> 31;
      x *= 0xbf58476d1ce4e5b9ull;
      x ^= x >> 29;
      for (int e = 0; e < 4; ++e)
        sum += static_cast<float>((x >> (16 * e)) & 0xffff) / 65536.0f;
    }
    to[i] = cuda::narrow<bf16>(sum);
  }
}
__global__ void widen_kernel(float* to, const bf16* from, index_t n) {
  const index_t step = static_cast<index_t>(gridDim.x) * blockDim.x;
  for (index_t i = blockIdx.x * index_t{blockDim.x} + threadIdx.x; i < n; i += step)
    to[i] = cuda::widen(from[i]);
}

/// A rectangular batch of random numbers on the device, with room for everything.
template <class T>
struct large_problem {
  index_t tokens, heads, groups, size;
  buffer<T> q, k, v, dy, y, dq, dk, dv;
  buffer<float> log_sum;
  cuda::attention_problem<T> problem;
  buffer<unsigned char> workspace{0};

  large_problem(index_t sequences, index_t length, index_t h, index_t g, index_t d, index_t window,
                rung most = rung::sm_90a)
      : tokens(sequences * length),
        heads(h),
        groups(g),
        size(d),
        q(tokens * h * d),
        k(tokens * g * d),
        v(tokens * g * d),
        dy(tokens * h * d),
        y(tokens * h * d),
        dq(tokens * h * d),
        dk(tokens * g * d),
        dv(tokens * g * d),
        log_sum(tokens * h),
        problem(make(sequences, length, window, most)),
        workspace(static_cast<index_t>(cuda::attention_backward_workspace_bytes(problem))) {}

  cuda::attention_problem<T> make(index_t sequences, index_t length, index_t window,
                                  rung most) const {
    cuda::attention_problem<T> p;
    p.most = most;
    p.q = dense<const T>(q.get(), tokens, heads, size);
    p.k = dense<const T>(k.get(), tokens, groups, size);
    p.v = dense<const T>(v.get(), tokens, groups, size);
    p.heads = heads;
    p.sequences = sequences;
    p.max_length = length;
    p.scale = 1.0 / std::sqrt(static_cast<double>(size));
    p.causal = true;
    p.window = window;
    return p;
  }
  [[nodiscard]] view<float, 2> sums() const {
    return {log_sum.get(), {heads, tokens}, {tokens, 1}};
  }
  void forward(cudaStream_t stream) const {
    cuda::attention_forward<T>(stream, problem, dense(y.get(), tokens, heads, size), sums());
  }
  void backward(cudaStream_t stream, bool queries = true, bool keys = true) const {
    const auto optional = [&](bool wanted, const buffer<T>& to, index_t h) {
      return wanted ? dense(to.get(), tokens, h, size) : view<T, 3>{};
    };
    cuda::attention_backward<T>(stream, problem, dense<const T>(y.get(), tokens, heads, size),
                                sums(), dense<const T>(dy.get(), tokens, heads, size),
                                optional(queries, dq, heads), optional(keys, dk, groups),
                                optional(keys, dv, groups), workspace.get());
  }
};

void fill(const large_problem<bf16>& p) {
  const index_t n = p.tokens * p.heads * p.size, m = p.tokens * p.groups * p.size;
  fill_kernel<<<1024, 256>>>(p.q.get(), n, 1);
  fill_kernel<<<1024, 256>>>(p.k.get(), m, 2);
  fill_kernel<<<1024, 256>>>(p.v.get(), m, 3);
  fill_kernel<<<1024, 256>>>(p.dy.get(), n, 4);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

double distance(const buffer<bf16>& a, const buffer<float>& b) {
  const std::vector<bf16> x = a.host();
  const std::vector<float> y = b.host();
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double d = value_of(x[i]) - y[i];
    difference += d * d;
    norm += double{y[i]} * y[i];
  }
  return std::sqrt(difference / norm);
}

void check_large(const char* name, index_t sequences, index_t length, index_t heads, index_t groups,
                 index_t size, index_t window, rung most) {
  const large_problem<bf16> p(sequences, length, heads, groups, size, window, most);
  const large_problem<float> r(sequences, length, heads, groups, size, window);
  fill(p);
  const index_t n = p.tokens * heads * size, m = p.tokens * groups * size;
  widen_kernel<<<1024, 256>>>(r.q.get(), p.q.get(), n);
  widen_kernel<<<1024, 256>>>(r.k.get(), p.k.get(), m);
  widen_kernel<<<1024, 256>>>(r.v.get(), p.v.get(), m);
  widen_kernel<<<1024, 256>>>(r.dy.get(), p.dy.get(), n);
  p.forward(nullptr);
  p.backward(nullptr);
  r.forward(nullptr);
  r.backward(nullptr);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const double e[4] = {distance(p.y, r.y), distance(p.dq, r.dq), distance(p.dk, r.dk),
                       distance(p.dv, r.dv)};
  const bool good = e[0] < 5e-3 && e[1] < 1e-2 && e[2] < 1e-2 && e[3] < 1e-2;
  if (!good) ++failures;
  std::printf("%-4s %-34s %8.1e %8s %8.1e %8.1e %8.1e\n", good ? "ok" : "FAIL", name, e[0], "",
              e[1], e[2], e[3]);
}

/// The rungs of the tensor cores that this card has.
std::vector<rung> rungs() {
  if (cuda::usable_rung(rung::sm_90a) == rung::sm_90a) return {rung::sm_90a, rung::sm_80};
  return {rung::sm_80};
}

// ----------------------------------------------------------------------------------- timings

/// Median milliseconds of replays of a graph of `work`, after a pause: long heavy kernels reach the
/// card's power limit, and what follows them at once runs at a lower clock.
double time_of(const std::function<void(cudaStream_t)>& work, int repeats = 25) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  SSMLIB_CHECK_CUDA(cudaStreamCreate(&stream));
  SSMLIB_CHECK_CUDA(cudaEventCreate(&begin));
  SSMLIB_CHECK_CUDA(cudaEventCreate(&end));
  work(stream);  // sets attributes outside the capture
  SSMLIB_CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  work(stream);
  SSMLIB_CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  SSMLIB_CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; ++i) {
    float ms = 0;
    SSMLIB_CHECK_CUDA(cudaEventRecord(begin, stream));
    SSMLIB_CHECK_CUDA(cudaGraphLaunch(replay, stream));
    SSMLIB_CHECK_CUDA(cudaEventRecord(end, stream));
    SSMLIB_CHECK_CUDA(cudaEventSynchronize(end));
    SSMLIB_CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

struct peer_times {
  index_t size, length;
  double flash_forward, cudnn_forward, flash_both, cudnn_both;
};

void time_all(rung most) {
  const index_t bytes = index_t{1} << 30;
  double rate = 0;
  {
    const buffer<unsigned char> a(bytes), b(bytes);
    const double ms = time_of([&](cudaStream_t s) {
      SSMLIB_CHECK_CUDA(cudaMemcpyAsync(b.get(), a.get(), bytes, cudaMemcpyDeviceToDevice, s));
    });
    rate = 2e-9 * static_cast<double>(bytes) / ms;  // TB/s
  }
  std::printf(
      "\nrung %s; copy %.2f TB/s; causal, 32 heads, 8 key heads, 16384 tokens; milliseconds\n",
      most == rung::sm_90a ? "sm_90a" : "sm_80", rate);
  std::printf("%4s %6s | %7s %6s %7s %7s %6s | %7s %6s %7s %7s | %7s %7s %7s\n", "D", "T", "fwd",
              "TF/s", "flash-2", "cuDNN", "floor%", "bwd", "TF/s", "dq", "dk+dv", "fwd+bwd",
              "flash-2", "cuDNN");
  const peer_times peers[] = {{128, 2048, 0.889, 0.511, 4.23, 2.28},
                              {128, 16384, 6.59, 3.75, 24.2, 14.5},
                              {64, 2048, 0.519, 0.347, 2.38, 2.37},
                              {64, 16384, 3.63, 2.33, 16.5, 9.73}};
  for (const peer_times& peer : peers) {
    const large_problem<bf16> p(16384 / peer.length, peer.length, 32, 8, peer.size, 0, most);
    fill(p);
    const double forward = time_of([&](cudaStream_t s) { p.forward(s); });
    const double backward = time_of([&](cudaStream_t s) { p.backward(s); });
    const double queries = time_of([&](cudaStream_t s) { p.backward(s, true, false); });
    const double keys = time_of([&](cudaStream_t s) { p.backward(s, false, true); });
    const double pairs = 16384.0 * 32 * (static_cast<double>(peer.length) + 1) / 2;
    const double flops = 4 * pairs * static_cast<double>(peer.size) * 1e-9;  // at ms: TFLOP/s
    const double io =
        16384.0 * static_cast<double>(peer.size) * 2 * (32 + 8) * 2 + 16384.0 * 32 * 4;
    // The tensor cores' rate at the clock of this kind of card, 989 TFLOP/s, or the copy's.
    const double floor = std::max(flops / 989, io * 1e-9 / rate);
    std::printf(
        "%4d %6d | %7.3f %6.0f %7.3f %7.3f %6.0f | %7.3f %6.0f %7.3f %7.3f | %7.3f %7.2f "
        "%7.2f\n",
        static_cast<int>(peer.size), static_cast<int>(peer.length), forward, flops / forward,
        peer.flash_forward, peer.cudnn_forward, 100 * floor / forward, backward,
        2.5 * flops / backward, queries, keys, forward + backward, peer.flash_both,
        peer.cudnn_both);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("attention_check: no CUDA device, nothing was checked\n");
    return 2;
  }
  try {
    const std::string only = argc > 1 ? argv[1] : "";  // --small, as under a sanitizer, or --time
    if (only != "--time") check_all();
    if (only.empty()) {
      for (const rung r : rungs()) {
        const std::string s = r == rung::sm_90a ? "90a " : "80  ";
        check_large((s + "bf16 1x2048 32/8 D128").c_str(), 1, 2048, 32, 8, 128, 0, r);
        check_large((s + "bf16 1x4096 8/2 D64").c_str(), 1, 4096, 8, 2, 64, 0, r);
        check_large((s + "bf16 T 2^20+1 window 200").c_str(), 1, (1 << 20) + 1, 1, 1, 64, 200, r);
        check_large((s + "bf16 70001 sequences of 5").c_str(), 70001, 5, 1, 1, 64, 0, r);
      }
    }
    for (const rung r : rungs())
      if (only != "--small") time_all(r);
  } catch (const std::exception& e) {
    std::printf("FAIL %s\n", e.what());
    return 1;
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
