#pragma once

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/selective_vjp.cuh>

#include <algorithm>
#include <string>

/// @file
/// Launches of the selective scan and of its gradient.

namespace ssm::kernels::cuda {

namespace detail {

/// How warps share the work. Where channels are few, lanes take fewer states each and warps fewer
/// channels, which costs more traffic with shared memory.
enum class scan_layout { wide, medium, states_64, states_256 };

/// f.operator()<Own, Lanes>()
template <class F>
void with_scan_layout(scan_layout layout, F f) {
  switch (layout) {
    case scan_layout::wide:
      return f.template operator()<4, 4>();
    case scan_layout::medium:
      return f.template operator()<2, 8>();
    case scan_layout::states_64:
      return f.template operator()<4, 16>();
    case scan_layout::states_256:
      return f.template operator()<8, 32>();
  }
}

struct scan_plan {
  scan_layout layout;
  index_t segments, segment_length;
};
struct vjp_plan {
  scan_layout layout;
  index_t segments, segment_length;
  index_t passes, tiles, parts, padded_states;
  int warps;
};

[[nodiscard]] inline scan_layout layout_for(index_t states) {
  if (states <= 16) return scan_layout::wide;
  return states <= 64 ? scan_layout::states_64 : scan_layout::states_256;
}
[[nodiscard]] inline index_t layout_channels(scan_layout layout) {
  switch (layout) {
    case scan_layout::wide:
      return 16;
    case scan_layout::medium:
      return 8;
    case scan_layout::states_256:
      return 2;
    default:
      return 4;
  }
}
[[nodiscard]] inline index_t divide_up(index_t n, index_t step) {
  return (n + step - 1) / step;
}

template <class T>
[[nodiscard]] index_t groups_of(const selective_problem<T>& p) {
  return std::max(p.b.extents[1], p.c.extents[1]);
}

/// Cuts so that `units` become about `wanted`, none shorter than 256 tokens.
inline void cut_time(index_t max_length, index_t units, index_t wanted, index_t forced,
                     index_t& segments, index_t& length) {
  segments = forced;
  if (segments <= 0)
    segments = std::min(divide_up(wanted, std::max<index_t>(units, 1)), max_length / 256);
  segments = std::max<index_t>(1, segments);
  length = std::max<index_t>(scan_tokens, round_up(divide_up(max_length, segments), scan_tokens));
  segments = std::max<index_t>(1, divide_up(max_length, length));
}

inline constexpr index_t wanted_warps = 1024;
inline constexpr index_t wanted_blocks = 512;

template <class T>
[[nodiscard]] scan_plan plan_scan(const selective_problem<T>& p, const selective_options& options) {
  scan_plan plan{layout_for(p.states()), 1, 0};
  const index_t groups = groups_of(p), channels = p.channels() / groups;
  const auto warps = [&](scan_layout layout) {
    return p.sequences * groups * divide_up(channels, layout_channels(layout));
  };
  if (plan.layout == scan_layout::wide) {
    // Cuts of time fill the device better than small warps do, where they are allowed.
    const bool few = warps(scan_layout::wide) < wanted_warps && options.segments == 1;
    const bool medium = options.warp_channels > 0 ? options.warp_channels < 16 : few;
    if (medium) plan.layout = scan_layout::medium;
  }
  const index_t wanted = plan.layout == scan_layout::medium ? 1 : wanted_warps;
  cut_time(p.max_length, warps(plan.layout), wanted, options.segments, plan.segments,
           plan.segment_length);
  return plan;
}

template <class T>
[[nodiscard]] vjp_plan plan_vjp(const selective_problem<T>& p, index_t forced) {
  vjp_plan plan{};
  plan.layout = layout_for(p.states());
  const index_t groups = groups_of(p), channels = p.channels() / groups;
  plan.padded_states = plan.layout == scan_layout::wide        ? 16
                       : plan.layout == scan_layout::states_64 ? 64
                                                               : 256;
  plan.warps = plan.padded_states < 256 ? 4 : sizeof(accum_t<T>) == 8 ? 1 : 2;
  const index_t pass_channels = layout_channels(plan.layout) * plan.warps;
  // Several passes keep the blocks' shares of d b and d c as small as they are for 16 states.
  const index_t most = std::min(divide_up(4 * plan.padded_states, pass_channels),
                                divide_up(channels, pass_channels));
  const index_t filling = p.sequences * p.channels() / (pass_channels * 264);
  plan.passes = plan.layout == scan_layout::wide
                    ? 1
                    : std::clamp<index_t>(filling, 1, std::max<index_t>(most, 1));
  plan.tiles = groups * divide_up(channels, pass_channels * plan.passes);
  cut_time(p.max_length, p.sequences * plan.tiles, wanted_blocks, forced, plan.segments,
           plan.segment_length);
  plan.parts = std::min(p.sequences * plan.segments,
                        std::max<index_t>(1, divide_up(8192, std::max<index_t>(plan.tiles, 1))));
  return plan;
}

/// Hands out pieces of the workspace; from null it only counts.
class workspace_cutter {
 public:
  explicit workspace_cutter(void* begin) : begin_(static_cast<unsigned char*>(begin)) {}
  template <class R>
  [[nodiscard]] R* take(index_t count) {
    R* piece = begin_ ? reinterpret_cast<R*>(begin_ + used_) : nullptr;
    used_ += static_cast<std::size_t>(round_up(count * static_cast<index_t>(sizeof(R)), 256));
    return piece;
  }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  unsigned char* begin_;
  std::size_t used_ = 0;
};

template <class R>
struct segment_states {
  R *ends = nullptr, *sums = nullptr;

