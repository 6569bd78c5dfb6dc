#pragma once

#include <ssmlib/kernels/cuda/quadratic.cuh>
#include <ssmlib/kernels/cuda/toeplitz_transform.cuh>

#include <algorithm>

/// @file
/// What Toeplitz products through transforms launch. Columns go through in chunks that stay in the
/// second-level cache; what sums over columns (heads of a group, features of the gram matrix) has
/// them all in one chunk.

namespace ssm::kernels::cuda::detail {

/// Consecutive sequences that share a size of transform.
struct toeplitz_run {
  index_t first, count, longest, size;
};

/// The smallest of 4, 5, 6, 7 times a power of two above 1 that is at least n.
[[nodiscard]] inline index_t toeplitz_transform_size(index_t n) {
  index_t power = 2;
  while (7 * power < n)
    power *= 2;
  for (index_t m = 4; m < 7; ++m)
    if (m * power >= n) return m * power;
  return 7 * power;
}

/// f(run) for the runs of a problem, none for empty sequences.
template <class T, class F>
void for_each_run(const toeplitz_problem<T>& p, F f) {
  if (p.host_offsets == nullptr) {
    if (p.sequences * p.max_length == 0) return;
    return f(
        toeplitz_run{0, p.sequences, p.max_length, toeplitz_transform_size(2 * p.max_length - 1)});
  }
  toeplitz_run run{};
  for (index_t i = 0; i < p.sequences; ++i) {
    const index_t length = p.host_offsets[i + 1] - p.host_offsets[i];
    const index_t size = length == 0 ? 0 : toeplitz_transform_size(2 * length - 1);
    if (run.count > 0 && size == run.size) {
      ++run.count;
      run.longest = std::max(run.longest, length);
      continue;
    }
    if (run.count > 0) f(run);
    run = {i, size == 0 ? index_t{0} : index_t{1}, length, size};
  }
  if (run.count > 0) f(run);
}

/// One product through transforms: unit columns out = alpha sum of weight o L (outer o inner), with
/// L^T where `transposed`.
template <class T>
struct toeplitz_job {
  head_operand<const T> outer, inner, weight;
  view<T, 3> out;
  bool transposed, add;
};

/// Runs jobs on a stream; without a workspace it only makes the plans and counts bytes.
template <class T>
class toeplitz_transforms {
 public:
  using A = accum_t<T>;

  toeplitz_transforms(cudaStream_t stream, const toeplitz_problem<T>& p, toeplitz_plans<A>& plans,
                      void* workspace)
      : stream_(stream), p_(p), plans_(plans), workspace_(workspace) {}
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

