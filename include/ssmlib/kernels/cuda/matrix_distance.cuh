#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/grid.cuh>
#include <ssmlib/kernels/cuda/matrix_entry.cuh>

/// @file
/// The kernels over the entries of a place. A block has some rows of one head and all columns of
/// the place, a warp some of these rows, a lane every 32nd column: what is summed over a row has
/// one owner, so that it is added in one order without atomics.

namespace ssm::kernels::cuda {

namespace detail {

inline constexpr int entry_warps = 4, rows_of_warp = 8, rows_of_block = entry_warps * rows_of_warp;
inline constexpr int lane_columns = 4, chunk_columns = 32 * lane_columns;

[[nodiscard]] inline index_t row_blocks(const matrix_place& p) {
  return (p.rows + rows_of_block - 1) / rows_of_block;
}

/// Where a block works: some rows of one head of one sequence of the place.
struct block_place {
  int head, row, block;  // row: the first of this warp
  index_t sequence, first;

  SSMLIB_DEVICE block_place(const matrix_place& p, int heads) {
    const index_t blocks = (p.rows + rows_of_block - 1) / rows_of_block, item = blockIdx.x / blocks;
    head = static_cast<int>(item % heads);
    sequence = item / heads;
    first = p.token + sequence * p.length;
    block = static_cast<int>(blockIdx.x % blocks);
    row = block * rows_of_block + static_cast<int>(threadIdx.x) / 32 * rows_of_warp;
  }
};

template <class R>
__global__ void __launch_bounds__(grid_threads)
    matrix_entries_kernel(const matrix_place place, const __grid_constant__ matrix_tile<R> tile,
                          R* out) {
  for_each_element(
      {place.sequences, place.rows, tile.heads, place.columns}, [&](index_t i, const shape<4>& at) {
        const head_tile<R> m(tile, at[0], place.token + at[0] * place.length,
                             static_cast<int>(at[2]));
        const int t = static_cast<int>(place.row + at[1]),
                  s = static_cast<int>(place.column + at[3]);
        out[i] = m.entry(m.line(static_cast<int>(at[1]))[at[3]], m.row(t), m.column(s), t, s);
      });
}

/// Sums over the columns of a warp's rows, one a lane; each lane touches its own.
SSMLIB_DEVICE void clear_rows(double (&sums)[rows_of_warp][32], int lane) {
#pragma unroll
  for (int k = 0; k < rows_of_warp; ++k)
    sums[k][lane] = 0.0;
}
/// to[t, head] += the sums over the lanes. @param to  (tokens, heads)
SSMLIB_DEVICE void add_rows(const double (&sums)[rows_of_warp][32], int lane, const block_place& at,
                            const matrix_place& p, int heads, int head, double* to) {
#pragma unroll
  for (int k = 0; k < rows_of_warp; ++k) {
    const double sum = warp_sum(sums[k][lane]);
    const int r = at.row + k;
    if (lane == 0 && r < p.rows) to[(at.first + p.row + r) * heads + head] += sum;
  }
}

template <class R>
__global__ void __launch_bounds__(32 * entry_warps, 4)
    matrix_distance_kernel(const __grid_constant__ matrix_pair<R> p, double* squares) {
  __shared__ double rows[entry_warps][rows_of_warp][32];
  const int lane = threadIdx.x % 32;
  const block_place at(p.place, p.heads);
  const head_tile<R> student(p.student, at.sequence, at.first,
                             head_of(at.head, p.heads, p.student.heads)),
      teacher(p.teacher, at.sequence, at.first, head_of(at.head, p.heads, p.teacher.heads));
  const int columns = static_cast<int>(p.place.columns);
  double(&sums)[rows_of_warp][32] = rows[threadIdx.x / 32];
  clear_rows(sums, lane);
  for (int c0 = lane; c0 < columns; c0 += chunk_columns) {
    line_values<R> of_student[lane_columns], of_teacher[lane_columns];
#pragma unroll
    for (int j = 0; j < lane_columns; ++j) {
      const int s = static_cast<int>(p.place.column) + c0 + 32 * j;
      if (c0 + 32 * j >= columns) continue;
      of_student[j] = student.column(s);
      of_teacher[j] = teacher.column(s);
    }
#pragma unroll 1
    for (int k = 0; k < rows_of_warp; ++k) {
      const int r = at.row + k, t = static_cast<int>(p.place.row) + r;
      if (r >= p.place.rows) break;
      const line_values<R> student_row = student.row(t), teacher_row = teacher.row(t);
      const R *of_s = student.line(r), *of_t = teacher.line(r);
      double sum = 0;
#pragma unroll
      for (int j = 0; j < lane_columns; ++j) {
        const int c = c0 + 32 * j, s = static_cast<int>(p.place.column) + c;
        if (c >= columns || !(student.keeps(t, s) || teacher.keeps(t, s))) continue;
        const R d = student.entry(of_s[c], student_row, of_student[j], t, s) -
                    teacher.entry(of_t[c], teacher_row, of_teacher[j], t, s);
        sum += static_cast<double>(d) * static_cast<double>(d);
      }
      sums[k][lane] += sum;
    }
  }
  add_rows(sums, lane, at, p.place, p.heads, at.head, squares);
}

template <class T>
struct gradient_parameters {
  matrix_gradient<T> g;
  double* columns;     // (row blocks, sequences, heads, columns): parts of the sums over rows
  accum_t<T>* shared;  // as the products, where several heads share one; else null
};

/// The gradient of the entries of one row of a student's head, in a lane's columns: the sum over
/// the heads of the pair that are compared with it.
template <class R>
SSMLIB_DEVICE void entry_gradients(const matrix_pair<R>& p, const R* factors, const block_place& at,
                                   int head, int r, int c0, const R (&value)[lane_columns],
                                   R (&d)[lane_columns]) {
  const int share = p.heads / p.student.heads, t = static_cast<int>(p.place.row) + r;
  for (int h = head * share; h < (head + 1) * share; ++h) {
    const head_tile<R> teacher(p.teacher, at.sequence, at.first,
                               head_of(h, p.heads, p.teacher.heads));
    const line_values<R> row = teacher.row(t);
    const R* line = teacher.line(r);
    const R f = factors[at.sequence * p.heads + h];
#pragma unroll
    for (int j = 0; j < lane_columns; ++j) {
      const int c = c0 + 32 * j, s = static_cast<int>(p.place.column) + c;
      if (c >= p.place.columns) continue;
      const R a = teacher.keeps(t, s) ? teacher.entry(line[c], row, teacher.column(s), t, s) : R(0);
      d[j] += f * (value[j] - a);
    }
  }
}

/// What the gradient of one head adds to one product, to the sum of its row and of its column.
template <class R>
struct entry_result {
  R d_product;
  double row = 0, column = 0;
};
/// @param factor  of a semiseparable tile
template <class R>
SSMLIB_DEVICE entry_result<R> product_gradient(const head_tile<R>& m, const matrix_sums& sums,
                                               R product, R factor, R value, R d, R weight,
                                               const line_values<R>& row, int t, int s) {
  if (m.m.form == matrix_form::plain) return {d};
  if (m.m.form == matrix_form::softmax) {
    return {m.m.alpha * value * (d - static_cast<R>(row.sum)),
            static_cast<double>(value) * static_cast<double>(d)};
  }
  const R y = factor == R(0) ? R(0) : factor * product * d;
  if (s == t) {
    const index_t i = (m.first + t) * m.m.heads + m.head;
    sums.diagonal[i] = static_cast<double>(y);
    sums.d_diagonal[i] = static_cast<double>(d);
  }
  const double below = s < t ? static_cast<double>(y) : 0.0;
  // Exact: the sum over columns has the weight as a factor too, and the two must cancel.
  return {factor * weight * d, below * static_cast<double>(weight), below};
}

/// @tparam RowsOnly  only adds the row sums of a softmax
template <class T, bool RowsOnly>
__global__ void __launch_bounds__(32 * entry_warps, sizeof(accum_t<T>) == 4 ? 3 : 2)
    matrix_gradient_kernel(const __grid_constant__ gradient_parameters<T> parameters) {
  using R = accum_t<T>;
  __shared__ double parts[entry_warps][chunk_columns];
  __shared__ double sums_of_rows[entry_warps][rows_of_warp][32];
  const matrix_gradient<T>& g = parameters.g;
  const matrix_pair<R>& p = g.pair;
  const matrix_tile<R>& tile = p.student;
  const int lane = threadIdx.x % 32;
  const block_place at(p.place, tile.product_heads);
  const int share = tile.heads / tile.product_heads;
  const bool is_softmax = tile.form == matrix_form::softmax;
  const bool is_semiseparable = tile.form == matrix_form::semiseparable;
  const bool has_columns = !RowsOnly && is_semiseparable;
  for (int of_share = 0; of_share < share; ++of_share) {
    const int h = at.head * share + of_share;
    const head_tile<R> student(tile, at.sequence, at.first, h);
    double(&row_sums)[rows_of_warp][32] = sums_of_rows[threadIdx.x / 32];
    clear_rows(row_sums, lane);
    for (int chunk = 0; chunk < p.place.columns; chunk += chunk_columns) {
      const int c0 = chunk + lane;
      double column_sums[lane_columns] = {};
      line_values<R> of_column[lane_columns];
#pragma unroll
      for (int j = 0; j < lane_columns; ++j) {
        if (c0 + 32 * j < p.place.columns)
          of_column[j] = student.column(static_cast<int>(p.place.column) + c0 + 32 * j);
      }
#pragma unroll 1
      for (int k = 0; k < rows_of_warp; ++k) {
        const int r = at.row + k, t = static_cast<int>(p.place.row) + r;
        if (r >= p.place.rows) break;
        line_values<R> row = student.row(t);
        if (is_softmax && !RowsOnly) row.sum = g.sums.row[(at.first + t) * tile.heads + h];
        const R* line = student.line(r);
        R factor[lane_columns], value[lane_columns], d[lane_columns] = {};
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) {
          const int c = c0 + 32 * j, s = static_cast<int>(p.place.column) + c;
          factor[j] = value[j] = R(0);
          if (c >= p.place.columns) continue;
          if (is_semiseparable) {
            factor[j] = student.factor(row, of_column[j], t, s);
            value[j] = student.entry_of_factor(factor[j], line[c], of_column[j], t, s);
          } else {
            value[j] = student.entry(line[c], row, of_column[j], t, s);
          }
        }
        entry_gradients(p, g.factors, at, h, r, c0, value, d);
        const index_t to =
            at.sequence * tile.strides[0] + at.head * tile.strides[1] + r * tile.strides[2];
        double row_sum = 0;
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) {
          const int c = c0 + 32 * j;
          if (c >= p.place.columns) continue;
          const auto e =
              product_gradient(student, g.sums, line[c], factor[j], value[j], d[j],
                               of_column[j].number, row, t, static_cast<int>(p.place.column) + c);
          row_sum += e.row;
          column_sums[j] += e.column;
          if (RowsOnly) continue;
          R sum = e.d_product;
          if (of_share > 0) sum += parameters.shared[to + c];
          if (of_share + 1 < share) {
            parameters.shared[to + c] = sum;
          } else {
            g.d_products[to + c] = narrow<T>(sum);
          }
        }
        row_sums[k][lane] += row_sum;
      }
      if (!has_columns) continue;
      __syncthreads();
#pragma unroll
      for (int j = 0; j < lane_columns; ++j)
        parts[threadIdx.x / 32][lane + 32 * j] = column_sums[j];
      __syncthreads();
      const int c = chunk + static_cast<int>(threadIdx.x);
      if (threadIdx.x < chunk_columns && c < p.place.columns) {
        double sum = 0;
        for (int w = 0; w < entry_warps; ++w)
          sum += parts[w][threadIdx.x];
        const index_t line_of_parts = (at.block * p.place.sequences + at.sequence) * tile.heads + h;
        parameters.columns[line_of_parts * p.place.columns + c] = sum;
      }
    }
    if (RowsOnly || has_columns) {
      add_rows(row_sums, lane, at, p.place, tile.heads, h, g.sums.row);
    }
  }
}

