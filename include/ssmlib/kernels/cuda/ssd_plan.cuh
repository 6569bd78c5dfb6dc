#pragma once

#include <ssmlib/kernels/cuda/rung.cuh>
#include <ssmlib/kernels/cuda/ssd_parts.cuh>

#include <algorithm>

/// @file
/// How the tensor cores' kernels for scalar-gated recurrences cut sequences into parts that run at
/// once.

namespace ssm::kernels::cuda::detail {

/// How sequences are cut into parts of `tokens` tokens that run at once. A first pass, over pieces
/// of parts, leaves in the workspace what each piece adds to the state. A lane is 64 features of
/// one head.
struct ssd_cut {
  index_t tokens;
  int lanes, parts;  // parts of 64 features a head
  int supers;        // parts of a sequence, at most
  int pieces;        // of a part
  int slots;         // states of a sequence in the workspace: the initial one, and after each piece
  bool folded;       // a part sums up the pieces before it by itself
  float* state;      // (sequences, slots, lanes, 64 * keys), as registers lie
  float* decay;      // (sequences, slots, lanes)

  template <int N>
  SSMLIB_DEVICE float* state_of(index_t s, index_t slot, index_t v) const {
    return state + ((s * slots + slot) * lanes + v) * (64 * N);
  }
  SSMLIB_DEVICE float* decay_of(index_t s, index_t slot, index_t v) const {
    return decay + (s * slots + slot) * lanes + v;
  }
  /// The cut of the first pass, whose parts are the pieces.
  [[nodiscard]] ssd_cut of_pieces() const {
    ssd_cut r = *this;
    r.tokens = tokens / pieces, r.supers = slots - 1;
    return r;
  }
};

/// What one block works on: lanes from `lane` on, of one part of one sequence.
struct ssd_place {
  int lane, super, sequence, tokens;
  index_t first;  // token, of all
  bool last, empty;

  SSMLIB_DEVICE ssd_place(const ssd_arguments<bf16>& p, const ssd_cut& cut, int block, int groups,
                          int supers) {
    const int packs = cut.lanes / groups;
    lane = block % packs * groups;
    super = block / packs % supers;
    sequence = block / packs / supers;
    const index_t begin = p.begin(sequence), length = p.end(sequence) - begin;
    const index_t from = super * cut.tokens;
    first = begin + from;
    last = from + cut.tokens >= length;
    empty = super > 0 && from >= length;
    tokens = static_cast<int>(max(index_t{0}, min(cut.tokens, length - from)));
  }
};

/// Whether rows can be copied 16 bytes at a time.
inline bool ssd_aligned(const view<const bf16, 3>& v) {
  return reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0 && v.stride(2) == 1 &&
         v.stride(0) % 8 == 0 && v.stride(1) % 8 == 0 && v.extent(2) % 8 == 0;
}

/// What the launch does for one problem: a function of its sizes and of the card.
struct ssd_plan {
  rung kernels = rung::general;
  int keys = 128, groups = 2;
  index_t lanes = 0, parts = 1, supers = 1, pieces = 1, tokens = 0;

  [[nodiscard]] static ssd_plan of(const ssd_problem<bf16>& p) {
    ssd_plan r;
    if (p.key_size() <= 128 && p.q.extent(0) < (index_t{1} << 31) && ssd_aligned(p.q) &&
        ssd_aligned(p.k) && ssd_aligned(p.x)) {
      r.kernels = usable_rung(p.most);
    }
    if (r.kernels == rung::general || p.heads == 0 || p.sequences == 0) return r;
    r.keys = p.key_size() <= 64 ? 64 : 128;
    r.parts = (p.features() + 63) / 64;
    r.lanes = p.heads * r.parts;
    // Two warpgroups of a block share q and k, so their lanes must.
    const index_t heads = p.heads / std::max(p.q.extent(1), p.k.extent(1));
    r.groups = r.parts % 2 == 0 || heads % 2 == 0 ? 2 : 1;
    // The sm_80 rung's blocks of two take 117 KiB, more than some of its cards have.
    if (r.kernels == rung::sm_80 && shared_bytes_of_block() < 120 * 1024) r.groups = 1;
    r.cut_sequences(p, device_attribute(cudaDevAttrMultiProcessorCount));
    return r;
  }

