// Checks the causal convolution on the GPU against a float64 loop on the CPU, then times it.
// Exit status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/conv1d_backward.cuh>
#include <ssmlib/kernels/cuda/conv1d_forward.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

struct shape_case {
  const char* name;
  std::vector<index_t> lengths;
  index_t channels, width;
  bool silu, bias, initial, ragged, slices, add;
};

template <class T>
void check(table& results, const shape_case& s) {
  using R = accum_t<T>;
  index_t tokens = 0, longest = 0;
  std::vector<index_t> o{0};
  for (index_t l : s.lengths)
    o.push_back(tokens += l), longest = std::max(longest, l);
  const index_t n = s.lengths.size(), C = s.channels, W = s.width, pad = s.slices ? 3 : 0;
  rows_buffer<T> x(tokens, C, pad), h(n, (W - 1) * C), dy(tokens, C, pad);
  rows_buffer<R> w(C, W), b(1, C);
  rows_buffer<T> d_h(n, (W - 1) * C), y(tokens, C, pad), dx(tokens, C, pad), last(n, (W - 1) * C);
  rows_buffer<T> d_initial(n, (W - 1) * C);
  rows_buffer<R> dw(C, W), db(1, C);
  const auto hx = x.fill(1, -1, 1), hw = w.fill(2, -1, 1), hb = b.fill(3, -1, 1),
             hh = h.fill(4, -1, 1), hdy = dy.fill(5, -1, 1), hdh = d_h.fill(6, -1, 1);
  const buffer<index_t> offsets(o);
  for (auto* r : {&y, &dx, &last, &d_initial})
    r->poison();
  dw.poison(), db.poison();
  if (s.add) dx.set(1), d_initial.set(1), dw.set(1), db.set(1);
  conv1d_problem<T> p;
  p.x = x.matrix(), p.weight = w.matrix();
  if (s.bias) p.bias = b.data();
  p.activation = s.silu ? conv1d_activation::silu : conv1d_activation::none;
  if (s.initial && W > 1) p.initial = h.heads(W - 1);
  if (s.ragged) p.offsets = offsets.data();
  p.sequences = n, p.max_length = longest;
  conv1d_gradients<T> d{dx.mutable_matrix(), dw.data(), db.data(), {}, s.add};
  if (W > 1) d.initial = d_initial.mutable_heads(W - 1);
  buffer<unsigned char> work(conv1d_backward_workspace_bytes(p));
  work.poison();
  conv1d_forward<T>(nullptr, p, y.mutable_matrix(),
                    W > 1 ? last.mutable_heads(W - 1) : view<T, 3>{});
  conv1d_backward<T>(nullptr, p, dy.matrix(), W > 1 ? d_h.heads(W - 1) : view<const T, 3>{}, d,
                     work.data());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());

  std::vector<double> ry(tokens * C), rdx(tokens * C), rl(n * (W - 1) * C), rdh(n * (W - 1) * C);
  std::vector<double> rdw(C * W), rdb(C);
  parallel(C, [&](index_t c) {
    for (index_t i = 0; i < n; ++i) {
      const index_t length = s.lengths[i], begin = o[i], before = W - 1;
      std::vector<double> in(before + length), din(before + length);
      for (index_t k = 0; k < before + length; ++k) {
        if (k < before) {
          in[k] = s.initial ? hh[(i * before + k) * C + c] : 0;
        } else {
          in[k] = hx[(begin + k - before) * C + c];
        }
        if (k >= length) din[k] = hdh[(i * before + k - length) * C + c];
      }
      for (index_t t = 0; t < length; ++t) {
        double pre = s.bias ? hb[c] : 0;
        for (index_t j = 0; j < W; ++j)
          pre += hw[c * W + j] * in[t + j];
        const double q = 1 / (1 + std::exp(-pre));
        ry[(begin + t) * C + c] = s.silu ? pre * q : pre;
        const double g = hdy[(begin + t) * C + c] * (s.silu ? q * (1 + pre * (1 - q)) : 1);
        for (index_t j = 0; j < W; ++j) {
          rdw[c * W + j] += g * in[t + j];
          din[t + j] += g * hw[c * W + j];
        }
        rdb[c] += g;
      }
      for (index_t k = 0; k < before; ++k) {
        rl[(i * before + k) * C + c] = in[length + k];
        rdh[(i * before + k) * C + c] = din[k];
      }
      for (index_t t = 0; t < length; ++t)
        rdx[(begin + t) * C + c] = din[before + t];
    }
  });
  const double shift = s.add ? -1 : 0;
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14;
  const double more = s.add ? 3 * bound : bound;
  results.row(s.name, sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64");
  results.error("y", y.read(), ry, bound);
  if (W > 1) results.error("h", last.read(), rl, 0);
  results.error("dx", dx.read(shift), rdx, more);
  if (W > 1) results.error("dh", d_initial.read(shift), rdh, more);
  results.error("dw", dw.read(shift), rdw, sizeof(T) == 8 ? 1e-12 : 5e-6);
  results.error("db", db.read(shift), rdb, sizeof(T) == 8 ? 1e-12 : 5e-6);
  results.end();
}

