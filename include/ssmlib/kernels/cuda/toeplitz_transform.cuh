#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/quadratic_tile.cuh>
#include <ssmlib/kernels/cuda/toeplitz.hpp>

#include <algorithm>
#include <cufft.h>
#include <string>
#include <utility>

/// @file
/// Plans of transforms, and the kernels around them. A transform's column is a product of features
/// along time, say k_n o x_p; columns lie one after the other as size + 2 reals, which are size / 2
/// + 1 complex numbers after the transform.

namespace ssm::kernels::cuda {

namespace detail {

inline void check_cufft(cufftResult status, const char* call) {
  if (status == CUFFT_SUCCESS) return;
  throw backend_error("ssm: " + std::string(call) + " failed with cufftResult " +
                      std::to_string(static_cast<int>(status)));
}

}  // namespace detail

template <class R>
toeplitz_plans<R>::toeplitz_plans(toeplitz_plans&& other) noexcept
    : plans_(std::exchange(other.plans_, {})) {}

template <class R>
toeplitz_plans<R>& toeplitz_plans<R>::operator=(toeplitz_plans&& other) noexcept {
  std::swap(plans_, other.plans_);
  return *this;
}

template <class R>
toeplitz_plans<R>::~toeplitz_plans() {
  for (const plan& p : plans_)
    (void)cufftDestroy(p.handle);
}

template <class R>
const typename toeplitz_plans<R>::plan& toeplitz_plans<R>::get(bool inverse, index_t size,
                                                               index_t batch) {
  for (const plan& p : plans_)
    if (p.inverse == inverse && p.size == size && p.batch == batch) return p;
  plan p{inverse, size, batch, 0, 0};
  plans_.reserve(plans_.size() + 1);
  cufftHandle handle = 0;
  detail::check_cufft(cufftCreate(&handle), "cufftCreate");
  p.handle = handle;
  plans_.push_back(p);  // destroyed from here on
  constexpr bool wide = sizeof(R) == 8;
  long long n = size, reals = size + 2, complexes = size / 2 + 1;
  const cufftType type = inverse ? (wide ? CUFFT_Z2D : CUFFT_C2R) : (wide ? CUFFT_D2Z : CUFFT_R2C);
  long long *from = inverse ? &complexes : &reals, *to = inverse ? &reals : &complexes;
  const auto make = [&] {
    detail::check_cufft(cufftSetAutoAllocation(handle, 0), "cufftSetAutoAllocation");
    detail::check_cufft(cufftMakePlanMany64(handle, 1, &n, from, 1, *from, to, 1, *to, type, batch,
                                            &plans_.back().workspace),
                        "cufftMakePlanMany64");
  };
  try {
    make();
  } catch (...) {
    (void)cufftDestroy(handle);
    plans_.pop_back();
    throw;
  }
  return plans_.back();
}

namespace detail {

template <class R>
void execute_plan(cudaStream_t stream, const typename toeplitz_plans<R>::plan& p, R* data,
                  void* workspace) {
  check_cufft(cufftSetStream(p.handle, stream), "cufftSetStream");
  check_cufft(cufftSetWorkArea(p.handle, workspace), "cufftSetWorkArea");
  if constexpr (sizeof(R) == 8) {
    auto* complexes = reinterpret_cast<cufftDoubleComplex*>(data);
    check_cufft(p.inverse ? cufftExecZ2D(p.handle, complexes, data)
                          : cufftExecD2Z(p.handle, data, complexes),
                "cufftExec");
  } else {
    auto* complexes = reinterpret_cast<cufftComplex*>(data);
    check_cufft(p.inverse ? cufftExecC2R(p.handle, complexes, data)
                          : cufftExecR2C(p.handle, data, complexes),
                "cufftExec");
  }
}

template <class R>
struct complex_number {
  R re, im;
};

/// Which columns there are: unit (group, sequence, feature), and for each unit one member for each
/// head of the group and inner feature. Members follow each other, then units.
struct toeplitz_columns {
  index_t groups, count, features;  // of units
  index_t share, inner;             // of members: heads of a group, inner features
  index_t first_sequence;

