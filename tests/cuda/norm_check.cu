// Checks the norms and the rotary embedding on the GPU against float64 loops on the CPU, then times
// them. Exit status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/norm_backward.cuh>
#include <ssmlib/kernels/cuda/norm_forward.cuh>
#include <ssmlib/kernels/cuda/rope.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

struct shape_case {
  const char* name;
  index_t rows, width, group;
  gate_order order;
  bool layer, shared, slices, add;
};

template <class T>
void check(table& results, const shape_case& s) {
  using R = accum_t<T>;
  const index_t n = s.rows, d = s.width, group = s.group, groups = d / group;
  const index_t size = s.shared ? group : d, pad = s.slices ? 1 : 0;
  const bool gated = s.order != gate_order::none;
  const double eps = 1e-5;
  rows_buffer<T> x(n, d, pad), z(n, d, pad), dy(n, d, pad);
  rows_buffer<R> w(1, size), b(1, size);
  rows_buffer<T> y(n, d, pad), dx(n, d, pad), dz(n, d, pad);
  rows_buffer<R> dw(1, size), db(1, size);
  const auto hx = x.fill(1, -1, 2), hz = z.fill(2, -3, 3), hdy = dy.fill(3, -1, 1),
             hw = w.fill(4, 0.5, 1.5), hb = b.fill(5, -1, 1);
  for (auto* r : {&y, &dx, &dz})
    r->poison();
  dw.poison(), db.poison();
  if (s.add) dx.set(1), dz.set(1), dw.set(1), db.set(1);
  if (s.layer) {
    const layer_norm_problem<T> p{x.matrix(), w.data(), b.data(), static_cast<R>(eps)};
    buffer<unsigned char> work(layer_norm_vjp_workspace_bytes(p));
    work.poison();
    layer_norm<T>(nullptr, p, y.mutable_matrix());
    layer_norm_vjp<T>(nullptr, p, dy.matrix(), {dx.mutable_matrix(), dw.data(), db.data(), s.add},
                      work.data());
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  } else {
    const rms_norm_problem<T> p{x.matrix(),
                                gated ? z.matrix() : view<const T, 2>{},
                                w.data(),
                                group,
                                s.shared ? 0 : group,
                                static_cast<R>(eps)};
    buffer<unsigned char> work(rms_norm_vjp_workspace_bytes(p));
    work.poison();
    rms_norm<T>(nullptr, s.order, p, y.mutable_matrix());
    rms_norm_vjp<T>(
        nullptr, s.order, p, dy.matrix(),
        {dx.mutable_matrix(), gated ? dz.mutable_matrix() : view<T, 2>{}, dw.data(), s.add},
        work.data());
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  }
  std::vector<double> ry(n * d), rdx(n * d), rdz(n * d), rdw(size), rdb(size);
  for (index_t g = 0; g < groups; ++g) {
    for (index_t t = 0; t < n; ++t) {
      const index_t at = t * d + g * group, wat = s.shared ? 0 : g * group;
      std::vector<double> v(group), gate(group, 1), slope(group, 0), gn(group);
      double mean = 0, square = 0, sum_g = 0, sum_gn = 0;
      for (index_t i = 0; i < group; ++i) {
        const double q = 1 / (1 + std::exp(-hz[at + i]));
        if (gated) gate[i] = hz[at + i] * q, slope[i] = q * (1 + hz[at + i] * (1 - q));
        v[i] = hx[at + i] * (s.order == gate_order::gate_first ? gate[i] : 1);
        mean += v[i] / group;
      }
      if (!s.layer) mean = 0;
      for (double e : v)
        square += (e - mean) * (e - mean) / group;
      const double scale = 1 / std::sqrt(square + eps);
      for (index_t i = 0; i < group; ++i) {
        v[i] = (v[i] - mean) * scale;
        const double late = s.order == gate_order::norm_first ? gate[i] : 1;
        ry[at + i] = (v[i] * hw[wat + i] + (s.layer ? hb[wat + i] : 0)) * late;
        const double out = hdy[at + i] * late;
        if (s.order == gate_order::norm_first)
          rdz[at + i] = hdy[at + i] * v[i] * hw[wat + i] * slope[i];
        rdw[wat + i] += out * v[i];
        rdb[wat + i] += out;
        gn[i] = out * hw[wat + i];
        sum_g += s.layer ? gn[i] / group : 0;
        sum_gn += gn[i] * v[i] / group;
      }
      for (index_t i = 0; i < group; ++i) {
        const double dv = scale * (gn[i] - sum_g - v[i] * sum_gn);
        rdx[at + i] = dv * (s.order == gate_order::gate_first ? gate[i] : 1);
        if (s.order == gate_order::gate_first) rdz[at + i] = dv * hx[at + i] * slope[i];
      }
    }
  }
  const double shift = s.add ? -1 : 0;
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 2e-6 : 1e-13;
  const double more = s.add ? 3 * bound : bound, sums = sizeof(T) == 8 ? 1e-12 : 1e-5;
  results.row(s.name, sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64");
  results.error("y", y.read(), ry, bound);
  results.error("dx", dx.read(shift), rdx, more);
  if (gated) results.error("dz", dz.read(shift), rdz, more);
  results.error("dw", dw.read(shift), rdw, sums);
  if (s.layer) results.error("db", db.read(shift), rdb, sums);
  results.end();
}

template <class T>
void check_rope(table& results, index_t heads, index_t features, index_t pairs, bool interleaved) {
  using R = accum_t<T>;
  const std::vector<index_t> offsets{0, 5, 5, 40}, first{100000, 3, 7};
  const index_t tokens = 40;
  rows_buffer<T> x(tokens, heads * features), y(tokens, heads * features), back = {};
  back = rows_buffer<T>(tokens, heads * features);
  rows_buffer<R> angles(tokens, 2 * pairs);
  const auto hx = x.fill(9, -1, 1);
  y.poison(), back.set(1), angles.poison();
  std::vector<double> frequency(pairs), wanted(hx.size());
  for (index_t i = 0; i < pairs; ++i)
    frequency[i] = std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(pairs));
  const buffer<double> f(frequency);
  const buffer<index_t> o(offsets), at(first);
  const rope_positions where{o.data(), at.data(), 3, 35};
  rope_table<R>(nullptr, {f.data(), {pairs}, {1}}, where, angles.mutable_heads(2));
  rope_problem<T> p{angles.heads(2), interleaved, false, false};
  rope_rotate<T>(nullptr, p, x.heads(heads), y.mutable_heads(heads));
  p.backwards = p.add = true;
  rope_rotate<T>(nullptr, p, y.heads(heads), back.mutable_heads(heads));
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  for (index_t t = 0; t < tokens; ++t) {
    const double position = t < 5 ? first[0] + t : first[2] + t - 5;
    for (index_t h = 0; h < heads; ++h) {
      const double* in = &hx[(t * heads + h) * features];
      double* out = &wanted[(t * heads + h) * features];
      for (index_t i = 2 * pairs; i < features; ++i)
        out[i] = in[i];
      for (index_t i = 0; i < pairs; ++i) {
        const index_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + pairs;
        const double c = std::cos(position * frequency[i]), s = std::sin(position * frequency[i]);
        out[a] = in[a] * c - in[b] * s;
        out[b] = in[a] * s + in[b] * c;
      }
    }
  }
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14;
  results.row("rope " + std::to_string(features) + (interleaved ? "i" : ""), sizeof(T) == 2 ? "bf16"
                                                                             : sizeof(T) == 4
                                                                                 ? "f32"
                                                                                 : "f64");
  results.error("y", y.read(), wanted, bound);
  results.error("back", back.read(-1), hx, 3 * bound);
  results.end();
}