  void product(const toeplitz_job<T>& job) {
    for_each_run(p_, [&](const toeplitz_run& run) { product(job, run); });
  }
  void kernel_gradient(head_operand<const T> dy, view<A, 2> to, bool add) {
    if (workspace_ != nullptr && !add && to.size() > 0) {
      toeplitz_zero_kernel<<<blocks_for((to.size() + 255) / 256), 256, 0, stream_>>>(to);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
    for_each_run(p_, [&](const toeplitz_run& run) { kernel_gradient(dy, to, run); });
  }
  [[nodiscard]] head_operand<const T> operand(view<const T, 3> v) const { return {v, p_.heads}; }

 private:
  using plan = typename toeplitz_plans<A>::plan;
  static constexpr index_t chunk_bytes = index_t{32} << 20;

  [[nodiscard]] static index_t chunk_columns(index_t size) {
    return std::max<index_t>(1, chunk_bytes / ((size + 2) * index_t{sizeof(A)}));
  }
  [[nodiscard]] packed_sequences sequences() const {
    return {p_.offsets, p_.sequences, p_.max_length};
  }
  /// The plan, and room for it in the working memory that all plans share.
  plan take_plan(bool inverse, index_t size, index_t batch, std::size_t& room) {
    const plan made = plans_.get(inverse, size, batch);
    room = std::max(room, made.workspace);
    return made;
  }
  void load(const head_operand<const T>& outer, const head_operand<const T>& inner,
            const toeplitz_columns& columns, index_t first, index_t count, index_t size, A* work) {
    const index_t tiles = ((count + 31) / 32) * ((size + 31) / 32);
    toeplitz_load_kernel<T><<<blocks_for(tiles), 256, 0, stream_>>>(
        outer, inner, sequences(), columns, first, count, size, work);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  }

  /// The kernels that the heads of the units [first, first + count) use.
  struct kernel_range {
    index_t begin, end;
    bool operator==(const kernel_range&) const = default;
  };
  [[nodiscard]] kernel_range kernels_of(const toeplitz_columns& columns, index_t first,
                                        index_t count) const {
    const index_t a_group = columns.count * columns.features, kernels = p_.kernel.extents[0];
    const index_t last_head = ((first + count - 1) / a_group + 1) * columns.share - 1;
    return {group_of(first / a_group * columns.share, p_.heads, kernels),
            group_of(last_head, p_.heads, kernels) + 1};
  }

  void product(const toeplitz_job<T>& job, const toeplitz_run& run) {
    const index_t size = run.size, groups = job.out.extents[1], pitch = size + 2;
    const toeplitz_columns columns{groups,
                                   run.count,
                                   job.out.extents[2],
                                   p_.heads / groups,
                                   job.inner.data == nullptr ? 1 : index_t{job.inner.size},
                                   run.first};
    const index_t units = columns.units(), members = columns.members();
    if (units * members == 0) return;
    index_t a_chunk = std::clamp<index_t>(chunk_columns(size) / members, 1, units);
    const index_t chunks = (units + a_chunk - 1) / a_chunk;
    a_chunk = (units + chunks - 1) / chunks;
    index_t spectra_count = 0;
    for (index_t u = 0; u < units; u += a_chunk) {
      const kernel_range r = kernels_of(columns, u, std::min(a_chunk, units - u));
      spectra_count = std::max(spectra_count, r.end - r.begin);
    }
    std::size_t room = 0;
    const plan to_spectra = take_plan(false, size, spectra_count, room);
    const plan forward = take_plan(false, size, a_chunk * members, room);
    const plan inverse = take_plan(true, size, a_chunk * members, room);
    workspace_pieces pieces(workspace_);
    A* spectra = pieces.take<A>(spectra_count * pitch);
    A* work = pieces.take<A>(a_chunk * members * pitch);
    auto* area = pieces.take<unsigned char>(static_cast<index_t>(room));
    bytes_ = std::max(bytes_, pieces.bytes());
    if (workspace_ == nullptr) return;
    kernel_range have{-1, -1};
    for (index_t u = 0; u < units; u += a_chunk) {
      const index_t count = std::min(a_chunk, units - u);
      const kernel_range wanted = kernels_of(columns, u, count);
      if (!(wanted == have)) {
        const index_t blocks = (spectra_count * pitch + 255) / 256;
        toeplitz_pad_kernel<A><<<blocks_for(blocks), 256, 0, stream_>>>(
            p_.kernel, wanted.begin, spectra_count, run.longest, size, spectra);
        SSMLIB_CHECK_CUDA(cudaGetLastError());
        execute_plan<A>(stream_, to_spectra, spectra, area);
        have = wanted;
      }
      load(job.outer, job.inner, columns, u * members, count * members, size, work);
      execute_plan<A>(stream_, forward, work, area);
      multiply(job.transposed, columns, u * members, count * members, have.begin, size, spectra,
               work);
      execute_plan<A>(stream_, inverse, work, area);
      const index_t tiles = ((count + 31) / 32) * ((run.longest + 31) / 32);
      toeplitz_store_kernel<T><<<blocks_for(tiles), 256, 0, stream_>>>(
          {job.out, p_.heads}, job.weight, p_.q ? p_.alpha : A(1), sequences(), columns, u, count,
          run.longest, size, work, job.add);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
  }

  void multiply(bool conjugate, const toeplitz_columns& columns, index_t first, index_t count,
                index_t first_kernel, index_t size, const A* spectra, A* work) {
    const index_t frequencies = size / 2 + 1, blocks = count * ((frequencies + 1023) / 1024);
    const A scale = A(1) / static_cast<A>(size);
    const auto* a = reinterpret_cast<const complex_number<A>*>(spectra);
    auto* b = reinterpret_cast<complex_number<A>*>(work);
    const auto launch = [&](auto kernel) {
      kernel<<<blocks_for(blocks), 256, 0, stream_>>>(columns, first, count, p_.heads,
                                                      p_.kernel.extents[0], first_kernel,
                                                      frequencies, scale, a, b);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    };
    if (conjugate) {
      launch(toeplitz_multiply_kernel<true, A>);
    } else {
      launch(toeplitz_multiply_kernel<false, A>);
    }
  }

  /// Correlations of (q o) dy with (k o) x, summed over columns as spectra.
  void kernel_gradient(const head_operand<const T>& dy, view<A, 2> to, const toeplitz_run& run) {
    const index_t size = run.size, groups = to.extents[0], pitch = size + 2;
    const toeplitz_columns columns{groups,
                                   run.count,
                                   p_.x.extents[2],
                                   p_.heads / groups,
                                   p_.q ? p_.q.extents[2] : index_t{1},
                                   run.first};
    const index_t a_group = run.count * columns.features * columns.members();
    if (groups * a_group == 0) return;
    const index_t batch = std::clamp<index_t>(chunk_columns(size) / a_group, 1, groups);
    const index_t chunk = std::min(chunk_columns(size), batch * a_group);
    std::size_t room = 0;
    const plan forward = take_plan(false, size, chunk, room);
    const plan inverse = take_plan(true, size, batch, room);
    workspace_pieces pieces(workspace_);
    A* a = pieces.take<A>(chunk * pitch);
    A* b = pieces.take<A>(chunk * pitch);
    A* sums = pieces.take<A>(batch * pitch);
    auto* area = pieces.take<unsigned char>(static_cast<index_t>(room));
    bytes_ = std::max(bytes_, pieces.bytes());
    if (workspace_ == nullptr) return;
    const index_t frequencies = size / 2 + 1;
    for (index_t g = 0; g < groups; g += batch) {
      const index_t here = std::min(batch, groups - g), all = here * a_group;
      for (index_t c = 0; c < all; c += chunk) {
        const index_t count = std::min(chunk, all - c), first = g * a_group + c;
        load(operand(p_.x), operand(p_.k), columns, first, count, size, a);
        load(dy, operand(p_.q), columns, first, count, size, b);
        execute_plan<A>(stream_, forward, a, area);
        execute_plan<A>(stream_, forward, b, area);
        toeplitz_correlate_kernel<A>
            <<<blocks_for(here * ((frequencies + 31) / 32)), 256, 0, stream_>>>(
                reinterpret_cast<const complex_number<A>*>(a),
                reinterpret_cast<const complex_number<A>*>(b), c, count, here, a_group, frequencies,
                reinterpret_cast<complex_number<A>*>(sums), c > 0);
        SSMLIB_CHECK_CUDA(cudaGetLastError());
      }
      execute_plan<A>(stream_, inverse, sums, area);
      toeplitz_add_kernel<A><<<blocks_for((here * run.longest + 255) / 256), 256, 0, stream_>>>(
          sums, here, run.longest, size, (p_.q ? p_.alpha : A(1)) / static_cast<A>(size), to, g);
      SSMLIB_CHECK_CUDA(cudaGetLastError());
    }
  }

  cudaStream_t stream_;
  const toeplitz_problem<T>& p_;
  toeplitz_plans<A>& plans_;
  void* workspace_;
  std::size_t bytes_ = 0;
};

}  // namespace ssm::kernels::cuda::detail
