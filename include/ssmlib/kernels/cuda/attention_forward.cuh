#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/attention_general.cuh>
#include <ssmlib/kernels/cuda/attention_mma_forward.cuh>
#include <ssmlib/kernels/cuda/attention_tile.cuh>

/// @file
/// Softmax attention, forward. On the sm_90a rung: one warp of copies feeds warpgroups of 64
/// queries each, which take turns: one multiplies while another computes exponentials, and within
/// one, the next tile's logits are multiplied while this tile's values are added.

namespace ssm::kernels::cuda {

namespace detail {

/// @tparam D       head size, rounded up
/// @tparam Keys    of a tile
/// @tparam Groups  warpgroups that compute
template <int D, int Keys, int Groups>
struct forward_tile {
  static constexpr int size = D, keys = Keys, groups = Groups, stages = 2;
  static constexpr int rows = 64 * Groups, panels = (D + 63) / 64, threads = 128 * (Groups + 1);
  static constexpr int q_panel = rows * 128, kv_panel = Keys * 128;
  static constexpr int q_bytes = panels * q_panel, kv_bytes = panels * kv_panel;
  static constexpr int barriers = q_bytes + 2 * stages * kv_bytes;
  static constexpr int shared_bytes = barriers + 8 * (2 + 4 * stages) + 1024;  // to align
  static constexpr int copy_registers = Groups == 2 ? 24 : 32;
  static constexpr int product_registers = Groups == 2 ? 240 : 160;
};

struct forward_parameters {
  attention_operand<bf16> y;
  float* log_sum;
  index_t log_sum_head;
  attention_layout layout;
  attention_schedule schedule;
  float scale;
  int q_heads, k_heads, v_heads;
};

template <class Tile>
struct forward_shared {
  unsigned char *q, *k, *v;
  std::uint64_t *q_full, *q_free, *k_full, *k_free, *v_full, *v_free;

  SSMLIB_DEVICE explicit forward_shared(unsigned char* memory) {
    memory += -shared_address(memory) & 1023;
    q = memory;
    k = q + Tile::q_bytes;
    v = k + Tile::stages * Tile::kv_bytes;
    q_full = reinterpret_cast<std::uint64_t*>(memory + Tile::barriers);
    q_free = q_full + 1;
    k_full = q_free + 1;
    k_free = k_full + Tile::stages;
    v_full = k_free + Tile::stages;
    v_free = v_full + Tile::stages;
  }
  SSMLIB_DEVICE void init() const {
    barrier_init(q_full, 1);
    barrier_init(q_free, 4 * Tile::groups);
    for (int i = 0; i < Tile::stages; ++i) {
      barrier_init(k_full + i, 1);
      barrier_init(v_full + i, 1);
      barrier_init(k_free + i, 4 * Tile::groups);
      barrier_init(v_free + i, 4 * Tile::groups);
    }
    barrier_init_done();
  }
};

template <class Tile>
SSMLIB_DEVICE void forward_copies(const forward_parameters& p, const forward_shared<Tile>& shared,
                                  const CUtensorMap* q_map, const CUtensorMap* k_map,
                                  const CUtensorMap* v_map) {
  ring<1> q_at;
  ring<Tile::stages> at;
  const attention_layout& layout = p.layout;
  for (index_t n = blockIdx.x; n < p.schedule.size(); n += gridDim.x) {
    const attention_tile work = p.schedule[n];
    const query_range<Tile> range(layout, work);
    if (range.first == range.end) continue;
    const auto q_box =
        position_of(layout.offsets != nullptr, work, head_of(work.head, layout.heads, p.q_heads),
                    range.span.query_begin);
    const bool packed = layout.key_offsets != nullptr;
    const auto k_box = position_of(packed, work, head_of(work.head, layout.heads, p.k_heads),
                                   range.span.key_begin);
    const auto v_box = position_of(packed, work, head_of(work.head, layout.heads, p.v_heads),
                                   range.span.key_begin);
    barrier_wait(shared.q_free, q_at.parity ^ 1);
    barrier_arrive_expect(shared.q_full, Tile::q_bytes);
    load_panels<Tile::panels, Tile::q_panel>(shared.q, q_map, shared.q_full, q_box, range.row0);
    q_at.next();
    for (int i = range.end - 1; i >= range.first; --i, at.next()) {
      const int s = at.stage;
      barrier_wait(shared.k_free + s, at.parity ^ 1);
      barrier_arrive_expect(shared.k_full + s, Tile::kv_bytes);
      load_panels<Tile::panels, Tile::kv_panel>(shared.k + s * Tile::kv_bytes, k_map,
                                                shared.k_full + s, k_box, i * Tile::keys);
      barrier_wait(shared.v_free + s, at.parity ^ 1);
      barrier_arrive_expect(shared.v_full + s, Tile::kv_bytes);
      load_panels<Tile::panels, Tile::kv_panel>(shared.v + s * Tile::kv_bytes, v_map,
                                                shared.v_full + s, v_box, i * Tile::keys);
    }
  }
}

template <class Tile>
class forward_rows {
 public:
  static constexpr int D = Tile::size, N = Tile::keys;