void time_norms(index_t rows, index_t width, index_t group, double copy) {
  using T = bf16;
  rows_buffer<T> x(rows, width), z(rows, width), dy(rows, width);
  rows_buffer<float> w(1, width), b(1, width);
  rows_buffer<T> y(rows, width), dx(rows, width), dz(rows, width);
  rows_buffer<float> dw(1, width), db(1, width);
  for (auto* r : {&x, &z, &dy})
    r->fill_device(7, -1, 1);
  w.fill_device(7, -1, 1), b.fill_device(8, -1, 1);
  const rms_norm_problem<T> p{x.matrix(), z.matrix(), w.data(), group, group, 1e-5f};
  const layer_norm_problem<T> l{x.matrix(), w.data(), b.data(), 1e-5f};
  buffer<unsigned char> work(
      std::max(rms_norm_vjp_workspace_bytes(p), layer_norm_vjp_workspace_bytes(l)));
  const double one = 2.0 * rows * width / copy * 1e3;
  const auto line = [&](const char* name, gate_order order, bool layer, double reads) {
    const bool gated = order != gate_order::none;
    const double f = median_ms([&](cudaStream_t q) {
      if (layer) return layer_norm<T>(q, l, y.mutable_matrix());
      rms_norm<T>(q, order, p, y.mutable_matrix());
    });
    const double g = median_ms([&](cudaStream_t q) {
      if (layer) {
        return layer_norm_vjp<T>(q, l, dy.matrix(),
                                 {dx.mutable_matrix(), dw.data(), db.data(), false}, work.data());
      }
      rms_norm_vjp<T>(
          q, order, p, dy.matrix(),
          {dx.mutable_matrix(), gated ? dz.mutable_matrix() : view<T, 2>{}, dw.data(), false},
          work.data());
    });
    const double back = gated ? 5 : 3;
    std::printf(
        "%s %lld x %lld, group %lld bf16: fwd %.4f ms (%.0f%% of copy), bwd %.4f ms (%.0f%%)\n",
        name, static_cast<long long>(rows), static_cast<long long>(width),
        static_cast<long long>(group), f, 100 * (reads + 1) * one / f, g, 100 * back * one / g);
  };
  line("rms", gate_order::none, false, 1);
  line("gate first", gate_order::gate_first, false, 2);
  line("norm first", gate_order::norm_first, false, 2);
  if (group == width) line("layer", gate_order::none, true, 1);
}

