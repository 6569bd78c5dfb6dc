#include "check.cuh"
#include <ssmlib/kernels/cuda/conv1d_step.cuh>

/// @file
/// The convolution from a ring of inputs on the GPU against float64, and bit by bit over splits.

namespace {

using namespace ssm;
using namespace ssm::cuda_check;
using namespace ssm::kernels::cuda;

struct conv_case {
  const char* name;
  std::vector<index_t> lengths;
  index_t channels, width, spare;  // rows of the ring above width - 1
  bool bias, activate;
  index_t most;  // tokens of a sequence and call
};

template <class T>
rows_buffer<T> gathered(const rows_buffer<T>& from, const std::vector<index_t>& rows) {
  const auto all = from.matrix();
  rows_buffer<T> to(static_cast<index_t>(rows.size()), all.extents[1], 0);
  const auto out = to.mutable_matrix();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    SSMLIB_CHECK_CUDA(cudaMemcpyAsync(out.data + i * out.strides[0],
                                      all.data + rows[i] * all.strides[0],
                                      all.extents[1] * sizeof(T), cudaMemcpyDeviceToDevice));
  }
  return to;
}

template <class T>
void check(table& results, const conv_case& s) {
  const index_t sequences = static_cast<index_t>(s.lengths.size()), C = s.channels, W = s.width;
  const index_t slots = W - 1 + s.spare;
  std::vector<index_t> offsets{0};
  for (const index_t n : s.lengths)
    offsets.push_back(offsets.back() + n);
  const index_t tokens = offsets.back();
  rows_buffer<T> x(tokens, C, 4), y(tokens, C, 4);
  rows_buffer<accum_t<T>> weight(C, W), bias(1, C);
  rows_buffer<T> ring(sequences * slots, C), split_ring(sequences * slots, C);
  const auto hx = x.fill(1, -1, 1), hw = weight.fill(2, -1, 1), hb = bias.fill(3, -1, 1);
  std::vector<double> wanted(tokens * C);
  parallel(sequences, [&](index_t i) {
    for (index_t t = 0; t < s.lengths[i]; ++t)
      for (index_t c = 0; c < C; ++c) {
        double sum = s.bias ? hb[c] : 0;
        for (index_t j = std::max<index_t>(0, W - 1 - t); j < W; ++j)
          sum += hw[c * W + j] * hx[(offsets[i] + t - (W - 1) + j) * C + c];
        wanted[(offsets[i] + t) * C + c] = s.activate ? sum / (1 + std::exp(-sum)) : sum;
      }
  });
  const auto run = [&](const rows_buffer<T>& in, rows_buffer<T>& out, rows_buffer<T>& to,
                       const std::vector<index_t>& cuts, const std::vector<index_t>& at) {
    const buffer<index_t> o(cuts), position(at);
    index_t longest = 0;
    for (index_t i = 0; i < sequences; ++i)
      longest = std::max(longest, cuts[i + 1] - cuts[i]);
    out.poison();
    conv1d_step_problem<T> p{in.matrix(),
                             weight.matrix(),
                             s.bias ? bias.data() : nullptr,
                             s.activate ? conv1d_activation::silu : conv1d_activation::none,
                             {to.data(), {sequences, slots, C}, {slots * C, C, 1}},
                             position.data(),
                             o.data(),
                             sequences,
                             longest};
    conv1d_step<T>(nullptr, p, out.mutable_matrix());
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  };
  std::vector<index_t> at(sequences, 0);
  ring.poison(), split_ring.poison();
  run(x, y, ring, offsets, at);
  const auto whole = y.read();
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14;
  results.row(s.name, sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64");
  results.error("y", whole, wanted, bound);
  std::vector<double> split(whole.size());
  for (index_t call = 0; at != s.lengths; ++call) {
    std::vector<index_t> rows, cuts{0};
    const auto was = at;
    for (index_t i = 0; i < sequences; ++i) {
      const index_t n = std::min((7 * call + 5 * i) % (s.most + 1), s.lengths[i] - at[i]);
      for (index_t t = 0; t < n; ++t)
        rows.push_back(offsets[i] + at[i] + t);
      cuts.push_back(static_cast<index_t>(rows.size()));
      at[i] += n;
    }
    rows_buffer<T> out(static_cast<index_t>(rows.size()), C);
    run(gathered(x, rows), out, split_ring, cuts, was);
    const auto part = out.read();
    for (std::size_t r = 0; r < rows.size(); ++r)
      std::copy_n(&part[r * C], C, &split[rows[r] * C]);
  }
  results.error("split", split, whole, 0);
  // The last inputs are where their positions say, in both rings.
  std::vector<double> kept, expected;
  for (const auto& from : {ring.read(), split_ring.read()})
    for (index_t i = 0; i < sequences; ++i)
      for (index_t t = std::max<index_t>(0, s.lengths[i] - slots); t < s.lengths[i]; ++t) {
        const double* r = &from[(i * slots + t % slots) * C];
        kept.insert(kept.end(), r, r + C);
        r = &hx[(offsets[i] + t) * C];
        expected.insert(expected.end(), r, r + C);
      }
  results.error("ring", kept, expected, 0);
  results.end();
}

void measure(index_t sequences, index_t tokens, double copy) {
  using T = bf16;
  const index_t C = 5376, W = 4, rows = 8;
  rows_buffer<T> x(sequences * tokens, C), y(sequences * tokens, C);
  rows_buffer<float> weight(C, W), bias(1, C);
  const index_t layers =
      std::clamp<index_t>((index_t{400} << 20) / (sequences * rows * C * 2), 1, 64);
  rows_buffer<T> ring(layers * sequences * rows, C);
  for (auto* r : {&x, &ring})
    r->fill_device(3, -1, 1);
  for (auto* r : {&weight, &bias})
    r->fill_device(3, -1, 1);
  const buffer<index_t> position(std::vector<index_t>(sequences, 100));
  const double ms =
      median_ms([&](cudaStream_t stream) {
        for (index_t l = 0; l < layers; ++l) {
          conv1d_step_problem<T> p{
              x.matrix(),
              weight.matrix(),
              bias.data(),
              conv1d_activation::silu,
              {ring.data() + l * sequences * rows * C, {sequences, rows, C}, {rows * C, C, 1}},
              position.data(),
              nullptr,
              sequences,
              tokens};
          conv1d_step<T>(stream, p, y.mutable_matrix());
        }
      }) /
      static_cast<double>(layers);
  const double kept = static_cast<double>(std::min(rows, tokens));
  const double bytes = 2.0 * sequences * C * (2.0 * tokens + W - 1 + kept) + 4.0 * C * (W + 1);
  std::printf("conv b%lld, %lld tokens: %.4f ms (%.0f%% of copy)\n",
              static_cast<long long>(sequences), static_cast<long long>(tokens), ms,
              100 * bytes / copy * 1e3 / ms);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table results;
  const std::vector<index_t> mixed{37, 0, 1, 20};
  const std::vector<conv_case> cases{
      {"usual", mixed, 256, 4, 5, true, true, 16},
      {"bare ring", mixed, 96, 4, 0, false, false, 16},
      {"width 3", mixed, 33, 3, 2, true, true, 9},
      {"width 2", mixed, 7, 2, 1, true, false, 4},
      {"width 1", mixed, 20, 1, 0, true, true, 4},
      {"width 7", mixed, 50, 7, 3, true, true, 16},
      {"long", {1000, 3, 200}, 64, 4, 70, true, true, 130},
      {"batch", std::vector<index_t>(3001, 2), 16, 4, 1, true, true, 2},
  };
  for (const auto& s : cases) {
    if (small && s.lengths.size() > 100) continue;
    if (all) check<double>(results, s), check<float>(results, s);
    check<bf16>(results, s);
  }
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  for (const index_t b : {1, 8, 64, 512}) {
    measure(b, 1, copy);
    measure(b, 16, copy);
  }
  return finish();
}
