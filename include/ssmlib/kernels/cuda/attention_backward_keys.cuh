#pragma once

#include <ssmlib/kernels/cuda/attention_statistics.cuh>
#include <ssmlib/kernels/cuda/attention_tile.cuh>

/// @file
/// dk and dv of attention on Hopper. A block keeps the sums of a tile of keys; the queries of all
/// heads that share the key head stream past. Logits are computed transposed, (keys x queries), so
/// that weights and their derivatives are left operands of the next products in registers.

namespace ssm::kernels::cuda::detail {

/// @tparam D  head size, rounded up
template <int D>
struct backward_keys_tile {
  static constexpr int size = D, groups = 2, keys = 64 * groups, queries = 64, stages = 3;
  static constexpr int panels = (D + 63) / 64, threads = 128 * (groups + 1);
  static constexpr int key_panel = keys * 128, query_panel = queries * 128;
  static constexpr int key_bytes = panels * key_panel, query_bytes = panels * query_panel;
  static constexpr int statistics = 2 * key_bytes + 2 * stages * query_bytes;
  static constexpr int barriers = statistics + stages * 2 * queries * 4;
  static constexpr int shared_bytes = barriers + 8 * (2 + 2 * stages) + 1024;  // to align
  /// Large heads leave no registers for both left operands at once: dv's products end before dk's.
  static constexpr bool one_operand = D > 96;
};

struct backward_keys_parameters {
  attention_operand<bf16> dk, dv;  // either may be absent
  attention_layout layout;
  attention_schedule schedule;  // over key heads
  backward_statistics statistics;
  float scale;
  int key_heads;
};

template <class Tile>
struct backward_keys_shared {
  unsigned char *k, *v, *q, *dy;
  float* statistics;  // a stage: log sums, then deltas
  std::uint64_t *keys_full, *keys_free, *full, *free;

  SSMLIB_DEVICE explicit backward_keys_shared(unsigned char* memory) {
    memory += -shared_address(memory) & 1023;
    k = memory;
    v = k + Tile::key_bytes;
    q = v + Tile::key_bytes;
    dy = q + Tile::stages * Tile::query_bytes;
    statistics = reinterpret_cast<float*>(memory + Tile::statistics);
    keys_full = reinterpret_cast<std::uint64_t*>(memory + Tile::barriers);
    keys_free = keys_full + 1;
    full = keys_free + 1;
    free = full + Tile::stages;
  }
  SSMLIB_DEVICE void init() const {
    barrier_init(keys_full, 1);
    barrier_init(keys_free, 4 * Tile::groups);
    for (int i = 0; i < Tile::stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(free + i, 4 * Tile::groups);
    }
    barrier_init_done();
  }
};

template <class Tile>
SSMLIB_DEVICE void backward_keys_copies(const backward_keys_parameters& p,
                                        const backward_keys_shared<Tile>& shared,
                                        const CUtensorMap* q_map, const CUtensorMap* k_map,
                                        const CUtensorMap* v_map, const CUtensorMap* dy_map) {
  ring<1> keys_at;
  ring<Tile::stages> at;
  const int shared_by = p.layout.heads / p.key_heads;
  for (index_t n = blockIdx.x; n < p.schedule.size(); n += gridDim.x) {
    const attention_tile work = p.schedule[n];
    const key_range<Tile> range(p.layout, work);
    if (range.first == range.end) continue;
    const auto key_box =
        position_of(p.layout.key_offsets != nullptr, work, work.head, range.span.key_begin);
    barrier_wait(shared.keys_free, keys_at.parity ^ 1);
    barrier_arrive_expect(shared.keys_full, 2 * Tile::key_bytes);
    load_panels<Tile::panels, Tile::key_panel>(shared.k, k_map, shared.keys_full, key_box,
                                               range.key0);
    load_panels<Tile::panels, Tile::key_panel>(shared.v, v_map, shared.keys_full, key_box,
                                               range.key0);
    keys_at.next();
    for (int h = work.head * shared_by; h < (work.head + 1) * shared_by; ++h) {
      const auto box = position_of(p.layout.offsets != nullptr, work, h, range.span.query_begin);
      const index_t place = p.statistics.place(work.sequence, range.span.query_begin, h);
      for (int i = range.first; i < range.end; ++i, at.next()) {
        const int s = at.stage, row = i * Tile::queries;
        constexpr int bytes = Tile::queries * 4;
        barrier_wait(shared.free + s, at.parity ^ 1);
        barrier_arrive_expect(shared.full + s, 2 * Tile::query_bytes + 2 * bytes);
        load_panels<Tile::panels, Tile::query_panel>(shared.q + s * Tile::query_bytes, q_map,
                                                     shared.full + s, box, row);
        load_panels<Tile::panels, Tile::query_panel>(shared.dy + s * Tile::query_bytes, dy_map,
                                                     shared.full + s, box, row);
        float* to = shared.statistics + s * 2 * Tile::queries;
        load_bulk(to, p.statistics.log_sum + place + row, bytes, shared.full + s);
        load_bulk(to + Tile::queries, p.statistics.delta + place + row, bytes, shared.full + s);
      }
    }
  }
}

template <class Tile>
class backward_keys_rows {
 public:
  static constexpr int D = Tile::size, N = Tile::queries;

