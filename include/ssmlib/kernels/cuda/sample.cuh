#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/sample.hpp>

#include <cstdint>
#include <limits>
#include <string>

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int sample_threads = 1024;

/// The order of floats as the order of unsigned numbers; -0 and 0 are one.
SSMLIB_DEVICE std::uint32_t key_of(float x) {
  const std::uint32_t u = __float_as_uint(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/// In [0, 1): random_draw of decode/sampling.hpp, bit for bit.
SSMLIB_DEVICE double draw_of(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  std::uint32_t c0 = static_cast<std::uint32_t>(counter),
                c1 = static_cast<std::uint32_t>(counter >> 32),
                c2 = static_cast<std::uint32_t>(stream),
                c3 = static_cast<std::uint32_t>(stream >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c0, b = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(b);
    c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>((std::uint64_t{c0} << 21) ^ (c1 >> 11)) * 0x1p-53;
}

using fixed_t = unsigned long long;

struct sample_shared {
  fixed_t bins[256];
  fixed_t sums[sample_threads / 32];
  std::uint32_t keys[sample_threads / 32];
  int places[sample_threads / 32];
  fixed_t found[2];
  std::uint32_t key;
  int place;
};

/// The sum of `mine` over the threads before this one; the total of all goes to `total`.
SSMLIB_DEVICE fixed_t sum_before(fixed_t mine, sample_shared& shared, fixed_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fixed_t inclusive = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const fixed_t other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();
  if (lane == 31) shared.sums[warp] = inclusive;
  __syncthreads();
  fixed_t before = 0;
  total = 0;
  for (int w = 0; w < sample_threads / 32; ++w) {
    if (w < warp) before += shared.sums[w];
    total += shared.sums[w];
  }
  return before + inclusive - mine;
}

/// Tokens are kept whose logit has a key above `key`, and the first `equals` of those with it.
struct kept_tokens {
  std::uint32_t key = 0;
  fixed_t equals = ~fixed_t{0};
};

template <class T>
class row_sampler {
 public:
  SSMLIB_DEVICE row_sampler(const T* logits, int count, float temperature, sample_shared& shared)
      : logits_(logits), count_(count), inverse_(1.0f / temperature), shared_(shared) {}

  /// The first largest logit.
  SSMLIB_DEVICE int largest() {
    std::uint32_t best = 0;
    int place = std::numeric_limits<int>::max();
    for (int v = threadIdx.x; v < count_; v += sample_threads) {
      const std::uint32_t k = key_of(widen(logits_[v]));
      if (k > best) best = k, place = v;
    }
    for (int step = 16; step > 0; step /= 2) {
      const std::uint32_t k = __shfl_xor_sync(0xffffffffu, best, step);
      const int p = __shfl_xor_sync(0xffffffffu, place, step);
      if (k > best || (k == best && p < place)) best = k, place = p;
    }
    if (threadIdx.x % 32 == 0) {
      shared_.keys[threadIdx.x / 32] = best;
      shared_.places[threadIdx.x / 32] = place;
    }
    __syncthreads();
    for (int w = 0; w < sample_threads / 32; ++w) {
      const std::uint32_t k = shared_.keys[w];
      if (k > best || (k == best && shared_.places[w] < place)) best = k, place = shared_.places[w];
    }
    // NaNs alone may leave no place.
    place = min(place, count_ - 1);
    top_ = widen(logits_[place]);
    return place;
  }

  /// Keeps the fewest of the most likely kept tokens whose measure reaches `goal`, where the
  /// measure is a count, or the weight.
  SSMLIB_DEVICE void keep_until(fixed_t goal, bool weigh) {
    std::uint32_t prefix = 0;
    fixed_t above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      if (threadIdx.x < 256) shared_.bins[threadIdx.x] = 0;
      __syncthreads();
      const std::uint32_t mask = shift == 24 ? 0 : ~std::uint32_t{0} << (shift + 8);
      for (int v = threadIdx.x; v < count_; v += sample_threads) {
        const std::uint32_t k = key_of(widen(logits_[v]));
        // Of those that equal the last key kept, the count decides below.
        if ((k & mask) == prefix && k >= kept_.key) {
          atomicAdd(&shared_.bins[k >> shift & 255], weigh ? weight(v) : fixed_t{1});
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        fixed_t sum = above;
        int bin = 255;
        while (bin > 0 && sum + shared_.bins[bin] < goal)
          sum += shared_.bins[bin--];
        shared_.found[0] = sum;
        shared_.key = prefix | static_cast<std::uint32_t>(bin) << shift;
      }
      __syncthreads();
      above = shared_.found[0];
      prefix = shared_.key;
      __syncthreads();
    }
    const fixed_t each = weigh ? weight_of(prefix) : fixed_t{1};
    const fixed_t missing = goal > above ? goal - above : 0;
    fixed_t equals = each > 0 ? (missing + each - 1) / each : 1;
    if (prefix == kept_.key && kept_.equals < equals) equals = kept_.equals;
    if (prefix >= kept_.key) kept_ = {prefix, equals > 0 ? equals : 1};
  }
  /// Keeps tokens of at least this weight.
  SSMLIB_DEVICE void keep_from(fixed_t least) { least_ = least; }

  /// The sum of the weights of all kept tokens.
  SSMLIB_DEVICE fixed_t total() {
    fixed_t all, mine = 0;
    for_mine([&](int, fixed_t w) {
      mine += w;
      return true;
    });
    sum_before(mine, shared_, all);
    return all;
  }
  /// The token at u, in [0, 1), of the cumulative distribution.
  SSMLIB_DEVICE int pick(double u) {
    fixed_t all, mine = 0;
    int last = -1;
    for_mine([&](int v, fixed_t w) {
      mine += w;
      if (w > 0) last = v;
      return true;
    });
    const fixed_t before = sum_before(mine, shared_, all);
    const auto target = static_cast<fixed_t>(u * static_cast<double>(all));
    if (threadIdx.x == 0) shared_.place = 0;
    __syncthreads();
    if (mine > 0 && target >= before && (target < before + mine || before + mine == all)) {
      fixed_t sum = before;
      int place = last;
      for_mine([&](int v, fixed_t w) {
        sum += w;
        if (w > 0 && target < sum) place = v;
        return !(w > 0 && target < sum);
      });
      shared_.place = place;
    }
    __syncthreads();
    return shared_.place;
  }

 private:
  [[nodiscard]] SSMLIB_DEVICE fixed_t weight_at(float x) const {
    return static_cast<fixed_t>(__float2ull_rn(expf((x - top_) * inverse_) * 0x1p44f));
  }
  [[nodiscard]] SSMLIB_DEVICE fixed_t weight(int v) const { return weight_at(widen(logits_[v])); }
  [[nodiscard]] SSMLIB_DEVICE fixed_t weight_of(std::uint32_t key) const {
    return weight_at(__uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key));
  }

  /// f(token, weight) for this thread's run of tokens in order, weight 0 for those dropped, while
  /// f returns true.
  template <class F>
  SSMLIB_DEVICE void for_mine(F f) {
    const int each = (count_ + sample_threads - 1) / sample_threads;
    const int begin = static_cast<int>(threadIdx.x) * each, end = min(count_, begin + each);
    fixed_t equal = 0, all;
    for (int v = begin; v < end; ++v)
      equal += key_of(widen(logits_[v])) == kept_.key;
    equal = equals_known_ ? equals_before_ : sum_before(equal, shared_, all);
    equals_before_ = equal;
    equals_known_ = true;
    for (int v = begin; v < end; ++v) {
      const std::uint32_t k = key_of(widen(logits_[v]));
      const bool kept = k > kept_.key || (k == kept_.key && equal < kept_.equals);
      equal += k == kept_.key;
      const fixed_t w = kept ? weight(v) : 0;
      if (!f(v, w >= least_ ? w : 0)) return;
    }
  }

 public:
  /// After the kept tokens have changed.
  SSMLIB_DEVICE void forget() { equals_known_ = false; }

 private:
  const T* logits_;
  int count_;
  float inverse_, top_ = 0;
  kept_tokens kept_;
  fixed_t least_ = 0, equals_before_ = 0;
  bool equals_known_ = false;
  sample_shared& shared_;
};

template <class T>
__global__ void __launch_bounds__(sample_threads) sample_kernel(const sample_problem<T> p) {
  __shared__ sample_shared shared;
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const index_t row = blockIdx.x;
  row_sampler<T> sampler(p.logits.data + row * p.logits.strides[0],
                         static_cast<int>(p.logits.extents[1]), p.temperature, shared);
  int token = sampler.largest();
  if (p.temperature > 0) {
    if (p.top_k > 0 && p.top_k < p.logits.extents[1]) {
      sampler.keep_until(static_cast<fixed_t>(p.top_k), false);
    }
    if (p.top_p < 1) {
      const auto all = static_cast<double>(sampler.total());
      sampler.keep_until(static_cast<fixed_t>(ceil(p.top_p * all)), true);
      sampler.forget();
    }
    if (p.min_p > 0) sampler.keep_from(static_cast<fixed_t>(ceil(p.min_p * 0x1p44)));
    const auto sequence = static_cast<std::uint64_t>(p.sequence ? p.sequence[row] : row);
    const auto position = static_cast<std::uint64_t>(p.position ? p.position[row] : 0);
    token = sampler.pick(
        draw_of(p.seed, sequence, position * 4 + static_cast<std::uint64_t>(p.purpose)));
  }
  if (threadIdx.x == 0) p.tokens[row] = token;
}

struct count_arguments {
  index_t *position, sequences, tokens, *row_sequence, *row_position;
};
inline constexpr int count_threads = 128;

/// A thread counts for one sequence.
static __global__ void __launch_bounds__(count_threads) count_kernel(const count_arguments a) {
  wait_for_kernel_ahead();
  let_next_kernel_start();
  const index_t i = index_t{blockIdx.x} * count_threads + threadIdx.x;
  if (i >= a.sequences) return;
  const index_t before = a.position[i];
  for (index_t j = 0; j < a.tokens; ++j) {
    a.row_sequence[i * a.tokens + j] = i;
    a.row_position[i * a.tokens + j] = before + j + 1;
  }
  a.position[i] = before + a.tokens;
}

}  // namespace detail

template <class Index>
void count_tokens(cudaStream_t stream, Index* position, index_t sequences, index_t tokens,
                  Index* row_sequence, Index* row_position) {
  if (sequences == 0) return;
  const index_t blocks = (sequences + detail::count_threads - 1) / detail::count_threads;
  launch_overlapped(
      stream, detail::count_kernel, blocks, detail::count_threads, 0, 1,
      detail::count_arguments{position, sequences, tokens, row_sequence, row_position});
}

template <class T>
void sample_forward(cudaStream_t stream, const sample_problem<T>& p) {
  const index_t rows = p.logits.extent(0), vocabulary = p.logits.extent(1);
  if (rows == 0) return;
  if (vocabulary < 1 || vocabulary > std::numeric_limits<int>::max() / 2 ||
      rows > std::numeric_limits<int>::max() || (p.logits.stride(1) != 1 && vocabulary > 1)) {
    throw shape_error("ssm: sample_forward: logits are " + to_string(p.logits.extents) +
                      " with inner stride " + std::to_string(p.logits.stride(1)) +
                      "; wanted 1 to 2^30 entries of unit stride a row");
  }
  if (!(p.temperature >= 0) || p.top_k < 0 || !(p.top_p > 0 && p.top_p <= 1) ||
      !(p.min_p >= 0 && p.min_p <= 1)) {
    throw value_error("ssm: sample_forward: temperature " + std::to_string(p.temperature) +
                      ", top_k " + std::to_string(p.top_k) + ", top_p " + std::to_string(p.top_p) +
                      ", min_p " + std::to_string(p.min_p) +
                      "; wanted temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1");
  }
  launch_overlapped(stream, detail::sample_kernel<T>, rows, detail::sample_threads, 0, 1, p);
}

SSMLIB_INSTANTIATE(cuda_sample, void count_tokens<index_t>(cudaStream_t, index_t*, index_t, index_t,
                                                           index_t*, index_t*));
SSMLIB_INSTANTIATE(cuda_sample,
                   void sample_forward<float>(cudaStream_t, const sample_problem<float>&));
SSMLIB_INSTANTIATE(cuda_sample,
                   void sample_forward<bf16>(cudaStream_t, const sample_problem<bf16>&));

}  // namespace ssm::kernels::cuda
