#pragma once

#include <ssmlib/kernels/cuda/attention_statistics.cuh>
#include <ssmlib/kernels/cuda/attention_tile.cuh>

/// @file
/// dq of attention on Hopper: a block keeps the sums of a tile of queries, keys and values stream
/// past.

namespace ssm::kernels::cuda::detail {

/// @tparam D  head size, rounded up
template <int D>
struct backward_queries_tile {
  static constexpr int size = D, groups = 2, rows = 64 * groups, keys = D > 64 ? 96 : 128;
  static constexpr int stages = 2;
  static constexpr int panels = (D + 63) / 64, threads = 128 * (groups + 1);
  static constexpr int key_panel = keys * 128, query_panel = rows * 128;
  static constexpr int key_bytes = panels * key_panel, query_bytes = panels * query_panel;
  static constexpr int barriers = 2 * query_bytes + 2 * stages * key_bytes;
  static constexpr int shared_bytes = barriers + 8 * (2 + 2 * stages) + 1024;  // to align
};

struct backward_queries_parameters {
  attention_operand<bf16> dq;
  attention_layout layout;
  attention_schedule schedule;
  backward_statistics statistics;
  float scale;
  int k_heads, v_heads;
};

template <class Tile>
struct backward_queries_shared {
  unsigned char *q, *dy, *k, *v;
  std::uint64_t *rows_full, *rows_free, *full, *free;

  SSMLIB_DEVICE explicit backward_queries_shared(unsigned char* memory) {
    memory += -shared_address(memory) & 1023;
    q = memory;
    dy = q + Tile::query_bytes;
    k = dy + Tile::query_bytes;
    v = k + Tile::stages * Tile::key_bytes;
    rows_full = reinterpret_cast<std::uint64_t*>(memory + Tile::barriers);
    rows_free = rows_full + 1;
    full = rows_free + 1;
    free = full + Tile::stages;
  }
  SSMLIB_DEVICE void init() const {
    barrier_init(rows_full, 1);
    barrier_init(rows_free, 4 * Tile::groups);
    for (int i = 0; i < Tile::stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(free + i, 4 * Tile::groups);
    }
    barrier_init_done();
  }
};

template <class Tile>
SSMLIB_DEVICE void backward_queries_copies(const backward_queries_parameters& p,
                                           const backward_queries_shared<Tile>& shared,
                                           const CUtensorMap* q_map, const CUtensorMap* k_map,
                                           const CUtensorMap* v_map, const CUtensorMap* dy_map) {
  ring<1> rows_at;
  ring<Tile::stages> at;
  const attention_layout& layout = p.layout;
  for (index_t n = blockIdx.x; n < p.schedule.size(); n += gridDim.x) {
    const attention_tile work = p.schedule[n];
    const query_range<Tile> range(layout, work);
    if (range.first == range.end) continue;
    const auto row_box =
        position_of(layout.offsets != nullptr, work, work.head, range.span.query_begin);
    const bool packed = layout.key_offsets != nullptr;
    const auto k_box = position_of(packed, work, head_of(work.head, layout.heads, p.k_heads),
                                   range.span.key_begin);
    const auto v_box = position_of(packed, work, head_of(work.head, layout.heads, p.v_heads),
                                   range.span.key_begin);
    barrier_wait(shared.rows_free, rows_at.parity ^ 1);
    barrier_arrive_expect(shared.rows_full, 2 * Tile::query_bytes);
    load_panels<Tile::panels, Tile::query_panel>(shared.q, q_map, shared.rows_full, row_box,
                                                 range.row0);
    load_panels<Tile::panels, Tile::query_panel>(shared.dy, dy_map, shared.rows_full, row_box,
                                                 range.row0);
    rows_at.next();
    for (int i = range.end - 1; i >= range.first; --i, at.next()) {
      const int s = at.stage;
      barrier_wait(shared.free + s, at.parity ^ 1);
      barrier_arrive_expect(shared.full + s, 2 * Tile::key_bytes);
      load_panels<Tile::panels, Tile::key_panel>(shared.k + s * Tile::key_bytes, k_map,
                                                 shared.full + s, k_box, i * Tile::keys);
      load_panels<Tile::panels, Tile::key_panel>(shared.v + s * Tile::key_bytes, v_map,
                                                 shared.full + s, v_box, i * Tile::keys);
    }
  }
}

template <class Tile>
class backward_queries_rows {
 public:
  static constexpr int D = Tile::size, N = Tile::keys;

