#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/launch.cuh>
#include <ssmlib/kernels/cuda/recurrence_block.cuh>

#include <algorithm>
#include <bit>
#include <string>

/// @file
/// Launches of the scalar-gated recurrence.

namespace ssm::kernels::cuda {

namespace detail {

template <class S>
[[nodiscard]] bool recurrence_state_aligned(const view<S, 4>& s) {
  bool aligned = reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0;
  for (int d = 0; d < 3; ++d)
    aligned = aligned && s.stride(d) * static_cast<index_t>(sizeof(S)) % 16 == 0;
  return aligned;
}

template <class T, bool Replay>
void launch_recurrence(cudaStream_t stream, recurrence_arguments<T>& o, index_t tokens) {
  using R = accum_t<T>;
  constexpr int width = recurrence_width<R>, most_keys = 8;
  const int keys = o.p.key_size, own = keys == 1 ? 1 : most_keys;
  const auto power = [](index_t n) {
    return static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(n)));
  };
  if (keys > 1024 * most_keys) {
    ssd_fail("key size " + std::to_string(keys) +
             " is more than a block's registers hold, wanted at most " +
             std::to_string(1024 * most_keys));
  }
  o.key_groups = power((keys + own - 1) / own);
  o.quads =
      std::min({16, power((o.p.features + width - 1) / width), std::max(1, 256 / o.key_groups)});
  const auto blocks = [&] {
    o.slices = (o.p.features + o.quads * width - 1) / (o.quads * width);
    return o.p.sequences * o.p.heads * o.slices;
  };
  while (o.quads > 4 && o.quads * o.key_groups > 32 && blocks() < 2 * multiprocessors())
    o.quads /= 2;
  const index_t count = blocks();
  const int threads = std::max(32, o.quads * o.key_groups);
  tokens = std::max<index_t>(1, tokens);
  o.batch = static_cast<int>(std::min<index_t>(keys <= 256    ? recurrence_batch
                                               : keys <= 1024 ? 2
                                                              : 1,
                                               tokens));
  const recurrence_space<R> space{o.batch, recurrence_space<R>::padded(o.key_groups * own),
                                  o.quads * width, threads / 32};
  const auto launch = [&](auto kernel) {
    const std::size_t bytes = space.bytes();
    if (bytes > 48 * 1024) {
      SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(bytes)));
    }
    kernel<<<ssd_blocks(count), threads, bytes, stream>>>(o);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  if (own == 1) return launch(recurrence_kernel<T, 1, true, Replay, 256>);
  if (threads > 256) return launch(recurrence_kernel<T, most_keys, false, Replay, 1024>);
  if (keys == o.key_groups * own) {
    return launch(recurrence_kernel<T, most_keys, true, Replay, 256>);
  }
  launch(recurrence_kernel<T, most_keys, false, Replay, 256>);
}

template <class T>
[[nodiscard]] recurrence_arguments<T> recurrence_arguments_of(
    const ssd_problem<T>& p, const view<T, 3>& y, const view<const accum_t<T>, 4>& initial,
    const view<accum_t<T>, 4>& final) {
  ssd_check(p);
  ssd_check_state(p, "the initial state", initial);
  ssd_check_state(p, "the final state", final);
  if (y.extents != shape<3>{p.q.extent(0), p.heads, p.features()}) {
    ssd_fail("y is " + to_string(y.extents) + ", wanted (tokens x heads x features)");
  }
  recurrence_arguments<T> o{ssd_arguments<T>(p)};
  o.y = ssd_operand<T>(y, p.heads);
  o.initial = ssd_state_operand<const accum_t<T>>(initial);
  o.final = ssd_state_operand<accum_t<T>>(final);
  o.initial_aligned = recurrence_state_aligned(initial);
  o.final_aligned = recurrence_state_aligned(final);
  return o;
}

