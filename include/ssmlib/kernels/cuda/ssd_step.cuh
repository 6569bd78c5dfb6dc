#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/kernels/cuda/ssd_step_stream.cuh>

#include <cstdint>
#include <limits>
#include <string>

namespace ssm::kernels::cuda {

namespace detail {

template <class T, class S>
void check_step(const ssd_step_problem<T, S>& p) {
  const index_t inner = p.heads * p.features, channels = inner + 2 * p.groups * p.key_size;
  const auto rows = [](const auto& v, index_t columns) {
    return v.extent(1) == columns && (v.stride(1) == 1 || columns <= 1);
  };
  const bool fits =
      p.heads > 0 && p.groups > 0 && p.heads % p.groups == 0 && rows(p.xbc, channels) &&
      rows(p.dt, p.heads) && rows(p.y, inner) && (!p.z || rows(p.z, inner)) &&
      p.ring.inputs.extent(0) == p.sequences && p.ring.inputs.extent(2) == channels &&
      p.state.extents == shape<4>{p.sequences, p.heads, p.key_size, p.features} &&
      (p.state.stride(3) == 1 || p.features == 1) &&
      (p.slots == 0 ||
       (p.snapshots.extents == shape<4>{p.slots * p.sequences, p.heads, p.key_size, p.features} &&
        (p.snapshots.stride(3) == 1 || p.features == 1))) &&
      (p.pending == nullptr ||
       p.ring.dt.extents == shape<3>{p.sequences, p.ring.inputs.extent(1), p.heads});
  if (!fits) {
    throw shape_error(
        "ssm: ssd_step_forward: with " + std::to_string(p.sequences) + " sequences, " +
        std::to_string(p.heads) + " heads of " + std::to_string(p.features) + " features, " +
        std::to_string(p.groups) + " groups and key size " + std::to_string(p.key_size) +
        " xbc is " + to_string(p.xbc.extents) + ", the ring " + to_string(p.ring.inputs.extents) +
        ", the state " + to_string(p.state.extents) + ", the snapshots " +
        to_string(p.snapshots.extents) +
        "; wanted channels heads * features + 2 groups * key size and a state of (sequences x "
        "heads x key size x features)");
  }
  const index_t rows_needed = p.width - 1 + p.max_length + (p.pending ? p.max_pending : 0);
  if (p.max_length > step_tokens || p.max_pending > step_tokens || p.width < 1 ||
      p.ring.inputs.extent(1) < rows_needed || p.position == nullptr) {
    throw value_error("ssm: ssd_step_forward: " + std::to_string(p.max_length) + " tokens, " +
                      std::to_string(p.max_pending) + " to replay and a ring of " +
                      std::to_string(p.ring.inputs.extent(1)) +
                      " rows; wanted at most 16 of each, positions and " +
                      std::to_string(rows_needed) + " rows");
  }
  constexpr index_t limit = std::numeric_limits<std::int32_t>::max();
  if (p.sequences * p.heads > limit || channels > limit || p.ring.inputs.extent(1) > limit / 2) {
    throw shape_error("ssm: ssd_step_forward: " + std::to_string(p.sequences) + " sequences of " +
                      std::to_string(p.heads) + " heads with " + std::to_string(channels) +
                      " channels, wanted fewer than 2^31 heads in all and channels");
  }
}

template <class T, class S>
[[nodiscard]] step_arguments<T, S> arguments_of(const ssd_step_problem<T, S>& p) {
  const auto& in = p.ring.inputs;
  const auto whole = [](index_t n) { return static_cast<int>(n); };
  return {whole(p.heads),
          whole(p.groups),
          whole(p.features),
          whole(p.key_size),
          whole(p.max_length),
          whole(p.xbc.extent(1)),
          p.offsets,
          p.xbc.data,
          p.dt.data,
          p.z.data,
          p.xbc.stride(0),
          p.dt.stride(0),
          p.z.stride(0),
          p.taps,
          p.conv_bias,
          whole(p.width),
          p.activate,
          p.a,
          p.dt_bias,
          p.d,
          p.low,
          p.high,
          in.data,
          p.ring.dt.data,
          whole(in.extent(1)),
          in.stride(0),
          in.stride(1),
          p.ring.dt.stride(0),
          p.ring.dt.stride(1),
          p.position,
          p.state.data,
          p.state.stride(0),
          p.state.stride(1),
          p.state.stride(2),
          p.y.data,
          p.y.stride(0),
          p.pending,
          p.early,
          p.tap_step == 0 ? p.xbc.extent(1) : p.tap_step,
          p.tap_channel,
          p.a_is_log,
          p.snapshots.data,
          p.snapshots.stride(0),
          p.snapshots.stride(1),
          p.snapshots.stride(2),
          whole(p.slots),
          whole(p.sequences)};
}

template <class T, class S>
[[nodiscard]] bool state_aligned(const view<S, 4>& s) {
  bool aligned = reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0 && s.stride(3) == 1;
  for (int d = 0; d < 3; ++d)
    aligned = aligned && s.stride(d) * static_cast<index_t>(sizeof(S)) % 16 == 0;
  return aligned;
}

/// One token of many sequences streams the states; of fewer, a block takes as many heads as still
/// fill the card. Several tokens take a block a head.
template <class T, class S, int P, int N>
void launch_step(cudaStream_t stream, const step_arguments<T, S>& a, index_t heads) {
  constexpr int threads = P * N / (8 * step_keys), most = sizeof(S) == 2 ? 4 : 2;
  if (a.tokens != 1 || a.offsets != nullptr || a.pending != nullptr || a.slots > 0) {
    launch_overlapped(stream, step_kernel<T, S, P, N>, heads, threads, 0, 1, a);
    return;
  }
  if (launch_state_stream<T, S, P, N>(stream, a, heads)) return;
  const auto launch = [&](auto count, int wanted) {
    constexpr int Heads = decltype(count)::value;
    if constexpr (Heads * P > threads || Heads > most) {
      return false;
    } else {
      if (heads < index_t{wanted} * multiprocessors() || a.heads / a.groups % Heads != 0) {
        return false;
      }
      launch_overlapped(stream, one_token_kernel<T, S, P, N, Heads>, heads / Heads, threads, 0, 1,
                        a);
      return true;
    }
  };
  if (!launch(std::integral_constant<int, 4>{}, 8) &&
      !launch(std::integral_constant<int, 2>{}, 3)) {
    launch(std::integral_constant<int, 1>{}, 0);
  }
}

}  // namespace detail

template <class T, class S>
void ssd_step_forward(cudaStream_t stream, const ssd_step_problem<T, S>& p) {
  detail::check_step(p);
  if (p.sequences == 0 || p.features == 0) return;
  const detail::step_arguments<T, S> a = detail::arguments_of(p);
  const index_t blocks = p.sequences * p.heads;
  if constexpr (!std::is_same_v<T, double>) {
    const auto launch = [&](auto features, auto keys) {
      constexpr int P = decltype(features)::value, N = decltype(keys)::value;
      if (p.features != P || p.key_size != N) return false;
      detail::launch_step<T, S, P, N>(stream, a, blocks);
      return true;
    };
    using std::integral_constant;
    const bool fast = p.width <= detail::step_width && detail::state_aligned<T>(p.state) &&
                      (p.slots == 0 || detail::state_aligned<T>(p.snapshots));
    if (fast && (launch(integral_constant<int, 64>{}, integral_constant<int, 128>{}) ||
                 launch(integral_constant<int, 64>{}, integral_constant<int, 64>{}) ||
                 launch(integral_constant<int, 64>{}, integral_constant<int, 256>{}) ||
                 launch(integral_constant<int, 128>{}, integral_constant<int, 128>{}))) {
      return;
    }
  }
  const std::size_t shared = detail::step_general_shared<accum_t<T>>(p.key_size);
  if (shared > 220 * 1024) {
    throw shape_error("ssm: ssd_step_forward: key size " + std::to_string(p.key_size) +
                      " does not fit the shared memory of a block, wanted at most " +
                      std::to_string(220 * 1024 / (2 * 16 * sizeof(accum_t<T>))));
  }
  launch_overlapped(stream, detail::general_step_kernel<T, S>, blocks, detail::step_general_threads,
                    shared, 1, a);
}

#define SSMLIB_DETAIL_LIST(T, S)    \
  SSMLIB_INSTANTIATE(cuda_ssd_step, \
                     void ssd_step_forward<T, S>(cudaStream_t, const ssd_step_problem<T, S>&))
SSMLIB_DETAIL_LIST(bf16, bf16);
SSMLIB_DETAIL_LIST(bf16, float);
SSMLIB_DETAIL_LIST(float, float);
SSMLIB_DETAIL_LIST(double, double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