/// column[s, h] += its parts, in order.
template <class T>
__global__ void __launch_bounds__(grid_threads)
    matrix_columns_kernel(const __grid_constant__ gradient_parameters<T> parameters,
                          index_t blocks) {
  const matrix_place& place = parameters.g.pair.place;
  const index_t heads = parameters.g.pair.student.heads;
  const index_t n = place.sequences * heads * place.columns;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += index_t{blockDim.x} * gridDim.x) {
    double sum = 0;
    for (index_t b = 0; b < blocks; ++b)
      sum += parameters.columns[b * n + i];
    const index_t item = i / place.columns, c = i % place.columns;
    const index_t s = place.token + item / heads * place.length + place.column + c;
    parameters.g.sums.column[s * heads + item % heads] += sum;
  }
}

template <class T>
[[nodiscard]] gradient_parameters<T> parameters_of(const matrix_gradient<T>& g, void* workspace) {
  const matrix_place& place = g.pair.place;
  const matrix_tile<accum_t<T>>& tile = g.pair.student;
  gradient_parameters<T> p{g, static_cast<double*>(workspace), nullptr};
  if (tile.heads > tile.product_heads) {
    p.shared = reinterpret_cast<accum_t<T>*>(p.columns + row_blocks(place) * place.sequences *
                                                             tile.heads * place.columns);
  }
  return p;
}

}  // namespace detail

