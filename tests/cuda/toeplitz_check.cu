// Checks products with Toeplitz matrices on the GPU, in tiles and through transforms, against
// float64 loops on the CPU, then times them. Exit status 0: all pass, 1: a failure, 2: no device.

#include "quadratic_reference.cuh"
#include <ssmlib/kernels/cuda/toeplitz.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

struct toeplitz_case {
  const char* name;
  std::vector<index_t> offsets;  // one sequence length for rectangular batches
  index_t rectangles;            // sequences of a rectangular batch, or 0: packed
  index_t heads, q_heads, k_heads, x_heads, kernel_heads, n, p;
  bool gram, pad, add, host_offsets;
};

template <class T>
const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}

template <class T>
void check(table& results, const toeplitz_case& c) {
  using R = accum_t<T>;
  quadratic_reference r{quadratic_mask_kind::toeplitz,
                        c.offsets,
                        c.heads,
                        c.q_heads,
                        c.k_heads,
                        c.x_heads,
                        c.kernel_heads,
                        c.n,
                        c.p,
                        c.gram};
  if (c.rectangles > 0) {
    r.offsets.assign(1, 0);
    for (index_t i = 0; i < c.rectangles; ++i)
      r.offsets.push_back(r.offsets.back() + c.offsets[0]);
  }
  const auto sequences = static_cast<index_t>(r.offsets.size()) - 1;
  const index_t tokens = r.tokens(), pad = c.pad ? 1 : 0;
  index_t longest = 0;
  for (index_t i = 0; i < sequences; ++i)
    longest = std::max(longest, r.offsets[i + 1] - r.offsets[i]);
  if (c.rectangles == 0) longest += 3;  // an upper bound will do
  const index_t distances = longest + 2;
  r.distances = distances;
  r.alpha = 0.25;
  rows_buffer<T> q(tokens, c.q_heads * c.n, pad), k(tokens, c.k_heads * c.n, pad);
  rows_buffer<T> x(tokens, c.x_heads * c.p, pad), dy(tokens, c.heads * c.p, pad);
  rows_buffer<T> y(tokens, c.heads * c.p, pad), dq(tokens, c.q_heads * c.n, pad);
  rows_buffer<T> dk(tokens, c.k_heads * c.n, pad), dx(tokens, c.x_heads * c.p, pad);
  rows_buffer<R> kernel(c.kernel_heads, distances, pad);
  rows_buffer<R> d_kernel(c.kernel_heads, distances, pad);
  r.q = q.fill(1, -1, 1), r.k = k.fill(2, -1, 1);
  r.x = x.fill(3, -1, 1), r.dy = dy.fill(4, -1, 1);
  r.kernel = kernel.fill(8, -1, 1);
  r.run(true);
  const buffer<index_t> offsets(r.offsets);
  for (const auto path : {toeplitz_path::direct, toeplitz_path::transforms}) {
    y.poison(), dq.poison(), dk.poison(), dx.poison(), d_kernel.poison();
    if (c.add) dq.set(1), dk.set(1), dx.set(1), d_kernel.set(1);
    toeplitz_problem<T> o{kernel.matrix(), x.heads(c.x_heads)};
    if (c.gram) o.q = q.heads(c.q_heads), o.k = k.heads(c.k_heads);
    o.alpha = static_cast<R>(r.alpha);
    o.heads = c.heads;
    o.offsets = c.rectangles > 0 ? nullptr : offsets.data();
    o.sequences = sequences;
    o.max_length = longest;
    if (c.host_offsets) o.host_offsets = r.offsets.data();
    o.path = path;
    toeplitz_gradients<T> g{d_kernel.mutable_matrix(), dx.mutable_heads(c.x_heads)};
    if (c.gram) g.q = dq.mutable_heads(c.q_heads), g.k = dk.mutable_heads(c.k_heads);
    g.add = c.add;
    toeplitz_plans<R> plans;
    buffer<unsigned char> work(
        static_cast<index_t>(std::max(toeplitz_product_workspace_bytes(o, plans),
                                      toeplitz_product_vjp_workspace_bytes(o, g, plans))));
    work.poison();
    toeplitz_product<T>(nullptr, o, y.mutable_heads(c.heads), plans, work.data());
    toeplitz_product_vjp<T>(nullptr, o, dy.heads(c.heads), g, plans, work.data());
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
    const double shift = c.add ? -1 : 0;
    const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 3e-6 : 1e-13;
    const double more = c.add && sizeof(T) == 2 ? 3 * bound : bound;
    const double sums = sizeof(T) == 8 ? 1e-12 : 1e-5;
    results.row(std::string(c.name) + (path == toeplitz_path::direct ? " tiles" : " fft"),
                type_name<T>());
    results.error("y", y.read(), r.y, bound);
    if (c.gram) results.error("dq", dq.read(shift), r.dq, more);
    if (c.gram) results.error("dk", dk.read(shift), r.dk, more);
    results.error("dx", dx.read(shift), r.dx, more);
    results.error("dkernel", d_kernel.read(shift), r.d_kernel, sums);
    results.end();
  }
}