  SSMLIB_DEVICE backward_keys_rows(const backward_keys_parameters& p,
                                   const backward_keys_shared<Tile>& shared, int group)
      : p_(p),
        shared_(shared),
        group_(group),
        thread_(threadIdx.x % 128),
        row_(64 * group + 16 * (thread_ / 32) + thread_ % 32 / 4),
        unit_(p.scale * 1.4426950408889634f) {}

  SSMLIB_DEVICE void run() {
    const int shared_by = p_.layout.heads / p_.key_heads;
    for (index_t n = blockIdx.x; n < p_.schedule.size(); n += gridDim.x) {
      const attention_tile work = p_.schedule[n];
      const key_range<Tile> range(p_.layout, work);
      if (range.key0 >= range.span.keys) continue;
#pragma unroll
      for (int i = 0; i < D / 2; ++i)
        dk_[i] = dv_[i] = 0.0f;
      if (range.first < range.end) {
        barrier_wait(shared_.keys_full, keys_at_.parity);
        keys_at_.next();
        pending_ = -1;
        for (int h = 0; h < shared_by; ++h)
          for (int i = range.first; i < range.end; ++i, at_.next())
            add(range, i);
        settle();
        release(shared_.keys_free);
      }
      store(range, work.head);
    }
  }

 private:
  SSMLIB_DEVICE void release(std::uint64_t* barrier) const {
    if (thread_ % 32 == 0) barrier_arrive(barrier);
  }
  /// The products of the stage that was multiplied last are done: it may be overwritten.
  SSMLIB_DEVICE void release_pending() {
    if (pending_ >= 0) release(shared_.free + pending_);
  }
  SSMLIB_DEVICE void settle() {
    products_wait<0>();
    pin(dk_);
    pin(dv_);
    release_pending();
    pending_ = -1;
  }

  /// Whether some query of the tile sees some key of this warpgroup, and whether all see all.
  SSMLIB_DEVICE void compare(const key_range<Tile>& range, int query0, bool& some,
                             bool& all) const {
    const int first = query0 + range.span.shift(), last = first + N - 1;  // positions
    const int key = range.key0 + 64 * group_, key_last = key + 63;
    some = !p_.layout.causal || (last >= key && first - p_.layout.window < key_last);
    all = !p_.layout.causal || (first >= key_last && last - p_.layout.window < key);
  }

  /// Adds what the queries of one tile contribute.
  SSMLIB_DEVICE void add(const key_range<Tile>& range, int i) {
    const int stage = at_.stage, query0 = i * N;
    bool some, all;
    compare(range, query0, some, all);
    barrier_wait(shared_.full + stage, at_.parity);
    if (!some) {
      settle();
      release(shared_.free + stage);
      return;
    }
    unsigned char* q = shared_.q + stage * Tile::query_bytes;
    unsigned char* dy = shared_.dy + stage * Tile::query_bytes;
    // Behind a packed sequence's last query another begins: 0 times its numbers might be NaN.
    if (p_.layout.offsets != nullptr && query0 + N > range.span.queries) {
      clear_rows<Tile::panels, N>(q, range.span.queries - query0, thread_, 8 + group_);
      clear_rows<Tile::panels, N>(dy, range.span.queries - query0, thread_, 8 + group_);
    }
    const std::uint64_t k = panel_descriptor(shared_address(shared_.k) + group_ * 64 * 128);
    const std::uint64_t v = panel_descriptor(shared_address(shared_.v) + group_ * 64 * 128);
    const std::uint64_t q_at = panel_descriptor(shared_address(q), Tile::query_panel);
    const std::uint64_t dy_at = panel_descriptor(shared_address(dy), Tile::query_panel);
    products_begin();
    multiply_rows<N, D, Tile::key_panel, Tile::query_panel>(s_, k, q_at);
    products_commit();
    multiply_rows<N, D, Tile::key_panel, Tile::query_panel>(ds_, v, dy_at);
    products_commit();
    products_wait<1>();
    pin(s_);
    pin(w_);
    if constexpr (!Tile::one_operand) pin(dw_);
    release_pending();
    pending_ = stage;
    if (!all) {
      const int key = range.key0 + row_;
      const kept_columns kept[2] = {kept_queries(p_.layout, range.span, key, query0),
                                    kept_queries(p_.layout, range.span, key + 8, query0)};
      mask_rows<N>(s_, kept, -INFINITY);
    }
    weigh(shared_.statistics + stage * 2 * N);
    to_operand(s_, w_);
    products_begin();
    accumulate_rows<N, D>(dv_, w_, dy_at);
    products_commit();
    products_wait<Tile::one_operand ? 0 : 1>();
    pin(ds_);
    if constexpr (Tile::one_operand) pin(w_);
    differentiate(shared_.statistics + stage * 2 * N + N);
    auto& derivative = Tile::one_operand ? w_ : dw_;
    to_operand(ds_, derivative);
    products_begin();
    accumulate_rows<N, D>(dk_, derivative, q_at);
    products_commit();
  }