void time_rope(index_t tokens, index_t heads, double copy) {
  using T = bf16;
  rows_buffer<T> x(tokens, heads * 128), y(tokens, heads * 128);
  rows_buffer<float> angles(tokens, 128);
  x.fill_device(3, -1, 1);
  const buffer<double> f(std::vector<double>(64, 0.01));
  const double t = median_ms([&](cudaStream_t q) {
    rope_table<float>(q, {f.data(), {64}, {1}}, {nullptr, nullptr, 1, tokens},
                      angles.mutable_heads(2));
  });
  const double r = median_ms([&](cudaStream_t q) {
    rope_rotate<T>(q, {angles.heads(2), false, false, false}, x.heads(heads),
                   y.mutable_heads(heads));
  });
  std::printf("rope %lld tokens, %lld heads of 128: table %.4f ms, turn %.4f ms (%.0f%% of copy)\n",
              static_cast<long long>(tokens), static_cast<long long>(heads), t, r,
              100 * (4.0 * tokens * heads * 128 + 512.0 * tokens) / copy * 1e3 / r);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv);
  table results;
  constexpr auto none = gate_order::none, norm_first = gate_order::norm_first,
                 gate_first = gate_order::gate_first;
  const std::vector<shape_case> cases{
      {"rms", 70, 768, 768, none, false, false, false, false},
      {"rms odd", 33, 77, 77, none, false, false, true, true},
      {"rms one", 1000, 1, 1, none, false, false, false, false},
      {"rms heads", 70, 1024, 64, none, false, true, false, true},
      {"rms 20000", 5, 20000, 20000, none, false, false, false, false},
      {"rms 40000", 5, 40000, 40000, none, false, false, false, true},
      {"gate first", 601, 5120, 5120, gate_first, false, false, false, false},
      {"grouped", 601, 2048, 256, gate_first, false, false, false, true},
      {"norm first", 601, 1536, 1536, norm_first, false, false, false, false},
      {"shared", 77, 999, 333, norm_first, false, true, true, true},
      {"layer", 601, 768, 768, none, true, false, false, false},
      {"layer odd", 70, 1001, 1001, none, true, false, false, true},
      {"many rows", 70001, 32, 16, gate_first, false, false, false, false},
  };
  for (const auto& s : cases) {
    if (small && s.rows > 10000) continue;
    check<double>(results, s);
    check<float>(results, s);
    check<bf16>(results, s);
  }
  for (const bool interleaved : {false, true}) {
    check_rope<double>(results, 3, 64, 32, interleaved);
    check_rope<float>(results, 3, 64, 16, interleaved);
    check_rope<bf16>(results, 4, 128, 64, interleaved);
    check_rope<bf16>(results, 2, 96, 24, interleaved);
    check_rope<float>(results, 2, 21, 5, interleaved);
  }
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  time_norms(16384, 5120, 5120, copy);
  time_norms(16384, 2560, 2560, copy);
  time_norms(16384, 8192, 1024, copy);
  time_rope(16384, 40, copy);
  return finish();
}