  SSMLIB_DEVICE forward_rows(const forward_parameters& p, const forward_shared<Tile>& shared,
                             int group)
      : p_(p),
        shared_(shared),
        group_(group),
        thread_(threadIdx.x % 128),
        row_(16 * (thread_ / 32) + thread_ % 32 / 4),
        unit_(p.scale * 1.4426950408889634f) {}

  SSMLIB_DEVICE void run() {
    if (group_ == Tile::groups - 1) named_barrier_arrive(turn(0), 256);
    for (index_t n = blockIdx.x; n < p_.schedule.size(); n += gridDim.x) {
      const attention_tile work = p_.schedule[n];
      const query_range<Tile> range(p_.layout, work);
      rows_ = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll
      for (int i = 0; i < D / 2; ++i)
        o_[i] = 0.0f;
      if (range.first < range.end) attend(range);
      store(range, work.head);
    }
  }

 private:
  SSMLIB_DEVICE static int turn(int group) {
    return 1 + group;
  }
  SSMLIB_DEVICE void release(std::uint64_t* barrier) const {
    if (thread_ % 32 == 0) barrier_arrive(barrier);
  }
  SSMLIB_DEVICE std::uint64_t k_tile(int stage) const {
    return panel_descriptor(shared_address(shared_.k + stage * Tile::kv_bytes));
  }

  SSMLIB_DEVICE void attend(const query_range<Tile>& range) {
    const std::uint64_t q = panel_descriptor(shared_address(shared_.q) + group_ * 64 * 128);
    float factor[2];
    barrier_wait(shared_.q_full, q_at_.parity);
    barrier_wait(shared_.k_full + k_at_.stage, k_at_.parity);
    products_begin();
    multiply_rows<N, D, Tile::q_panel, Tile::kv_panel>(s_, q, k_tile(k_at_.stage));
    products_commit();
    products_wait<0>();
    pin(s_);
    weigh(range, range.end - 1, factor);
    to_operand(s_, w_);
    for (int i = range.end - 2; i >= range.first; --i) {
      barrier_wait(shared_.k_full + k_at_.stage, k_at_.parity);
      named_barrier_sync(turn(group_), 256);
      products_begin();
      multiply_rows<N, D, Tile::q_panel, Tile::kv_panel>(s_, q, k_tile(k_at_.stage));
      products_commit();
      add_values(range, i + 1);
      named_barrier_arrive(turn((group_ + 1) % Tile::groups), 256);
      products_wait<1>();
      pin(s_);
      weigh(range, i, factor);
      products_wait<0>();
      pin(o_);
      pin(w_);
      release(shared_.v_free + v_at_.stage);
      v_at_.next();
#pragma unroll
      for (int j = 0; j < D / 2; ++j)
        o_[j] *= factor[j / 2 % 2];
      to_operand(s_, w_);
    }
    release(shared_.q_free);
    q_at_.next();
    products_begin();
    add_values(range, range.first);
    products_wait<0>();
    pin(o_);
    release(shared_.v_free + v_at_.stage);
    v_at_.next();
  }