  [[nodiscard]] index_t slots() const { return (supers - 1) * pieces + 1; }
  [[nodiscard]] std::size_t workspace_bytes(const ssd_problem<bf16>& p) const {
    if (supers == 1) return 0;
    return static_cast<std::size_t>(p.sequences * slots() * lanes) * (64 * keys + 4) *
           sizeof(float);
  }
  [[nodiscard]] ssd_cut cut(const ssd_problem<bf16>& p, void* workspace) const {
    ssd_cut r{};
    r.tokens = tokens;
    r.lanes = static_cast<int>(lanes), r.parts = static_cast<int>(parts);
    r.supers = static_cast<int>(supers), r.pieces = static_cast<int>(pieces);
    r.slots = static_cast<int>(slots());
    r.folded = r.slots <= 7;
    r.state = static_cast<float*>(workspace);
    if (supers > 1) r.decay = r.state + p.sequences * slots() * lanes * 64 * keys;
    return r;
  }

 private:
  // Time is counted in chunks of a block's main pass (about 2.2 us on an H100): waves of blocks,
  // each with 1.5 chunks to start; the pass for the states, which the memory bounds when it fills
  // the card; two more launches; and, when there are many, the scan over its pieces.
  void cut_sequences(const ssd_problem<bf16>& p, int processors) {
    const index_t chunks = std::max<index_t>(1, (p.max_length + 63) / 64);
    const index_t blocks = p.sequences * lanes / groups;
    const index_t at_once = groups == 2 ? processors : 2 * processors;
    const auto waves = [&](index_t n, double span) {
      return static_cast<double>((n + at_once - 1) / at_once) * span;
    };
    double best = waves(blocks, static_cast<double>(chunks) + 1.5);
    tokens = chunks * 64;
    for (index_t k = 2; k <= std::min<index_t>(chunks, 64); ++k) {
      for (index_t n = 1; n <= 4; ++n) {
        const index_t length = round_up((chunks + k - 1) / k, n);
        if ((chunks + length - 1) / length != k) continue;
        const auto span = static_cast<double>(length);
        const double bytes = static_cast<double>(blocks * (k - 1)) * span / processors * 0.45;
        const double states =
            waves(blocks * (k - 1) * n, (span / static_cast<double>(n) + 3.5) * 0.35);
        double time = waves(blocks * k, span + 1.5) + std::max(states, bytes) + 2.0;
        if ((k - 1) * n > 6) time += static_cast<double>(p.sequences * lanes * k * n) * 0.01;
        if (time < best) best = time, supers = k, pieces = n, tokens = length * 64;
      }
    }
  }
};

/// Turns what the pieces of a sequence add to the state into the states after them, in place. `cut`
/// is that of the pieces.
static __global__ void ssd_scan_kernel(const ssd_arguments<bf16> p, const ssd_cut cut,
                                       int state_size) {
  const index_t i = (static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= p.sequences * cut.lanes * state_size) return;
  const int s = static_cast<int>(i / state_size / cut.lanes);
  const int v = static_cast<int>(i / state_size % cut.lanes);
  const index_t length = p.end(s) - p.begin(s), step = index_t{cut.lanes} * state_size;
  const int parts = static_cast<int>((length + cut.tokens - 1) / cut.tokens);
  float* at = cut.state + (index_t{s} * cut.slots * cut.lanes + v) * state_size + i % state_size;
  if (parts < 3) return;
  float4 sum = *reinterpret_cast<const float4*>(at + step);
#pragma unroll 4
  for (int k = 2; k < min(parts, cut.slots); ++k) {
    const float decay = *cut.decay_of(s, k - 1, v);
    float4* here = reinterpret_cast<float4*>(at + k * step);
    const float4 own = *here;
    sum = {decay * sum.x + own.x, decay * sum.y + own.y, decay * sum.z + own.z,
           decay * sum.w + own.w};
    *here = sum;
  }
}

inline void ssd_scan_states(cudaStream_t stream, const ssd_problem<bf16>& p, const ssd_cut& pieces,
                            int state_size) {
  const index_t threads = p.sequences * pieces.lanes * (state_size / 4);
  ssd_scan_kernel<<<ssd_blocks((threads + 127) / 128), 128, 0, stream>>>(ssd_arguments<bf16>(p),
                                                                         pieces, state_size);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
}

}  // namespace ssm::kernels::cuda::detail
