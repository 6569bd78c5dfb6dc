#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/activation.cuh>
#include <ssmlib/kernels/cuda/rope.hpp>

#include <algorithm>
#include <string>

namespace ssm::kernels::cuda {

namespace detail {

template <class R>
__global__ void rope_table_kernel(view<const double, 1> frequency, rope_positions p,
                                  view<R, 3> table) {
  const index_t pairs = table.extents[2];
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= table.extents[0] * pairs) return;
  const index_t token = i / pairs, pair = i % pairs;
  index_t sequence = 0, begin = 0;
  if (p.offsets) {
    index_t low = 0, high = p.sequences - 1;  // the last one that begins at or before the token
    while (low < high) {
      const index_t middle = (low + high + 1) / 2;
      if (p.offsets[middle] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    sequence = low, begin = p.offsets[low];
  } else {
    sequence = token / p.max_length, begin = sequence * p.max_length;
  }
  const index_t position = token - begin + (p.first_position ? p.first_position[sequence] : 0);
  double sine, cosine;
  sincos(static_cast<double>(position) * frequency.data[pair * frequency.strides[0]], &sine,
         &cosine);
  R* row = table.data + token * table.strides[0] + pair;
  row[0] = static_cast<R>(cosine);
  row[table.strides[1]] = static_cast<R>(sine);
}

/// A thread turns Vector pairs of one head, or copies Vector features behind the pairs.
template <class T, int Vector>
__global__ void rope_rotate_kernel(const __grid_constant__ rope_problem<T> p, view<const T, 3> x,
                                   view<T, 3> y) {
  using R = accum_t<T>;
  const index_t pairs = p.table.extents[2], features = x.extents[2];
  const index_t turns = pairs / Vector, copies = (features - 2 * pairs) / Vector;
  index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= x.extents[0] * x.extents[1] * (turns + copies)) return;
  const index_t unit = i % (turns + copies);
  i /= turns + copies;
  const index_t head = i % x.extents[1], token = i / x.extents[1];
  const T* from = x.data + token * x.strides[0] + head * x.strides[1];
  T* to = y.data + token * y.strides[0] + head * y.strides[1];
  const auto load = [&](const T* q) {
    const auto raw = *reinterpret_cast<const numbers<T, Vector>*>(q);
    numbers<R, Vector> v;
#pragma unroll
    for (int e = 0; e < Vector; ++e)
      v.v[e] = widen(raw.v[e]);
    return v;
  };
  const auto store = [&](index_t d, numbers<R, Vector> v) {
    numbers<T, Vector> out;
    if (p.add) {
      const auto old = load(to + d);
#pragma unroll
      for (int e = 0; e < Vector; ++e)
        v.v[e] += old.v[e];
    }
#pragma unroll
    for (int e = 0; e < Vector; ++e)
      out.v[e] = narrow<T>(v.v[e]);
    *reinterpret_cast<numbers<T, Vector>*>(to + d) = out;
  };
  if (unit >= turns) {
    const index_t d = 2 * pairs + (unit - turns) * Vector;
    return store(d, load(from + d));
  }
  const R* angle = p.table.data + token * p.table.strides[0] + unit * Vector;
  R cosine[Vector], sine[Vector];
#pragma unroll
  for (int e = 0; e < Vector; ++e) {
    cosine[e] = angle[e];
    sine[e] = p.backwards ? -angle[p.table.strides[1] + e] : angle[p.table.strides[1] + e];
  }
  // Halves: the pair's features are `pairs` apart. Interleaved: both vectors are neighbours.
  const index_t first = p.interleaved ? 2 * unit * Vector : unit * Vector;
  const index_t second = p.interleaved ? first + Vector : first + pairs;
  numbers<R, Vector> a = load(from + first), b = load(from + second);
  numbers<R, Vector> turned_a, turned_b;
#pragma unroll
  for (int e = 0; e < Vector; ++e) {
    if (p.interleaved) {
      // Pair e is features 2e, 2e + 1 of the two vectors in a row.
      const R even = 2 * e < Vector ? a.v[2 * e % Vector] : b.v[2 * e % Vector];
      const R odd = 2 * e + 1 < Vector ? a.v[(2 * e + 1) % Vector] : b.v[(2 * e + 1) % Vector];
      const R x0 = fma(even, cosine[e], -odd * sine[e]), x1 = fma(even, sine[e], odd * cosine[e]);
      (2 * e < Vector ? turned_a : turned_b).v[2 * e % Vector] = x0;
      (2 * e + 1 < Vector ? turned_a : turned_b).v[(2 * e + 1) % Vector] = x1;
    } else {
      turned_a.v[e] = fma(a.v[e], cosine[e], -b.v[e] * sine[e]);
      turned_b.v[e] = fma(a.v[e], sine[e], b.v[e] * cosine[e]);
    }
  }
  store(first, turned_a);
  store(second, turned_b);
}

[[nodiscard]] inline unsigned rope_grid(index_t threads) {
  const index_t blocks = (threads + 255) / 256;
  if (blocks > 0x7fffffff) {
    throw shape_error("ssm: rope: " + std::to_string(blocks) +
                      " blocks of work; wanted at most 2147483647: split the batch");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace detail

template <class R>
void rope_table(cudaStream_t stream, view<const double, 1> frequency, const rope_positions& p,
                view<R, 3> table) {
  if (table.extents[1] != 2 || table.extents[2] != frequency.extents[0]) {
    throw shape_error("ssm: rope_table: the table is " + to_string<3>(table.extents) + " for " +
                      std::to_string(frequency.extents[0]) +
                      " frequencies; wanted (tokens x 2 x pairs)");
  }
  const index_t count = table.extents[0] * table.extents[2];
  if (count == 0) return;
  detail::rope_table_kernel<R><<<detail::rope_grid(count), 256, 0, stream>>>(frequency, p, table);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void rope_rotate(cudaStream_t stream, const rope_problem<T>& p, view<const T, 3> x, view<T, 3> y) {
  const index_t pairs = p.table.extents[2], features = x.extents[2];
  if (y.extents != x.extents || p.table.extents[0] != x.extents[0] || 2 * pairs > features) {
    throw shape_error(
        "ssm: rope_rotate: x is " + to_string<3>(x.extents) + ", y " + to_string<3>(y.extents) +
        " and the table " + to_string<3>(p.table.extents) +
        "; wanted equal x and y and a row of at most half the features for each token");
  }
  const index_t heads = x.extents[0] * x.extents[1];
  if (heads * features == 0) return;
  constexpr int vector = 16 / static_cast<int>(sizeof(T));
  const bool aligned = pairs % vector == 0 && features % vector == 0 &&
                       rows_are_aligned(x.data, x.strides[0], vector) &&
                       rows_are_aligned(x.data, x.strides[1], vector) &&
                       rows_are_aligned(y.data, y.strides[0], vector) &&
                       rows_are_aligned(y.data, y.strides[1], vector);
  const auto launch = [&]<int Vector>() {
    const index_t units = pairs / Vector + (features - 2 * pairs) / Vector;
    detail::rope_rotate_kernel<T, Vector>
        <<<detail::rope_grid(heads * units), 256, 0, stream>>>(p, x, y);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  if (aligned) {
    launch.template operator()<vector>();
  } else {
    launch.template operator()<1>();
  }
}

#define SSMLIB_DETAIL_LIST(T)                                                             \
  SSMLIB_INSTANTIATE(cuda_rope, void rope_rotate<T>(cudaStream_t, const rope_problem<T>&, \
                                                    view<const T, 3>, view<T, 3>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST
SSMLIB_INSTANTIATE(cuda_rope, void rope_table<float>(cudaStream_t, view<const double, 1>,
                                                     const rope_positions&, view<float, 3>));
SSMLIB_INSTANTIATE(cuda_rope, void rope_table<double>(cudaStream_t, view<const double, 1>,
                                                      const rope_positions&, view<double, 3>));

}  // namespace ssm::kernels::cuda