  /// The logits of tile i, which are there, become weights; the keys are released.
  SSMLIB_DEVICE void weigh(const query_range<Tile>& range, int i, float (&factor)[2]) {
    release(shared_.k_free + k_at_.stage);
    k_at_.next();
    const attention_layout& layout = p_.layout;
    const int key0 = i * N, position = range.row0 + 64 * group_ + range.span.shift();
    if (key0 + N > range.span.keys ||
        (layout.causal && (key0 + N - 1 > position || key0 <= position + 63 - layout.window))) {
      const kept_columns kept[2] = {kept_keys(layout, range.span, position + row_, key0),
                                    kept_keys(layout, range.span, position + row_ + 8, key0)};
      mask_rows<N>(s_, kept, -INFINITY);
    }
    online_softmax<N>(s_, rows_, unit_, factor);
  }

  /// Starts o += w v for tile i.
  SSMLIB_DEVICE void add_values(const query_range<Tile>& range, int i) {
    unsigned char* tile = shared_.v + v_at_.stage * Tile::kv_bytes;
    barrier_wait(shared_.v_full + v_at_.stage, v_at_.parity);
    // Behind a packed sequence's last value another sequence begins: 0 times it might be NaN.
    if (p_.layout.key_offsets != nullptr && (i + 1) * N > range.span.keys)
      clear_rows<Tile::panels, N>(tile, range.span.keys - i * N, thread_, 8 + group_);
    accumulate_rows<N, D>(o_, w_, panel_descriptor(shared_address(tile), Tile::kv_panel));
    products_commit();
  }

  SSMLIB_DEVICE void store(const query_range<Tile>& range, int head) {
    float factor[2];
    bf16* to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows_.sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = range.row0 + 64 * group_ + row_ + 8 * r;
      const index_t token = range.span.query_begin + row;
      const bool there = row < range.span.queries;
      factor[r] = sum > 0.0f ? 1.0f / sum : 0.0f;
      to[r] = there ? p_.y.row(token, head) : nullptr;
      if (there && p_.log_sum != nullptr && thread_ % 4 == 0) {
        p_.log_sum[head * p_.log_sum_head + token] =
            sum > 0.0f ? fmaf(rows_.largest[r], p_.scale, logf(sum)) : -INFINITY;
      }
    }
    store_product<D>(o_, factor, to, p_.y.size);
  }