  SSMLIB_DEVICE backward_queries_rows(const backward_queries_parameters& p,
                                      const backward_queries_shared<Tile>& shared, int group)
      : p_(p),
        shared_(shared),
        group_(group),
        thread_(threadIdx.x % 128),
        row_(64 * group + 16 * (thread_ / 32) + thread_ % 32 / 4),
        unit_(p.scale * 1.4426950408889634f) {}

  SSMLIB_DEVICE void run() {
    for (index_t n = blockIdx.x; n < p_.schedule.size(); n += gridDim.x) {
      const attention_tile work = p_.schedule[n];
      const query_range<Tile> range(p_.layout, work);
      if (range.row0 >= range.span.queries) continue;
#pragma unroll
      for (int i = 0; i < D / 2; ++i)
        dq_[i] = 0.0f;
      if (range.first < range.end) {
        const index_t place =
            p_.statistics.place(work.sequence, range.span.query_begin, work.head) + range.row0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          log_sum_[r] = p_.statistics.log_sum[place + row_ + 8 * r];
          delta_[r] = p_.statistics.delta[place + row_ + 8 * r];
        }
        barrier_wait(shared_.rows_full, rows_at_.parity);
        rows_at_.next();
        pending_ = -1;
        for (int i = range.end - 1; i >= range.first; --i, at_.next())
          add(range, i);
        products_wait<0>();
        pin(dq_);
        if (pending_ >= 0) release(shared_.free + pending_);
        release(shared_.rows_free);
      }
      store(range, work.head);
    }
  }

 private:
  SSMLIB_DEVICE void release(std::uint64_t* barrier) const {
    if (thread_ % 32 == 0) barrier_arrive(barrier);
  }

  /// Adds what the keys of tile i contribute.
  SSMLIB_DEVICE void add(const query_range<Tile>& range, int i) {
    const int stage = at_.stage, key0 = i * N;
    const attention_layout& layout = p_.layout;
    const int position = range.row0 + 64 * group_ + range.span.shift();
    if (layout.causal && key0 > position + 63) {  // only the later warpgroup's rows see it
      barrier_wait(shared_.full + stage, at_.parity);
      release(shared_.free + stage);
      return;
    }
    unsigned char* k = shared_.k + stage * Tile::key_bytes;
    unsigned char* v = shared_.v + stage * Tile::key_bytes;
    barrier_wait(shared_.full + stage, at_.parity);
    // Behind a packed sequence's last key another begins: 0 times its numbers might be NaN.
    if (p_.layout.key_offsets != nullptr && key0 + N > range.span.keys) {
      clear_rows<Tile::panels, N>(k, range.span.keys - key0, thread_, 8 + group_);
      clear_rows<Tile::panels, N>(v, range.span.keys - key0, thread_, 8 + group_);
    }
    const std::uint64_t q = panel_descriptor(shared_address(shared_.q) + group_ * 64 * 128);
    const std::uint64_t dy = panel_descriptor(shared_address(shared_.dy) + group_ * 64 * 128);
    const std::uint64_t k_at = panel_descriptor(shared_address(k), Tile::key_panel);
    products_begin();
    multiply_rows<N, D, Tile::query_panel, Tile::key_panel>(s_, q, k_at);
    products_commit();
    multiply_rows<N, D, Tile::query_panel, Tile::key_panel>(ds_, dy,
                                                            panel_descriptor(shared_address(v)));
    products_commit();
    products_wait<1>();
    pin(s_);
    pin(dw_);
    if (pending_ >= 0) release(shared_.free + pending_);
    pending_ = stage;
    if (key0 + N > range.span.keys ||
        (layout.causal && (key0 + N - 1 > position || key0 <= position + 63 - layout.window))) {
      const int mine = range.row0 + row_ + range.span.shift();
      const kept_columns kept[2] = {kept_keys(layout, range.span, mine, key0),
                                    kept_keys(layout, range.span, mine + 8, key0)};
      mask_rows<N>(s_, kept, -INFINITY);
    }
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      s_[j] = power_of_2(fmaf(s_[j], unit_, -log_sum_[j / 2 % 2]));
    products_wait<0>();
    pin(ds_);
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
      ds_[j] = s_[j] * (ds_[j] - delta_[j / 2 % 2]);
    to_operand(ds_, dw_);
    products_begin();
    accumulate_rows<N, D>(dq_, dw_, k_at);
    products_commit();
  }