  /// s becomes the weights.
  SSMLIB_DEVICE void weigh(const float* log_sum) {
    const int t = thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 l = *reinterpret_cast<const float2*>(log_sum + 8 * j + t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        s_[4 * j + 2 * r] = power_of_2(fmaf(s_[4 * j + 2 * r], unit_, -l.x));
        s_[4 * j + 2 * r + 1] = power_of_2(fmaf(s_[4 * j + 2 * r + 1], unit_, -l.y));
      }
    }
  }
  /// ds becomes the derivative by the logits.
  SSMLIB_DEVICE void differentiate(const float* delta) {
    const int t = thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j + t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 4 * j + 2 * r;
        ds_[at] = s_[at] * (ds_[at] - d.x);
        ds_[at + 1] = s_[at + 1] * (ds_[at + 1] - d.y);
      }
    }
  }

  SSMLIB_DEVICE void store(const key_range<Tile>& range, int head) const {
    const float scales[2] = {p_.scale, p_.scale}, ones[2] = {1.0f, 1.0f};
    bf16 *dk[2], *dv[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = range.key0 + row_ + 8 * r;
      const index_t token = range.span.key_begin + row;
      const bool there = row < range.span.keys;
      dk[r] = there && p_.dk.data != nullptr ? p_.dk.row(token, head) : nullptr;
      dv[r] = there && p_.dv.data != nullptr ? p_.dv.row(token, head) : nullptr;
    }
    store_product<D>(dk_, scales, dk, p_.dk.size);
    store_product<D>(dv_, ones, dv, p_.dv.size);
  }

  const backward_keys_parameters& p_;
  const backward_keys_shared<Tile>& shared_;
  int group_, thread_, row_;
  float unit_;
  ring<1> keys_at_;
  ring<Tile::stages> at_;
  int pending_ = -1;
  float s_[N / 2], ds_[N / 2], dk_[D / 2], dv_[D / 2];
  std::uint32_t w_[N / 4] = {}, dw_[N / 4] = {};
};

template <class Tile>
__global__ __launch_bounds__(Tile::threads, 1) void attention_backward_keys_kernel(
    const __grid_constant__ backward_keys_parameters p, const __grid_constant__ CUtensorMap q_map,
    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
    const __grid_constant__ CUtensorMap dy_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  const backward_keys_shared<Tile> shared(memory);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (group == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      backward_keys_copies<Tile>(p, shared, &q_map, &k_map, &v_map, &dy_map);
    }
  } else {
    take_registers<240>();
    backward_keys_rows<Tile>(p, shared, group - 1).run();
  }
#else
  __trap();
#endif
}

template <class Tile>
void launch_backward_keys(cudaStream_t stream, const attention_problem<bf16>& problem,
                          view<const bf16, 3> dy, view<bf16, 3> dk, view<bf16, 3> dv,
                          const backward_statistics& statistics) {
  backward_keys_parameters p{attention_operand<bf16>(dk),
                             attention_operand<bf16>(dv),
                             attention_layout(problem),
                             {},
                             statistics,
                             static_cast<float>(problem.scale),
                             static_cast<int>(problem.k.extents[1])};
  const bool packed = p.layout.offsets != nullptr, key_packed = p.layout.key_offsets != nullptr;
  const index_t n = problem.sequences, length = p.layout.max_length;
  p.schedule = make_schedule(n, p.key_heads, p.layout.max_key_length, Tile::keys, false,
                             length * 4 * Tile::size * (problem.heads / p.key_heads), 1);
  const index_t tiles = p.schedule.pairs * p.schedule.tiles;
  if (tiles == 0) return;
  const attention_boxes q(problem.q, packed, n, length, Tile::queries),
      k(problem.k, key_packed, n, p.layout.max_key_length, Tile::keys),
      v(problem.v, key_packed, n, p.layout.max_key_length, Tile::keys),
      d(dy, packed, n, length, Tile::queries);
  allow_shared_bytes(attention_backward_keys_kernel<Tile>, Tile::shared_bytes);
  // About a block a tile: the longest start first, and who is done takes the next.
  const auto blocks = static_cast<unsigned>(std::min<index_t>(tiles, index_t{1} << 30));
  attention_backward_keys_kernel<Tile>
      <<<blocks, Tile::threads, Tile::shared_bytes, stream>>>(p, q.map, k.map, v.map, d.map);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