template <Real R>
void matrix_entries(cudaStream_t stream, const matrix_place& place, const matrix_tile<R>& tile,
                    R* out) {
  const index_t n = place.entries() * tile.heads;
  if (n == 0) return;
  detail::matrix_entries_kernel<R><<<grid_for(n), grid_threads, 0, stream>>>(place, tile, out);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <Real R>
void add_matrix_distances(cudaStream_t stream, const matrix_pair<R>& p, double* squares) {
  if (p.place.entries() == 0) return;
  const index_t blocks = detail::row_blocks(p.place) * p.place.sequences * p.heads;
  detail::matrix_distance_kernel<R>
      <<<static_cast<unsigned>(blocks), 32 * detail::entry_warps, 0, stream>>>(p, squares);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
std::size_t matrix_gradient_workspace_bytes(const matrix_gradient<T>& g) {
  const matrix_place& place = g.pair.place;
  const matrix_tile<accum_t<T>>& tile = g.pair.student;
  index_t bytes = 0;
  if (tile.form == matrix_form::semiseparable || tile.heads > tile.product_heads) {
    bytes = detail::row_blocks(place) * place.sequences * tile.heads * place.columns *
            index_t{sizeof(double)};
  }
  if (tile.heads > tile.product_heads)
    bytes += place.entries() * tile.product_heads * index_t{sizeof(accum_t<T>)};
  return static_cast<std::size_t>(bytes);
}

template <class T>
void add_matrix_gradient(cudaStream_t stream, const matrix_gradient<T>& g, void* workspace) {
  const matrix_place& place = g.pair.place;
  if (place.entries() == 0) return;
  const detail::gradient_parameters<T> p = detail::parameters_of(g, workspace);
  const index_t blocks = detail::row_blocks(place);
  const index_t all = blocks * place.sequences * g.pair.student.product_heads;
  detail::matrix_gradient_kernel<T, false>
      <<<static_cast<unsigned>(all), 32 * detail::entry_warps, 0, stream>>>(p);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  if (g.pair.student.form != matrix_form::semiseparable) return;
  const index_t n = place.sequences * g.pair.student.heads * place.columns;
  detail::matrix_columns_kernel<T><<<grid_for(n), grid_threads, 0, stream>>>(p, blocks);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void add_matrix_row_sums(cudaStream_t stream, const matrix_gradient<T>& g) {
  if (g.pair.place.entries() == 0) return;
  const index_t all =
      detail::row_blocks(g.pair.place) * g.pair.place.sequences * g.pair.student.product_heads;
  detail::matrix_gradient_kernel<T, true>
      <<<static_cast<unsigned>(all), 32 * detail::entry_warps, 0, stream>>>({g, nullptr, nullptr});
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

#define SSMLIB_DETAIL_REAL(R)                                                                \
  SSMLIB_INSTANTIATE(                                                                        \
      cuda_matrix_distance,                                                                  \
      void matrix_entries<R>(cudaStream_t, const matrix_place&, const matrix_tile<R>&, R*)); \
  SSMLIB_INSTANTIATE(cuda_matrix_distance,                                                   \
                     void add_matrix_distances<R>(cudaStream_t, const matrix_pair<R>&, double*))
SSMLIB_DETAIL_REAL(float);
SSMLIB_DETAIL_REAL(double);
#undef SSMLIB_DETAIL_REAL
#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(cuda_matrix_distance,                                                         \
                     std::size_t matrix_gradient_workspace_bytes<T>(const matrix_gradient<T>&));   \
  SSMLIB_INSTANTIATE(cuda_matrix_distance,                                                         \
                     void add_matrix_gradient<T>(cudaStream_t, const matrix_gradient<T>&, void*)); \
  SSMLIB_INSTANTIATE(cuda_matrix_distance,                                                         \
                     void add_matrix_row_sums<T>(cudaStream_t, const matrix_gradient<T>&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