  const forward_parameters& p_;
  const forward_shared<Tile>& shared_;
  int group_, thread_, row_;
  float unit_;
  ring<1> q_at_;
  ring<Tile::stages> k_at_, v_at_;
  row_sums rows_;
  float s_[N / 2], o_[D / 2];
  std::uint32_t w_[N / 4];
};

template <class Tile>
__global__ __launch_bounds__(Tile::threads, 1) void attention_forward_kernel(
    const __grid_constant__ forward_parameters p, const __grid_constant__ CUtensorMap q_map,
    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  const forward_shared<Tile> shared(memory);
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (group == 0) {
    give_registers<Tile::copy_registers>();
    if (threadIdx.x == 0) forward_copies<Tile>(p, shared, &q_map, &k_map, &v_map);
  } else {
    take_registers<Tile::product_registers>();
    forward_rows<Tile>(p, shared, group - 1).run();
  }
#else
  __trap();
#endif
}

template <class Tile>
void launch_forward(cudaStream_t stream, const attention_problem<bf16>& problem, view<bf16, 3> y,
                    view<float, 2> log_sum) {
  forward_parameters p{attention_operand<bf16>(y),
                       log_sum.data,
                       log_sum.strides[0],
                       attention_layout(problem),
                       {},
                       static_cast<float>(problem.scale),
                       static_cast<int>(problem.q.extents[1]),
                       static_cast<int>(problem.k.extents[1]),
                       static_cast<int>(problem.v.extents[1])};
  const bool packed = p.layout.offsets != nullptr, key_packed = p.layout.key_offsets != nullptr;
  const index_t n = problem.sequences, length = p.layout.max_key_length;
  p.schedule = make_schedule(n, p.layout.heads, p.layout.max_length, Tile::rows, true,
                             length * 4 * Tile::size,
                             problem.heads / std::max(problem.k.extents[1], problem.v.extents[1]));
  const attention_boxes q(problem.q, packed, n, p.layout.max_length, Tile::rows),
      k(problem.k, key_packed, n, length, Tile::keys),
      v(problem.v, key_packed, n, length, Tile::keys);
  const index_t tiles = p.schedule.pairs * p.schedule.tiles;
  const unsigned blocks =
      persistent_blocks(attention_forward_kernel<Tile>, Tile::shared_bytes, tiles);
  attention_forward_kernel<Tile>
      <<<blocks, Tile::threads, Tile::shared_bytes, stream>>>(p, q.map, k.map, v.map);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

inline void hopper_forward(cudaStream_t stream, const attention_problem<bf16>& problem,
                           view<bf16, 3> y, view<float, 2> log_sum) {
  const index_t size = std::max(problem.q.extents[2], problem.v.extents[2]);
  if (size <= 64) return launch_forward<forward_tile<64, 128, 3>>(stream, problem, y, log_sum);
  if (size <= 96) return launch_forward<forward_tile<96, 128, 2>>(stream, problem, y, log_sum);
  if (size <= 128) return launch_forward<forward_tile<128, 128, 2>>(stream, problem, y, log_sum);
  if (size <= 192) return launch_forward<forward_tile<192, 96, 2>>(stream, problem, y, log_sum);
  launch_forward<forward_tile<256, 64, 2>>(stream, problem, y, log_sum);
}

/// The rung whose kernels attention_forward takes.
template <class T>
[[nodiscard]] rung forward_rung(const attention_problem<T>& p, view<T, 3> y) {
  return tensor_cores_take(p, 256) && rows_aligned(y) ? usable_rung(p.most) : rung::general;
}

}  // namespace detail

template <class T>
void attention_forward(cudaStream_t stream, const attention_problem<T>& problem, view<T, 3> y,
                       view<attention_stat<T>, 2> log_sum) {
  using namespace detail;
  check_problem(problem);
  const index_t tokens = problem.q.extents[0];
  check_operand("y", y, tokens, problem.heads, problem.v.extents[2]);
  if (y.extents[1] != problem.heads ||
      (log_sum && (log_sum.extents[0] != problem.heads || log_sum.extents[1] != tokens ||
                   log_sum.strides[1] != 1))) {
    throw shape_error("ssm: attention on cuda: y is " + to_string(y.extents) + " and log_sum is " +
                      to_string(log_sum.extents) + ", wanted " + std::to_string(problem.heads) +
                      " heads of " + std::to_string(tokens) + " tokens in both, log_sum by heads");
  }
  if (tokens == 0 || problem.sequences == 0) return;
  if constexpr (std::is_same_v<T, bf16>) {
    const rung kernels = forward_rung(problem, y);
    if (kernels == rung::sm_90a) return hopper_forward(stream, problem, y, log_sum);
    if (kernels == rung::sm_80) return mma_forward(stream, problem, y, log_sum);
  }
  general_forward(stream, problem, y, log_sum);
}

#define SSMLIB_DETAIL_LIST(T)                                                             \
  SSMLIB_INSTANTIATE(cuda_attention,                                                      \
                     void attention_forward<T>(cudaStream_t, const attention_problem<T>&, \
                                               view<T, 3>, view<attention_stat<T>, 2>))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