  SSMLIB_DEVICE void store(const query_range<Tile>& range, int head) const {
    const float scales[2] = {p_.scale, p_.scale};
    bf16* to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = range.row0 + row_ + 8 * r;
      to[r] = row < range.span.queries ? p_.dq.row(range.span.query_begin + row, head) : nullptr;
    }
    store_product<D>(dq_, scales, to, p_.dq.size);
  }

  const backward_queries_parameters& p_;
  const backward_queries_shared<Tile>& shared_;
  int group_, thread_, row_;
  float unit_;
  ring<1> rows_at_;
  ring<Tile::stages> at_;
  int pending_ = -1;
  float log_sum_[2], delta_[2];
  float s_[N / 2], ds_[N / 2], dq_[D / 2];
  std::uint32_t dw_[N / 4] = {};
};

template <class Tile>
__global__ __launch_bounds__(Tile::threads, 1) void attention_backward_queries_kernel(
    const __grid_constant__ backward_queries_parameters p,
    const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dy_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  const backward_queries_shared<Tile> shared(memory);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (group == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      backward_queries_copies<Tile>(p, shared, &q_map, &k_map, &v_map, &dy_map);
    }
  } else {
    take_registers<240>();
    backward_queries_rows<Tile>(p, shared, group - 1).run();
  }
#else
  __trap();
#endif
}

template <class Tile>
void launch_backward_queries(cudaStream_t stream, const attention_problem<bf16>& problem,
                             view<const bf16, 3> dy, view<bf16, 3> dq,
                             const backward_statistics& statistics) {
  backward_queries_parameters p{attention_operand<bf16>(dq),
                                attention_layout(problem),
                                {},
                                statistics,
                                static_cast<float>(problem.scale),
                                static_cast<int>(problem.k.extents[1]),
                                static_cast<int>(problem.v.extents[1])};
  const bool packed = p.layout.offsets != nullptr, key_packed = p.layout.key_offsets != nullptr;
  const index_t n = problem.sequences, length = p.layout.max_key_length;
  p.schedule =
      make_schedule(n, p.layout.heads, p.layout.max_length, Tile::rows, true,
                    length * 4 * Tile::size, problem.heads / std::max(p.k_heads, p.v_heads));
  const index_t tiles = p.schedule.pairs * p.schedule.tiles;
  if (tiles == 0) return;
  const attention_boxes q(problem.q, packed, n, p.layout.max_length, Tile::rows),
      k(problem.k, key_packed, n, length, Tile::keys),
      v(problem.v, key_packed, n, length, Tile::keys),
      d(dy, packed, n, p.layout.max_length, Tile::rows);
  const unsigned blocks =
      persistent_blocks(attention_backward_queries_kernel<Tile>, Tile::shared_bytes, tiles);
  attention_backward_queries_kernel<Tile>
      <<<blocks, Tile::threads, Tile::shared_bytes, stream>>>(p, q.map, k.map, v.map, d.map);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