  struct place {
    index_t sequence, group, feature, head, inner_feature;
  };
  [[nodiscard]] __host__ __device__ index_t units() const { return groups * count * features; }
  [[nodiscard]] __host__ __device__ index_t members() const { return share * inner; }
  [[nodiscard]] SSMLIB_DEVICE place unit(index_t u) const {
    const index_t group = u / features / count;
    return {first_sequence + u / features % count, group, u % features, group * share, 0};
  }
  [[nodiscard]] SSMLIB_DEVICE place column(index_t c) const {
    place at = unit(c / members());
    const index_t m = c % members();
    at.head += m / inner;
    at.inner_feature = m % inner;
    return at;
  }
};

inline constexpr int transpose_tile = 32;

/// work[c - first][t] = outer_t[feature] inner_t[inner feature], zeros beyond the sequence. Reads
/// along features, writes along time.
template <class T>
__global__ void __launch_bounds__(256)
    toeplitz_load_kernel(head_operand<const T> outer, head_operand<const T> inner,
                         packed_sequences sequences, toeplitz_columns columns, index_t first,
                         index_t column_count, index_t size, accum_t<T>* work) {
  using A = accum_t<T>;
  constexpr int B = transpose_tile;
  __shared__ A tile[B][B + 1];
  const int x = threadIdx.x % B, y = threadIdx.x / B;
  const index_t column_tiles = (column_count + B - 1) / B, time_tiles = (size + B - 1) / B;
  for (index_t n = blockIdx.x; n < column_tiles * time_tiles; n += gridDim.x) {
    const index_t c0 = n % column_tiles * B, t0 = n / column_tiles * B;
    const index_t c = first + c0 + x;
    index_t begin = 0, length = 0;
    typename toeplitz_columns::place at{};
    if (c0 + x < column_count && c < columns.units() * columns.members()) {
      at = columns.column(c);
      begin = sequences.begin(at.sequence);
      length = sequences.length(at.sequence);
    }
    __syncthreads();
#pragma unroll
    for (int r = y; r < B; r += 256 / B) {
      const index_t t = t0 + r;
      A value = A(0);
      if (t < length) {
        value = widen(outer.row(begin + t, at.head)[at.feature]);
        if (inner.present()) value *= widen(inner.row(begin + t, at.head)[at.inner_feature]);
      }
      tile[r][x] = value;
    }
    __syncthreads();
#pragma unroll
    for (int r = y; r < B; r += 256 / B) {
      if (c0 + r < column_count && t0 + x < size) {
        work[(c0 + r) * (size + 2) + t0 + x] = tile[x][r];
      }
    }
  }
}

/// out_t[feature] (+)= alpha times the sum over members of weight_t[inner feature] times the
/// member's column, from unit `first` on. Reads along time, writes along features.
template <class T>
__global__ void __launch_bounds__(256)
    toeplitz_store_kernel(head_operand<T> out, head_operand<const T> weight, accum_t<T> alpha,
                          packed_sequences sequences, toeplitz_columns columns, index_t first,
                          index_t unit_count, index_t longest, index_t size, const accum_t<T>* work,
                          bool add) {
  using A = accum_t<T>;
  constexpr int B = transpose_tile;
  __shared__ A tile[B][B + 1];
  const int x = threadIdx.x % B, y = threadIdx.x / B;
  const index_t unit_tiles = (unit_count + B - 1) / B, time_tiles = (longest + B - 1) / B;
  const index_t members = columns.members();
  for (index_t n = blockIdx.x; n < unit_tiles * time_tiles; n += gridDim.x) {
    const index_t u0 = n % unit_tiles * B, t0 = n / unit_tiles * B, t = t0 + x;
    __syncthreads();
#pragma unroll
    for (int r = y; r < B; r += 256 / B) {
      A sum = A(0);
      if (u0 + r < unit_count) {
        const auto at = columns.unit(first + u0 + r);
        if (t < sequences.length(at.sequence)) {
          const A* column = work + (u0 + r) * members * (size + 2) + t;
          const index_t token = sequences.begin(at.sequence) + t;
          for (index_t m = 0; m < members; ++m) {
            const A value = column[m * (size + 2)];
            if (weight.present()) {
              sum = fma(value,
                        widen(weight.row(token, at.head + m / columns.inner)[m % columns.inner]),
                        sum);
            } else {
              sum += value;
            }
          }
        }
      }
      tile[r][x] = sum;
    }
    __syncthreads();
    if (u0 + x >= unit_count) continue;
    const auto at = columns.unit(first + u0 + x);
    const index_t begin = sequences.begin(at.sequence), length = sequences.length(at.sequence);
#pragma unroll
    for (int r = y; r < B; r += 256 / B) {
      if (t0 + r < length) {
        store_sum(out.group_row(begin + t0 + r, at.group) + at.feature, alpha * tile[x][r], add);
      }
    }
  }
}

/// Kernels first, first + 1, ... as columns; zeros beyond `length` distances or `groups` kernels.
template <class R>
__global__ void __launch_bounds__(256)
    toeplitz_pad_kernel(view<const R, 2> kernel, index_t first, index_t count, index_t length,
                        index_t size, R* work) {
  const index_t threads = index_t{gridDim.x} * blockDim.x, pitch = size + 2;
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < count * pitch;
       e += threads) {
    const index_t g = first + e / pitch, d = e % pitch;
    work[e] = g < kernel.extents[0] && d < length
                  ? kernel.data[g * kernel.strides[0] + d * kernel.strides[1]]
                  : R(0);
  }
}

/// Columns times the spectra of their heads' kernels, or their conjugates: `spectra` has those from
/// first_kernel on.
template <bool Conjugate, class R>
__global__ void __launch_bounds__(256)
    toeplitz_multiply_kernel(toeplitz_columns columns, index_t first, index_t column_count,
                             index_t heads, index_t kernels, index_t first_kernel,
                             index_t frequencies, R scale, const complex_number<R>* spectra,
                             complex_number<R>* work) {
  constexpr index_t B = 1024;
  const index_t tiles = (frequencies + B - 1) / B;
  for (index_t n = blockIdx.x; n < column_count * tiles; n += gridDim.x) {
    const index_t c = n / tiles, end = min(frequencies, (n % tiles + 1) * B);
    if (first + c >= columns.units() * columns.members()) continue;
    const index_t kernel = group_of(columns.column(first + c).head, heads, kernels) - first_kernel;
    const complex_number<R>* a = spectra + kernel * frequencies;
    complex_number<R>* b = work + c * frequencies;
    for (index_t f = n % tiles * B + threadIdx.x; f < end; f += 256) {
      const R re = scale * a[f].re, im = Conjugate ? -scale * a[f].im : scale * a[f].im;
      const complex_number<R> v = b[f];
      b[f] = {re * v.re - im * v.im, re * v.im + im * v.re};
    }
  }
}

/// sums[g][f] (+)= the sum of b conj(a) over the columns [first, first + count) that belong to
/// group g of `groups`, which has a_group columns from g * a_group on. 8 warps share a sum.
template <class R>
__global__ void __launch_bounds__(256)
    toeplitz_correlate_kernel(const complex_number<R>* a, const complex_number<R>* b, index_t first,
                              index_t count, index_t groups, index_t a_group, index_t frequencies,
                              complex_number<R>* sums, bool add) {
  __shared__ complex_number<R> parts[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t tiles = (frequencies + 31) / 32;
  for (index_t n = blockIdx.x; n < groups * tiles; n += gridDim.x) {
    const index_t g = n / tiles, f = n % tiles * 32 + lane;
    const index_t begin = max(first, g * a_group), end = min(first + count, (g + 1) * a_group);
    complex_number<R> sum{R(0), R(0)};
    if (f < frequencies) {
#pragma unroll 4
      for (index_t c = begin + warp; c < end; c += 8) {
        const complex_number<R> u = a[(c - first) * frequencies + f];
        const complex_number<R> v = b[(c - first) * frequencies + f];
        sum.re += v.re * u.re + v.im * u.im;
        sum.im += v.im * u.re - v.re * u.im;
      }
    }
    __syncthreads();
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || f >= frequencies) continue;
    for (int w = 1; w < 8; ++w) {
      sum.re += parts[w][lane].re;
      sum.im += parts[w][lane].im;
    }
    complex_number<R>& to = sums[g * frequencies + f];
    to = add ? complex_number<R>{to.re + sum.re, to.im + sum.im} : sum;
  }
}

/// to[first + g, d] += scale work[g][d] for d < length.
template <class R>
__global__ void __launch_bounds__(256)
    toeplitz_add_kernel(const R* work, index_t count, index_t length, index_t size, R scale,
                        view<R, 2> to, index_t first) {
  const index_t threads = index_t{gridDim.x} * blockDim.x;
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < count * length;
       e += threads) {
    const index_t g = e / length, d = e % length;
    to.data[(first + g) * to.strides[0] + d * to.strides[1]] += scale * work[g * (size + 2) + d];
  }
}

template <class R>
__global__ void __launch_bounds__(256) toeplitz_zero_kernel(view<R, 2> to) {
  const index_t threads = index_t{gridDim.x} * blockDim.x, n = to.extents[1];
  for (index_t e = index_t{blockIdx.x} * blockDim.x + threadIdx.x; e < to.extents[0] * n;
       e += threads)
    to.data[e / n * to.strides[0] + e % n * to.strides[1]] = R(0);
}

}  // namespace detail

}  // namespace ssm::kernels::cuda