  template <class T>
  static segment_states take(workspace_cutter& w, const selective_problem<T>& p, index_t segments) {
    if (segments == 1) return {};
    const index_t rows = p.sequences * segments * p.channels();
    return {w.take<R>(rows * p.states()), w.take<R>(rows)};
  }
};

template <class R>
struct vjp_workspace {
  segment_states<R> forward, backward;
  R *checkpoints, *state_parts, *a_parts, *channel_parts, *carries;

  template <class T>
  static vjp_workspace take(workspace_cutter& w, const selective_problem<T>& p,
                            const vjp_plan& plan) {
    vjp_workspace s{};
    s.forward = segment_states<R>::take(w, p, plan.segments);
    s.backward = segment_states<R>::take(w, p, plan.segments);
    s.state_parts = w.take<R>(plan.tiles * p.tokens() * 2 * plan.padded_states);
    s.a_parts = w.take<R>(plan.parts * p.channels() * p.states());
    s.channel_parts = w.take<R>(plan.parts * 2 * p.channels());
    s.carries = w.take<R>(plan.passes > 1 ? plan.parts * p.channels() * p.states() : 0);
    s.checkpoints = w.take<R>(selective_checkpoint_size(p));
    return s;
  }
};

template <class T>
void check_selective(const char* name, const selective_problem<T>& p) {
  const auto fail = [&](const std::string& what) {
    throw shape_error("ssm: " + std::string(name) + ": " + what);
  };
  const index_t tokens = p.tokens(), channels = p.channels(), states = p.states();
  if (states < 1 || states > 256) {
    fail(std::to_string(states) + " states a channel; wanted 1 to 256");
  }
  const index_t bs = p.b.extents[1], cs = p.c.extents[1], most = std::max(bs, cs);
  if (bs < 1 || cs < 1 || most % std::min(bs, cs) != 0 || channels % most != 0) {
    fail("b has " + std::to_string(bs) + " groups and c " + std::to_string(cs) + " for " +
         std::to_string(channels) + " channels; wanted divisors, one of the other");
  }
  const auto rows = [&](const char* operand, index_t have_tokens, index_t have_width, index_t width,
                        index_t inner) {
    if (have_tokens == tokens && have_width == width && (inner == 1 || width <= 1)) return;
    fail(std::string(operand) + " is (" + std::to_string(have_tokens) + " x .. x " +
         std::to_string(have_width) + ") with inner stride " + std::to_string(inner) + "; wanted " +
         std::to_string(tokens) + " rows of " + std::to_string(width) + " neighbours");
  };
  rows("dt", tokens, channels, channels, p.dt.strides[1]);
  rows("u", p.u.extents[0], p.u.extents[1], channels, p.u.strides[1]);
  if (p.gate) rows("the gate", p.gate.extents[0], p.gate.extents[1], channels, p.gate.strides[1]);
  rows("b", p.b.extents[0], p.b.extents[2], states, p.b.strides[2]);
  rows("c", p.c.extents[0], p.c.extents[2], states, p.c.strides[2]);
  if (p.a.extents[0] != channels) {
    fail("a has " + std::to_string(p.a.extents[0]) + " rows; wanted " + std::to_string(channels));
  }
  if (p.max_length > 0x7fffffff - 64) {
    fail(std::to_string(p.max_length) + " tokens in a sequence; wanted at most 2147483583");
  }
  if (p.offsets == nullptr && p.sequences * p.max_length != tokens) {
    fail(std::to_string(p.sequences) + " sequences of " + std::to_string(p.max_length) +
         " tokens; wanted " + std::to_string(tokens) + " tokens in all");
  }
}

template <class T>
[[nodiscard]] selective_arguments<T> arguments_of(const selective_problem<T>& p, index_t segments,
                                                  index_t length) {
  selective_arguments<T> o{p,     groups_of(p), 0,         segments, length, false,
                           false, p.channels(), p.states()};
  o.group_channels = p.channels() / o.groups;
  const auto pairs = [](const auto& v) {
    return v.data == nullptr || rows_are_aligned(v.data, v.strides[0], 2);
  };
  const auto quads = [](const auto& v) {
    return rows_are_aligned(v.data, v.strides[0], 4) &&
           (v.extents[1] == 1 || rows_are_aligned(v.data, v.strides[1], 4));
  };
  o.paired = o.group_channels % 2 == 0 && pairs(p.dt) && pairs(p.u) && pairs(p.gate);
  o.quads = p.states() % 4 == 0 && quads(p.b) && quads(p.c);
  return o;
}

[[nodiscard]] inline unsigned grid_of(index_t blocks) {
  if (blocks > 0x7fffffff) {
    throw shape_error("ssm: selective scan: " + std::to_string(blocks) +
                      " blocks of work; wanted at most 2147483647: split the batch");
  }
  return static_cast<unsigned>(blocks);
}

template <class Kernel>
void allow_shared_memory(Kernel kernel, std::size_t bytes) {
  if (bytes <= 48 * 1024) return;
  SSMLIB_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)));
}