void time_shape(index_t sequences, index_t length, index_t channels, double copy) {
  using T = bf16;
  const index_t tokens = sequences * length;
  rows_buffer<T> x(tokens, channels), dy(tokens, channels);
  rows_buffer<float> w(channels, 4), b(1, channels);
  rows_buffer<T> y(tokens, channels), dx(tokens, channels);
  rows_buffer<float> dw(channels, 4), db(1, channels);
  x.fill_device(1, -1, 1), w.fill_device(2, -1, 1), b.fill_device(3, -1, 1);
  dy.fill_device(4, -1, 1);
  conv1d_problem<T> p;
  p.x = x.matrix(), p.weight = w.matrix(), p.bias = b.data();
  p.sequences = sequences, p.max_length = length;
  const conv1d_gradients<T> d{dx.mutable_matrix(), dw.data(), db.data(), {}, false};
  buffer<unsigned char> work(conv1d_backward_workspace_bytes(p));
  const double f =
      median_ms([&](cudaStream_t q) { conv1d_forward<T>(q, p, y.mutable_matrix(), {}); });
  const double g =
      median_ms([&](cudaStream_t q) { conv1d_backward<T>(q, p, dy.matrix(), {}, d, work.data()); });
  const double one = 2.0 * tokens * channels / copy * 1e3;
  std::printf(
      "conv b%lld T%lld C%lld W4 silu bf16: fwd %.4f ms (%.0f%% of the copy floor %.4f), bwd %.4f "
      "ms "
      "(%.0f%%), fwd+bwd %.4f ms\n",
      static_cast<long long>(sequences), static_cast<long long>(length),
      static_cast<long long>(channels), f, 200 * one / f, 2 * one, g, 300 * one / g, f + g);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv);
  table results;
  std::vector<index_t> mixed{5, 0, 1, 130, 2, 64, 3, 0, 0, 77}, tiny(70001, 1);
  //                name lengths C W silu bias init ragged slices add
  const std::vector<shape_case> cases{
      {"plain", {100, 100}, 64, 4, false, false, false, false, false, false},
      {"silu", {257, 257, 257}, 100, 4, true, true, true, false, false, false},
      {"ragged", mixed, 72, 4, true, true, true, true, false, false},
      {"slices", mixed, 37, 4, true, true, true, true, true, true},
      {"width 3", mixed, 40, 3, true, false, true, true, false, true},
      {"width 2", mixed, 132, 2, false, true, true, true, false, false},
      {"width 1", mixed, 10, 1, true, true, false, true, false, false},
      {"width 9", mixed, 33, 9, true, true, true, true, false, true},
      {"many", tiny, 8, 4, true, true, true, true, false, false},
      {"large", {4096, 4096}, 1024, 4, true, true, true, false, false, false},
      {"T 2^20+1", {(1 << 20) + 1}, 12, 4, true, true, true, false, false, false},
  };
  for (const auto& s : cases) {
    if (small && (s.lengths.size() > 100 || s.lengths[0] > 1000)) continue;
    check<double>(results, s);
    check<float>(results, s);
    check<bf16>(results, s);
  }
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  time_shape(8, 2048, 5376, copy);
  time_shape(1, 16384, 5376, copy);
  time_shape(1, 2048, 5376, copy);
  return finish();
}