/// One column of 2^20 + 1 tokens: elements here and there.
template <class T>
void check_long(table& results) {
  using R = accum_t<T>;
  const index_t n = (index_t{1} << 20) + 1;
  rows_buffer<T> x(n, 1), dy(n, 1), y(n, 1), dx(n, 1);
  rows_buffer<R> kernel(1, n), d_kernel(1, n);
  const auto hx = x.fill(1, -1, 1), hdy = dy.fill(2, -1, 1), hk = kernel.fill(3, -1, 1);
  y.poison(), dx.poison(), d_kernel.poison();
  toeplitz_problem<T> o{kernel.matrix(), x.heads(1)};
  o.heads = o.sequences = 1;
  o.max_length = n;
  const toeplitz_gradients<T> g{d_kernel.mutable_matrix(), dx.mutable_heads(1)};
  toeplitz_plans<R> plans;
  buffer<unsigned char> work(
      static_cast<index_t>(std::max(toeplitz_product_workspace_bytes(o, plans),
                                    toeplitz_product_vjp_workspace_bytes(o, g, plans))));
  toeplitz_product<T>(nullptr, o, y.mutable_heads(1), plans, work.data());
  toeplitz_product_vjp<T>(nullptr, o, dy.heads(1), g, plans, work.data());
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  const index_t samples = 200;
  std::vector<double> ry(samples), rdx(samples), rdk(samples), wy(samples), wdx(samples),
      wdk(samples);
  const auto all_y = y.read(), all_dx = dx.read(), all_dk = d_kernel.read();
  parallel(samples, [&](index_t i) {
    const index_t t = i == samples - 1 ? n - 1 : i * (n / samples);
    wy[i] = all_y[t], wdx[i] = all_dx[t], wdk[i] = all_dk[t];
    for (index_t s = 0; s <= t; ++s)
      ry[i] += hk[t - s] * hx[s];
    for (index_t s = t; s < n; ++s)
      rdx[i] += hk[s - t] * hdy[s], rdk[i] += hdy[s] * hx[s - t];
  });
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 3e-6 : 1e-13;
  results.row("2^20 + 1", type_name<T>());
  results.error("y", wy, ry, bound);
  results.error("dx", wdx, rdx, bound);
  results.error("dkernel", wdk, rdk, sizeof(T) == 8 ? 1e-12 : 1e-5);
  results.end();
}