template <class T>
void check_replay(const ssd_problem<T>& p, const recurrence_replay<T>& r) {
  const index_t rows = r.k.extent(1);
  const index_t steps = p.dt ? p.dt.extent(1) : p.log_a ? p.log_a.extent(1) : 0;
  const index_t weights = p.dt ? p.dt.extent(1) : p.weight ? p.weight.extent(1) : 0;
  const auto same = [&](const char* name, const auto& ring, const auto& wanted) {
    if (ring.extents == wanted) return;
    ssd_fail("the ring of " + std::string(name) + " is " + to_string(ring.extents) + ", wanted " +
             to_string(wanted));
  };
  same("k", r.k, shape<4>{p.sequences, rows, p.k.extent(1), p.key_size()});
  same("x", r.x, shape<4>{p.sequences, rows, p.x.extent(1), p.features()});
  if (steps > 0) same("log_a", r.log_a, shape<3>{p.sequences, rows, steps});
  if (weights > 0) same("weight", r.weight, shape<3>{p.sequences, rows, weights});
  if (r.log_a) ssd_check_groups("the ring of log_a", r.log_a.extent(2), p.heads);
  if (r.weight) ssd_check_groups("the ring of weight", r.weight.extent(2), p.heads);
  const bool unit =
      (r.k.stride(3) == 1 || p.key_size() == 1) && (r.x.stride(3) == 1 || p.features() == 1);
  if (!unit) ssd_fail("the rings of k and x need unit inner strides");
  if (rows < r.max_pending + p.max_length || rows < 1 || r.position == nullptr ||
      r.pending == nullptr) {
    throw value_error("ssm: linear_recurrence_replay: rings of " + std::to_string(rows) +
                      " rows for " + std::to_string(r.max_pending) + " tokens to replay and " +
                      std::to_string(p.max_length) +
                      " new ones; wanted as many rows, positions and counts of pending tokens");
  }
}

}  // namespace detail

template <class T>
void linear_recurrence(cudaStream_t stream, const ssd_problem<T>& p, view<T, 3> y,
                       const ssd_states<T>& states, const recurrence_snapshots<T>& snapshots) {
  auto o = detail::recurrence_arguments_of<T>(p, y, states.initial, states.final);
  if (snapshots.ring) {
    const shape<4> wanted{snapshots.slots * p.sequences, p.heads, p.key_size(), p.features()};
    if (snapshots.ring.extents != wanted || snapshots.ring.stride(3) != 1 || snapshots.slots < 1) {
      detail::ssd_fail("the ring of states is " + to_string(snapshots.ring.extents) + ", wanted " +
                       to_string(wanted) + " with a unit inner stride");
    }
    o.ring = detail::ssd_state_operand<accum_t<T>>(snapshots.ring);
    o.ring_aligned = detail::recurrence_state_aligned(snapshots.ring);
    o.slots = snapshots.slots;
    o.first_position = snapshots.first_position;
  }
  if (p.sequences == 0) return;
  detail::launch_recurrence<T, false>(stream, o, p.max_length);
}

template <class T>
void linear_recurrence_replay(cudaStream_t stream, const ssd_problem<T>& p, view<T, 3> y,
                              view<accum_t<T>, 4> state, const recurrence_replay<T>& replay) {
  auto o = detail::recurrence_arguments_of<T>(p, y, state, state);
  detail::check_replay(p, replay);
  if (!state) detail::ssd_fail("a replay needs a state");
  if (p.sequences == 0) return;
  o.old_k = detail::replay_ring<T>(replay.k, p.heads);
  o.old_x = detail::replay_ring<T>(replay.x, p.heads);
  if (replay.log_a) o.old_log_a = detail::replay_ring<accum_t<T>>(replay.log_a, p.heads);
  if (replay.weight) o.old_weight = detail::replay_ring<accum_t<T>>(replay.weight, p.heads);
  o.ring_rows = replay.k.extent(1);
  o.position = replay.position;
  o.pending = replay.pending;
  detail::launch_recurrence<T, true>(stream, o, p.max_length + replay.max_pending);
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(cuda_recurrence, void linear_recurrence<T>(                                  \
                                          cudaStream_t, const ssd_problem<T>&, view<T, 3>,        \
                                          const ssd_states<T>&, const recurrence_snapshots<T>&)); \
  SSMLIB_INSTANTIATE(cuda_recurrence, void linear_recurrence_replay<T>(                           \
                                          cudaStream_t, const ssd_problem<T>&, view<T, 3>,        \
                                          view<accum_t<T>, 4>, const recurrence_replay<T>&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