template <scan_mode Mode, class T>
void launch_scan(cudaStream_t stream, scan_layout which, const selective_arguments<T>& o,
                 const scan_targets<T>& to) {
  with_scan_layout(which, [&]<int Own, int Lanes>() {
    using layout = lane_layout<Own, Lanes, tile_tokens<Own>>;
    constexpr int warps = scan_warps(layout::states);
    constexpr std::size_t bytes = warps * sizeof(scan_memory<Own, Lanes, Mode, accum_t<T>>);
    const auto kernel = selective_scan_kernel<T, Own, Lanes, Mode>;
    const index_t tiles = o.groups * divide_up(o.group_channels, layout::channels);
    const index_t blocks = divide_up(o.units() * tiles, warps);
    if (blocks == 0) return;
    allow_shared_memory(kernel, bytes);
    kernel<<<grid_of(blocks), warps * 32, bytes, stream>>>(o, to);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  });
}

template <class T>
void join_segments(cudaStream_t stream, const selective_arguments<T>& o,
                   const segment_states<accum_t<T>>& s, const view<const accum_t<T>, 3>& initial,
                   bool reversed) {
  const index_t count = o.p.sequences * o.p.channels() * o.p.states();
  if (count == 0) return;
  join_segments_kernel<T>
      <<<grid_of(divide_up(count, 256)), 256, 0, stream>>>(o, s.ends, s.sums, initial, reversed);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

/// The states before each cut; nothing to do for whole sequences.
template <class T>
void find_starts(cudaStream_t stream, scan_layout layout, const selective_arguments<T>& o,
                 const segment_states<accum_t<T>>& s) {
  if (o.segments == 1) return;
  scan_targets<T> to;
  to.ends = s.ends;
  to.sums = s.sums;
  selective_arguments<T> zero = o;  // what cuts make of the state zero
  zero.p.initial = {};
  launch_scan<scan_mode::states>(stream, layout, zero, to);
  join_segments(stream, o, s, o.p.initial, false);
}

template <class R>
void add_parts(cudaStream_t stream, const R* parts, index_t count, index_t rows, index_t row_stride,
               R* to, index_t inner, index_t outer_stride, index_t inner_stride, bool add) {
  if (to == nullptr || count == 0) return;
  add_parts_kernel<<<grid_of(divide_up(count, 256)), 256, 0, stream>>>(
      parts, count, rows, row_stride, to, inner, outer_stride, inner_stride, add);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

template <class T>
void launch_vjp(cudaStream_t stream, const vjp_plan& plan, const selective_arguments<T>& o,
                const vjp_targets<T>& to) {
  const auto launch = [&]<int Own, int Lanes, int Warps, bool Gated>() {
    constexpr int step = 2;
    constexpr std::size_t bytes = sizeof(vjp_memory<Own, Lanes, Warps, step, accum_t<T>>);
    const auto kernel = selective_vjp_kernel<T, Own, Lanes, Warps, step, Gated>;
    allow_shared_memory(kernel, bytes);
    kernel<<<grid_of(plan.tiles * plan.parts), Warps * 32, bytes, stream>>>(o, to);
    SSMLIB_CHECK_CUDA(cudaGetLastError());
  };
  const auto gated = [&]<int Own, int Lanes, int Warps>() {
    if (o.p.gate) {
      launch.template operator()<Own, Lanes, Warps, true>();
    } else {
      launch.template operator()<Own, Lanes, Warps, false>();
    }
  };
  switch (plan.layout) {
    case scan_layout::states_64:
      return gated.template operator()<4, 16, 4>();
    case scan_layout::states_256:
      return gated.template operator() < 8, 32, sizeof(accum_t<T>) == 8 ? 1 : 2 > ();
    default:
      return gated.template operator()<4, 4, 4>();
  }
}

template <class T>
void launch_state_sums(cudaStream_t stream, const vjp_plan& plan, const selective_problem<T>& p,
                       const accum_t<T>* parts, index_t kind, const view<T, 3>& to, bool add) {
  if (!to || p.tokens() == 0) return;
  const index_t count = p.tokens() * to.extents[1] * plan.padded_states;
  add_state_parts_kernel<T><<<grid_of(divide_up(count, 256)), 256, 0, stream>>>(
      parts, plan.tiles, p.tokens(), plan.padded_states, kind, to, add);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace detail

template <class T>
std::size_t selective_forward_workspace_bytes(const selective_problem<T>& p,
                                              const selective_options& o) {
  detail::workspace_cutter w(nullptr);
  (void)detail::segment_states<accum_t<T>>::take(w, p, detail::plan_scan(p, o).segments);
  return w.used();
}

template <class T>
std::size_t selective_backward_workspace_bytes(const selective_problem<T>& p,
                                               const selective_options& o) {
  detail::workspace_cutter w(nullptr);
  (void)detail::vjp_workspace<accum_t<T>>::take(w, p, detail::plan_vjp(p, o.segments));
  return w.used();
}

template <class T>
void selective_forward(cudaStream_t stream, const selective_problem<T>& p, view<T, 2> y,
                       view<accum_t<T>, 3> final, accum_t<T>* checkpoints, void* workspace,
                       const selective_options& options) {
  if (p.channels() == 0 || p.sequences == 0) return;
  detail::check_selective("selective_forward", p);
  const auto plan = detail::plan_scan(p, options);
  auto o = detail::arguments_of(p, plan.segments, plan.segment_length);
  o.paired = o.paired && rows_are_aligned(y.data, y.strides[0], 2);
  detail::workspace_cutter w(workspace);
  const auto s = detail::segment_states<accum_t<T>>::take(w, p, plan.segments);
  detail::find_starts(stream, plan.layout, o, s);
  detail::scan_targets<T> to;
  to.y = y;
  to.final = final;
  to.checkpoints = checkpoints;
  to.starts = s.ends;
  detail::launch_scan<detail::scan_mode::outputs>(stream, plan.layout, o, to);
}

template <class T>
void selective_backward(cudaStream_t stream, const selective_problem<T>& p, view<const T, 2> dy,
                        view<const accum_t<T>, 3> d_final, const accum_t<T>* checkpoints,
                        const selective_gradients<T>& d, void* workspace,
                        const selective_options& options) {
  using R = accum_t<T>;
  if (p.channels() == 0 || p.sequences == 0) return;
  detail::check_selective("selective_backward", p);
  const auto plan = detail::plan_vjp(p, options.segments);
  auto o = detail::arguments_of(p, plan.segments, plan.segment_length);
  const auto paired = [](const auto& v) {
    return v.data == nullptr || rows_are_aligned(v.data, v.strides[0], 2);
  };
  o.paired = o.paired && paired(d.dt) && paired(d.u) && paired(d.gate) && paired(dy);
  detail::workspace_cutter w(workspace);
  const auto s = detail::vjp_workspace<R>::take(w, p, plan);
  if (checkpoints == nullptr) {
    detail::find_starts(stream, plan.layout, o, s.forward);
    detail::scan_targets<T> keep;
    keep.checkpoints = s.checkpoints;
    keep.starts = s.forward.ends;
    detail::launch_scan<detail::scan_mode::states>(stream, plan.layout, o, keep);
    checkpoints = s.checkpoints;
  }
  if (plan.segments > 1) {
    detail::scan_targets<T> back;
    back.ends = s.backward.ends;
    back.sums = s.backward.sums;
    back.dy = dy;
    detail::launch_scan<detail::scan_mode::reversed>(stream, plan.layout, o, back);
    detail::join_segments(stream, o, s.backward, d_final, true);
  }
  const index_t states = p.channels() * p.states(), channels = p.channels();
  if (plan.passes > 1) {
    const auto bytes = static_cast<std::size_t>(plan.parts) * sizeof(R);
    SSMLIB_CHECK_CUDA(cudaMemsetAsync(s.a_parts, 0, bytes * states, stream));
    SSMLIB_CHECK_CUDA(cudaMemsetAsync(s.channel_parts, 0, bytes * 2 * channels, stream));
  }
  detail::launch_vjp<T>(stream, plan, o,
                        {dy, d_final, checkpoints, s.backward.ends, d, s.state_parts, s.a_parts,
                         s.channel_parts, s.carries, plan.parts, plan.passes});
  detail::add_parts(stream, s.a_parts, states, plan.parts, states, d.a.data, p.states(),
                    d.a.strides[0], d.a.strides[1], d.add);
  detail::add_parts(stream, s.channel_parts, channels, plan.parts, 2 * channels, d.skip, channels,
                    0, 1, d.add);
  detail::add_parts(stream, s.channel_parts + channels, channels, plan.parts, 2 * channels,
                    d.dt_bias, channels, 0, 1, d.add);
  detail::launch_state_sums(stream, plan, p, s.state_parts, 0, d.b, d.add);
  detail::launch_state_sums(stream, plan, p, s.state_parts, 1, d.c, d.add);
}

#define SSMLIB_DETAIL_LIST(T)                                                                     \
  SSMLIB_INSTANTIATE(cuda_selective, std::size_t selective_forward_workspace_bytes<T>(            \
                                         const selective_problem<T>&, const selective_options&)); \
  SSMLIB_INSTANTIATE(cuda_selective, std::size_t selective_backward_workspace_bytes<T>(           \
                                         const selective_problem<T>&, const selective_options&)); \
  SSMLIB_INSTANTIATE(cuda_selective,                                                              \
                     void selective_forward<T>(cudaStream_t, const selective_problem<T>&,         \
                                               view<T, 2>, view<accum_t<T>, 3>, accum_t<T>*,      \
                                               void*, const selective_options&));                 \
  SSMLIB_INSTANTIATE(                                                                             \
      cuda_selective,                                                                             \
      void selective_backward<T>(cudaStream_t, const selective_problem<T>&, view<const T, 2>,     \
                                 view<const accum_t<T>, 3>, const accum_t<T>*,                    \
                                 const selective_gradients<T>&, void*, const selective_options&))
SSMLIB_DETAIL_LIST(bf16);
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm::kernels::cuda