void time_one(index_t sequences, index_t length, index_t heads, index_t p, index_t n, double copy) {
  using T = bf16;
  const index_t tokens = sequences * length, width = std::max<index_t>(n, 1);
  rows_buffer<T> x(tokens, heads * p), dy(tokens, heads * p), y(tokens, heads * p),
      dx(tokens, heads * p);
  rows_buffer<T> q(tokens, heads * width), k(tokens, heads * width), dq(tokens, heads * width),
      dk(tokens, heads * width);
  rows_buffer<float> kernel(heads, length), d_kernel(heads, length);
  for (auto* r : {&x, &dy, &q, &k})
    r->fill_device(5, -1, 1);
  kernel.fill_device(5, -1, 1);
  toeplitz_problem<T> o{kernel.matrix(), x.heads(heads)};
  if (n > 0) o.q = q.heads(heads), o.k = k.heads(heads);
  o.heads = heads;
  o.sequences = sequences;
  o.max_length = length;
  toeplitz_gradients<T> g{d_kernel.mutable_matrix(), dx.mutable_heads(heads)};
  if (n > 0) g.q = dq.mutable_heads(heads), g.k = dk.mutable_heads(heads);
  std::printf("%lld x %lld tokens, %lld heads of %lld, key size %lld, bf16:",
              static_cast<long long>(sequences), static_cast<long long>(length),
              static_cast<long long>(heads), static_cast<long long>(p), static_cast<long long>(n));
  for (const auto path : {toeplitz_path::direct, toeplitz_path::transforms}) {
    if (path == toeplitz_path::direct && length > 8192) continue;
    o.path = path;
    toeplitz_plans<float> plans;
    const std::size_t bytes = std::max(toeplitz_product_workspace_bytes(o, plans),
                                       toeplitz_product_vjp_workspace_bytes(o, g, plans));
    buffer<unsigned char> work(static_cast<index_t>(bytes));
    const double f = median_ms([&](cudaStream_t s) {
      toeplitz_product<T>(s, o, y.mutable_heads(heads), plans, work.data());
    });
    const double b = median_ms([&](cudaStream_t s) {
      toeplitz_product_vjp<T>(s, o, dy.heads(heads), g, plans, work.data());
    });
    std::printf(" %s fwd %.3f ms bwd %.3f ms (%.0f MB)",
                path == toeplitz_path::direct ? "tiles" : " fft", f, b,
                static_cast<double>(bytes) * 1e-6);
    if (path == toeplitz_path::transforms && n == 0) {
      std::printf(", x and y copied in %.3f ms",
                  4.0 * static_cast<double>(tokens * heads * p) / copy * 1e3);
    }
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table results;
  const std::vector<index_t> packed{0, 5, 5, 69, 199, 200, 463};
  const std::vector<toeplitz_case> cases{
      {"packed", packed, 0, 4, 1, 1, 2, 2, 1, 37, false, true, true, false},
      {"by host", packed, 0, 4, 1, 1, 4, 4, 1, 5, false, false, false, true},
      {"own add", packed, 0, 4, 1, 1, 1, 1, 1, 5, false, true, true, true},
      {"one token", {1}, 3, 40, 1, 1, 20, 40, 1, 3, false, false, false, false},
      {"1023", {1023}, 2, 2, 1, 1, 2, 1, 1, 9, false, false, false, false},
      {"1025", {1025}, 1, 6, 1, 1, 6, 3, 1, 1, false, false, false, false},
      {"many", {65}, 10, 7001, 1, 1, 7001, 7001, 1, 1, false, false, false, false},
      {"many one", {3}, 70001, 1, 1, 1, 1, 1, 1, 2, false, false, false, false},
      {"gram", packed, 0, 4, 2, 1, 4, 2, 7, 11, true, true, true, false},
      {"gram host", packed, 0, 4, 4, 2, 1, 4, 8, 4, true, false, false, true},
      {"gram 300", {300}, 2, 2, 2, 2, 2, 1, 64, 33, true, false, false, false},
  };
  for (const auto& c : cases) {
    if (small && std::max(c.rectangles, c.heads) * c.offsets.back() > 20000) continue;
    if (all) check<double>(results, c), check<float>(results, c);
    check<bf16>(results, c);
  }
  if (small) return finish();
  check_long<double>(results);
  check_long<float>(results);
  check_long<bf16>(results);
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  for (const index_t length : {128, 256, 512, 1024, 2048, 4096})
    time_one(16384 / length, length, 16, 64, 0, copy);
  time_one(1, 16384, 16, 64, 0, copy);
  time_one(8, 2048, 768, 1, 0, copy);
  time_one(1, 131072, 768, 1, 0, copy);
  time_one(1, 2048, 4, 64, 64, copy);
  time_one(1, 8192, 4, 64, 64, copy);
  time_one(1, 32768, 1, 64, 64, copy);
  return finish();
}
