#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/cross_entropy.hpp>
#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/logit_rows.cuh>
#include <ssmlib/kernels/cuda/rows.cuh>

/// @file
/// A warp, a block or a cluster of blocks has a row: each thread keeps the largest logit it has met
/// and sums of exponentials below it, in float over a few hundred elements and in double beyond.

namespace ssm::kernels::cuda {

namespace detail {

template <class T>
struct logit_arguments {
  view<const T, 2> student, teacher;  // teacher absent: cross-entropy
  index_t vocabulary;
  const std::int32_t *targets, *mask;
  std::int32_t ignore_index;
  accum_t<T> scale;
  double *log_sum, *teacher_log_sum, *result;  // forward; read backward
  row_factor<accum_t<T>> g{};                  // backward
  view<T, 2> d_student{}, d_teacher{};
  bool add = false;
  int team = 0;            // threads
  index_t row_chunks = 1;  // of a row, each a team's

  [[nodiscard]] SSMLIB_DEVICE bool counts(index_t t) const {
    return (targets == nullptr || targets[t] != ignore_index) && (mask == nullptr || mask[t] != 0);
  }
};

/// Pair: of two models. A block is a team or eight warps that are; with Cluster a row is a
/// cluster's.
template <bool Pair, class T>
__global__ void __launch_bounds__(logit_threads)
    log_sum_kernel(const __grid_constant__ logit_arguments<T> o) {
  using R = accum_t<T>;
  __shared__ logit_part<R> shared[logit_threads / 32];
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  const int parts = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
#else
  constexpr int parts = 1, rank = 0;
#endif
  const index_t row = o.team == 32 ? index_t{blockIdx.x} * (logit_threads / 32) + threadIdx.x / 32
                                   : index_t{blockIdx.x} / parts;
  if (row >= o.student.extents[0]) return;  // a whole warp where a warp is the team
  const int thread = static_cast<int>(threadIdx.x) % o.team;
  if (!o.counts(row)) {
    if (thread != 0 || rank != 0) return;
    if (o.log_sum) o.log_sum[row] = 0;
    if (Pair && o.teacher_log_sum) o.teacher_log_sum[row] = 0;
    if (o.result) o.result[row] = 0;
    return;
  }
  const T* student = o.student.data + row * o.student.strides[0];
  const T* teacher = Pair ? o.teacher.data + row * o.teacher.strides[0] : nullptr;
  const index_t begin = o.vocabulary * rank / parts, end = o.vocabulary * (rank + 1) / parts;
  const R k = o.scale * R(log2_of_e);
  logit_sums<Pair, R> sums;
  for_logits<Pair>(student + begin, Pair ? teacher + begin : nullptr, end - begin, thread, o.team,
                   [&](const auto& zs, const auto& zt) { sums.add(zs, zt, k); });
  logit_part<R> part{sums.largest, sums.teacher_largest, sums.sum, sums.teacher_sum,
                     sums.difference};
  part = combine_lanes<Pair>(part, k);
  if (o.team > 32) {
    const int lane = threadIdx.x % 32, warps = o.team / 32;
    if (lane == 0) shared[threadIdx.x / 32] = part;
    __syncthreads();
    if (threadIdx.x < 32) {
      part = combine_lanes<Pair>(lane < warps ? shared[lane] : logit_part<R>::nothing(), k);
      if (lane == 0) shared[0] = part;
    }
#if __CUDA_ARCH__ >= 900
    if (parts > 1) {
      cluster.sync();
      if (rank == 0 && threadIdx.x < 32) {
        part = combine_lanes<Pair>(
            lane < parts ? *cluster.map_shared_rank(&shared[0], lane) : logit_part<R>::nothing(),
            k);
      }
      cluster.sync();  // the others' memory is read until here
    }
#endif
  }
  if (thread != 0 || rank != 0) return;
  const double scale = static_cast<double>(o.scale);
  const double log_sum = scale * part.largest + log(part.sum);
  if (o.log_sum) o.log_sum[row] = log_sum;
  if constexpr (Pair) {
    const double other = scale * part.teacher_largest + log(part.teacher_sum);
    if (o.teacher_log_sum) o.teacher_log_sum[row] = other;
    if (o.result) o.result[row] = scale * part.difference / part.teacher_sum + log_sum - other;
  } else if (o.result) {
    const index_t target = o.targets[row];
    const bool inside = target >= 0 && target < o.vocabulary;
    const double z = inside ? static_cast<double>(widen(student[target])) : nan("");
    o.result[row] = scale * z - log_sum;
  }
}

template <class T>
void check_logits(const char* name, const logit_arguments<T>& o) {
  const auto& x = o.student;
  if (x.strides[1] != 1 && o.vocabulary > 1) {
    throw shape_error("ssm: " + std::string(name) + ": the logits' inner stride is " +
                      std::to_string(x.strides[1]) + "; wanted 1");
  }
  if (o.teacher.data &&
      (o.teacher.extents[0] != x.extents[0] || (o.teacher.strides[1] != 1 && o.vocabulary > 1))) {
    throw shape_error("ssm: " + std::string(name) + ": the student is " + to_string(x.extents) +
                      ", the teacher " + to_string(o.teacher.extents) + " with inner stride " +
                      std::to_string(o.teacher.strides[1]) +
                      "; wanted the same tokens and unit strides");
  }
  if (!(o.scale > 0)) {
    throw value_error("ssm: " + std::string(name) + ": the scale is " + std::to_string(o.scale) +
                      "; wanted a positive number");
  }
}

/// Rows of up to 2048 logits are a warp's; a few long rows are a cluster's each.
template <bool Pair, class T>
void launch_log_sums(const char* name, cudaStream_t stream, logit_arguments<T> o) {
  check_logits(name, o);
  const index_t rows = o.student.extents[0];
  if (rows == 0) return;
  o.team = o.vocabulary <= 2048 ? 32 : logit_threads;
  const int rows_a_block = o.team == 32 ? logit_threads / 32 : 1;
  int parts = 1;
  const bool clusters = device_rung() == rung::sm_90a;
  while (clusters && o.team > 32 && parts < 8 && rows * parts < 512 && o.vocabulary / parts > 8192)
    parts *= 2;
  const unsigned blocks = row_blocks(name, (rows + rows_a_block - 1) / rows_a_block * parts);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(parts);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(logit_threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = parts > 1 ? 1 : 0;
  SSMLIB_CHECK_CUDA(cudaLaunchKernelEx(&config, log_sum_kernel<Pair, T>, o));
}

inline constexpr index_t logit_chunk = 8192;  // elements of a row and a block

template <bool Pair, class T>
__global__ void __launch_bounds__(logit_threads)
    logit_vjp_kernel(const __grid_constant__ logit_arguments<T> o) {
  using R = accum_t<T>;
  const index_t team =
      o.team == 32 ? index_t{blockIdx.x} * (logit_threads / 32) + threadIdx.x / 32 : blockIdx.x;
  const index_t row = quotient(team, o.row_chunks), chunk = team - row * o.row_chunks;
  if (row >= o.student.extents[0]) return;
  const int thread = static_cast<int>(threadIdx.x) % o.team;
  const bool counted = o.counts(row);
  if (!counted && o.add) return;
  T* d_student = o.d_student.data ? o.d_student.data + row * o.d_student.strides[0] : nullptr;
  T* d_teacher = o.d_teacher.data ? o.d_teacher.data + row * o.d_teacher.strides[0] : nullptr;
  if constexpr (Pair) {
    if (chunk == o.row_chunks - 1 && !o.add) {  // what the other model has not
      fill_zeros(d_student, o.vocabulary, o.d_student.extents[1], thread, o.team);
      fill_zeros(d_teacher, o.vocabulary, o.d_teacher.extents[1], thread, o.team);
    }
  }
  const index_t begin = chunk * logit_chunk, end = min(o.vocabulary, begin + logit_chunk);
  if (!counted) {
    fill_zeros(d_student, begin, end, thread, o.team);
    fill_zeros(d_teacher, begin, end, thread, o.team);
    return;
  }
  double factor = o.g.factor * static_cast<double>(o.g.values[row * o.g.step]);
  if (o.g.divisor) factor /= max(*o.g.divisor, 1.0);
  const R g = static_cast<R>(factor);
  const softmax_of<R> probability(o.scale, o.log_sum[row]);
  const T* student = o.student.data + row * o.student.strides[0];
  const logit_target<T> to{d_student, d_teacher, o.add};
  if constexpr (Pair) {
    const double difference = o.log_sum[row] - o.teacher_log_sum[row];
    const softmax_of<R> teacher_probability(o.scale, o.teacher_log_sum[row]);
    const R offset = static_cast<R>(difference), divergence = static_cast<R>(o.result[row]);
    const T* teacher = o.teacher.data + row * o.teacher.strides[0];
    put_logits<true>(student, teacher, to, begin, end, thread, o.team,
                     [&](index_t, R zs, R zt, R& ds, R& dt) {
                       const R p = teacher_probability(zt);
                       const R log_ratio = p > R(0) ? fma(zt - zs, o.scale, offset) : R(0);
                       ds = g * (probability(zs) - p);
                       dt = g * p * (log_ratio - divergence);
                     });
  } else {
    const index_t target = o.targets[row];
    put_logits<false>(student, student, to, begin, end, thread, o.team,
                      [&](index_t i, R z, R, R& d, R&) {
                        const R p = probability(z);
                        d = g * (i == target ? p - R(1) : p);
                      });
  }
}

template <bool Pair, class T>
void launch_logit_vjp(const char* name, cudaStream_t stream, logit_arguments<T> o) {
  check_logits(name, o);
  check_same_extents(name, "the logits' gradient", o.student, o.d_student);
  if constexpr (Pair) check_same_extents(name, "the teacher's gradient", o.teacher, o.d_teacher);
  const auto in_place = [&](const void* d) {
    return d != nullptr && (d == o.student.data || d == o.teacher.data);
  };
  if (o.add && (in_place(o.d_student.data) || in_place(o.d_teacher.data))) {
    throw value_error("ssm: " + std::string(name) +
                      ": gradients are added to the logits that they come from; give them other "
                      "memory, or let them overwrite");
  }
  const index_t rows = o.student.extents[0];
  if (rows == 0 || (o.d_student.data == nullptr && o.d_teacher.data == nullptr)) return;
  o.team = o.vocabulary <= 2048 ? 32 : logit_threads;
  o.row_chunks = std::max<index_t>(1, (o.vocabulary + logit_chunk - 1) / logit_chunk);
  const index_t teams = rows * o.row_chunks, in_a_block = logit_threads / o.team;
  logit_vjp_kernel<Pair, T>
      <<<row_blocks(name, (teams + in_a_block - 1) / in_a_block), logit_threads, 0, stream>>>(o);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
[[nodiscard]] logit_arguments<T> logits_of(const cross_entropy_problem<T>& p, double* log_sum,
                                           double* log_probability) {
  return {p.logits, {},      p.logits.extents[1], p.targets, nullptr, p.ignore_index, p.scale,
          log_sum,  nullptr, log_probability};
}
template <class T>
[[nodiscard]] logit_arguments<T> logits_of(const kl_divergence_problem<T>& p,
                                           const kl_divergence_rows& rows) {
  return {p.student,
          p.teacher,
          std::min(p.student.extents[1], p.teacher.extents[1]),
          nullptr,
          p.mask,
          0,
          p.scale,
          rows.student_log_sum,
          rows.teacher_log_sum,
          rows.divergence};
}

}  // namespace detail

template <class T>
void cross_entropy(cudaStream_t stream, const cross_entropy_problem<T>& p, double* log_sum,
                   double* log_probability) {
  detail::launch_log_sums<false>("cross_entropy", stream,
                                 detail::logits_of(p, log_sum, log_probability));
}

template <class T>
void cross_entropy_vjp(cudaStream_t stream, const cross_entropy_problem<T>& p,
                       const double* log_sum, const row_factor<accum_t<T>>& g, view<T, 2> d_logits,
                       bool add) {
  auto o = detail::logits_of(p, const_cast<double*>(log_sum), nullptr);
  o.g = g;
  o.d_student = d_logits;
  o.add = add;
  detail::launch_logit_vjp<false>("cross_entropy_vjp", stream, o);
}

template <class T>
void kl_divergence(cudaStream_t stream, const kl_divergence_problem<T>& p,
                   const kl_divergence_rows& rows) {
  detail::launch_log_sums<true>("kl_divergence", stream, detail::logits_of(p, rows));
}

template <class T>
void kl_divergence_vjp(cudaStream_t stream, const kl_divergence_problem<T>& p,
                       const kl_divergence_rows& rows, const row_factor<accum_t<T>>& g,
                       view<T, 2> d_student, view<T, 2> d_teacher, bool add) {
  auto o = detail::logits_of(p, rows);
  o.g = g;
  o.d_student = d_student;
  o.d_teacher = d_teacher;
  o.add = add;
  detail::launch_logit_vjp<true>("kl_divergence_vjp", stream, o);
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_cross_entropy,                                                                          \
      void cross_entropy<T>(cudaStream_t, const cross_entropy_problem<T>&, double*, double*));     \
  SSMLIB_INSTANTIATE(                                                                              \
      cuda_cross_entropy,                                                                          \
      void cross_entropy_vjp<T>(cudaStream_t, const cross_entropy_problem<T>&, const double*,      \
                                const row_factor<accum_t<T>>&, view<T, 2>, bool));                 \
  SSMLIB_INSTANTIATE(cuda_cross_entropy,                                                           \
                     void kl_divergence<T>(cudaStream_t, const kl_divergence_problem<T>&,          \
                                           const kl_divergence_rows&));                            \
  SSMLIB_INSTANTIATE(cuda_cross_entropy,                                                           \
                     void kl_divergence_vjp<T>(                                                    \
                         cudaStream_t, const kl_divergence_problem<T>&, const kl_divergence_rows&, \
                         const row_factor<accum_t<T>>&, view<T, 2>, view<T, 2>, bool))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
