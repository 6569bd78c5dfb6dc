// Checks the masked products and the gram matrix on the GPU against float64 loops on the CPU, then
// times them. Exit status 0: all pass, 1: a failure, 2: no device.

#include "quadratic_reference.cuh"
#include <ssmlib/kernels/cuda/quadratic.cuh>

#include <limits>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

using kind = quadratic_mask_kind;

struct quadratic_case {
  const char* name;
  kind mask;
  std::vector<index_t> offsets;  // one sequence length for rectangular batches
  index_t rectangles;            // sequences of a rectangular batch, or 0: packed
  index_t heads, q_heads, k_heads, x_heads, mask_heads, n, p;
  bool gram, weight, pad, add, gradients, associative;
};

template <class T>
const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}

template <class T>
void check(table& results, const quadratic_case& c) {
  using R = accum_t<T>;
  quadratic_reference r{c.mask,    c.offsets,    c.heads, c.q_heads, c.k_heads,
                        c.x_heads, c.mask_heads, c.n,     c.p,       c.gram};
  if (c.rectangles > 0) {
    r.offsets.assign(1, 0);
    for (index_t i = 0; i < c.rectangles; ++i)
      r.offsets.push_back(r.offsets.back() + c.offsets[0]);
  }
  const auto sequences = static_cast<index_t>(r.offsets.size()) - 1;
  const index_t tokens = r.tokens();
  index_t longest = 0;
  for (index_t i = 0; i < sequences; ++i)
    longest = std::max(longest, r.offsets[i + 1] - r.offsets[i]);
  if (c.rectangles == 0) longest += 3;  // an upper bound will do
  const index_t pad = c.pad ? 1 : 0, distances = longest + 2;
  r.distances = distances;
  r.window = 40;
  r.alpha = 0.25;
  rows_buffer<T> q(tokens, c.q_heads * c.n, pad), k(tokens, c.k_heads * c.n, pad);
  rows_buffer<T> x(tokens, c.x_heads * c.p, pad), dy(tokens, c.heads * c.p, pad);
  rows_buffer<T> y(tokens, c.heads * c.p, pad), dq(tokens, c.q_heads * c.n, pad);
  rows_buffer<T> dk(tokens, c.k_heads * c.n, pad), dx(tokens, c.x_heads * c.p, pad);
  rows_buffer<R> gamma(1, c.mask_heads), log_a(tokens, c.mask_heads), weight(tokens, c.mask_heads);
  rows_buffer<R> kernel(c.mask_heads, distances);
  rows_buffer<R> d_gamma(1, c.mask_heads), d_log_a(tokens, c.mask_heads);
  rows_buffer<R> d_weight(tokens, c.mask_heads), d_kernel(c.mask_heads, distances);
  y.poison(), dq.poison(), dk.poison(), dx.poison();
  d_gamma.poison(), d_log_a.poison(), d_weight.poison(), d_kernel.poison();
  if (c.add) {
    dq.set(1), dk.set(1), dx.set(1);
    d_gamma.set(1), d_log_a.set(1), d_weight.set(1), d_kernel.set(1);
  }
  r.q = q.fill(1, -1, 1), r.k = k.fill(2, -1, 1);
  r.x = x.fill(3, -1, 1), r.dy = dy.fill(4, -1, 1);
  quadratic_mask<T> mask;
  quadratic_gradients<T> g;
  mask.kind = c.mask;
  mask.window = r.window;
  if (c.mask == kind::decay) {
    r.gamma = gamma.fill(5, 0.9, 1);
    mask.gamma = {gamma.data(), {c.mask_heads}, {1}};
    g.gamma = {d_gamma.data(), {c.mask_heads}, {1}};
  } else if (c.mask == kind::semiseparable) {
    log_a.fill_device(6, -0.2, 0);
    const R cut = -std::numeric_limits<R>::infinity();  // forgets all before
    SSMLIB_CHECK_CUDA(cudaMemcpy(log_a.data() + tokens / 2 * c.mask_heads, &cut, sizeof cut,
                                 cudaMemcpyHostToDevice));
    r.log_a = log_a.read();
    mask.log_a = log_a.matrix();
    g.log_a = d_log_a.mutable_matrix();
    if (c.weight) {
      r.weight = weight.fill(7, 0.1, 1);
      mask.weight = weight.matrix();
      g.weight = d_weight.mutable_matrix();
    }
  } else if (c.mask == kind::toeplitz) {
    r.kernel = kernel.fill(8, -1, 1);
    mask.kernel = kernel.matrix();
    g.kernel = d_kernel.mutable_matrix();
  }
  const buffer<index_t> offsets(r.offsets);
  quadratic_problem<T> o{{}, {}, x.heads(c.x_heads), static_cast<R>(r.alpha), c.heads};
  if (c.gram) o.q = q.heads(c.q_heads), o.k = k.heads(c.k_heads);
  o.offsets = c.rectangles > 0 ? nullptr : offsets.data();
  o.sequences = sequences;
  o.max_length = longest;
  g.x = dx.mutable_heads(c.x_heads);
  if (c.gram) g.q = dq.mutable_heads(c.q_heads), g.k = dk.mutable_heads(c.k_heads);
  g.add = c.add;
  const std::size_t bytes =
      c.associative ? gram_associative_workspace_bytes(o)
                    : std::max(masked_quadratic_workspace_bytes(o, mask),
                               c.gradients ? masked_quadratic_vjp_workspace_bytes(o, mask, g)
                                           : std::size_t{0});
  buffer<unsigned char> work(static_cast<index_t>(bytes));
  work.poison();
  if (c.associative) {
    gram_associative<T>(nullptr, o, y.mutable_heads(c.heads), work.data());
    if (c.gradients) gram_associative_vjp<T>(nullptr, o, dy.heads(c.heads), g, work.data());
  } else {
    masked_quadratic<T>(nullptr, o, mask, y.mutable_heads(c.heads), work.data());
    if (c.gradients) masked_quadratic_vjp<T>(nullptr, o, mask, dy.heads(c.heads), g, work.data());
  }
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  r.run(c.gradients);
  const double shift = c.add ? -1 : 0;
  // The heads of a group are added one by one: m of them round like a walk, 2^-23 sqrt(m).
  const double walk = 0x1p-23 * std::sqrt(static_cast<double>(c.heads / c.k_heads));
  const double bound = sizeof(T) == 2 ? 3e-3 : sizeof(T) == 4 ? 3e-6 + walk : 1e-12;
  const double more = c.add && sizeof(T) == 2 ? 3 * bound : bound;
  // Products of double decays have the rounding of their running sums.
  const double sums = sizeof(T) == 8 ? 1e-9 : 1e-5 + walk;
  results.row(c.name, type_name<T>());
  results.error("y", y.read(), r.y, sizeof(T) == 8 ? 1e-9 : bound);
  if (c.gradients) {
    const double own = sizeof(T) == 8 ? 1e-9 : more;
    if (c.gram) results.error("dq", dq.read(shift), r.dq, own);
    if (c.gram) results.error("dk", dk.read(shift), r.dk, own);
    results.error("dx", dx.read(shift), r.dx, own);
    if (g.gamma) results.error("dgamma", d_gamma.read(shift), r.d_gamma, sums);
    if (g.log_a) results.error("dlog_a", d_log_a.read(shift), r.d_log_a, sums);
    if (g.weight) results.error("dweight", d_weight.read(shift), r.d_weight, sums);
    if (g.kernel) results.error("dkernel", d_kernel.read(shift), r.d_kernel, sums);
  }
  results.end();
}

void time_all(index_t length, index_t heads, index_t size) {
  using T = bf16;
  rows_buffer<T> q(length, heads * size), k(length, heads * size), x(length, heads * size);
  rows_buffer<T> dy(length, heads * size), y(length, heads * size);
  rows_buffer<T> dq(length, heads * size), dk(length, heads * size), dx(length, heads * size);
  rows_buffer<float> log_a(length, heads), d_log_a(length, heads), d_weight(length, heads);
  rows_buffer<float> kernel(heads, length), d_kernel(heads, length);
  for (auto* r : {&q, &k, &x, &dy})
    r->fill_device(7, -1, 1);
  kernel.fill_device(7, -1, 1);
  log_a.fill_device(8, -0.1, 0);
  const quadratic_problem<T> o{
      q.heads(heads), k.heads(heads), x.heads(heads), 1.0f, heads, nullptr, 1, length};
  quadratic_mask<T> mask;
  const quadratic_gradients<T> operands{dq.mutable_heads(heads), dk.mutable_heads(heads),
                                        dx.mutable_heads(heads)};
  quadratic_gradients<T> numbers;
  const auto line = [&](const char* name, kind what) {
    mask.kind = what;
    buffer<unsigned char> work(
        static_cast<index_t>(std::max(masked_quadratic_vjp_workspace_bytes(o, mask, operands),
                                      masked_quadratic_vjp_workspace_bytes(o, mask, numbers))));
    const double f = median_ms([&](cudaStream_t s) {
      masked_quadratic<T>(s, o, mask, y.mutable_heads(heads), work.data());
    });
    const double b = median_ms([&](cudaStream_t s) {
      masked_quadratic_vjp<T>(s, o, mask, dy.heads(heads), operands, work.data());
    });
    const double m = numbers.log_a || numbers.kernel ? median_ms([&](cudaStream_t s) {
      masked_quadratic_vjp<T>(s, o, mask, dy.heads(heads), numbers, work.data());
    })
                                                     : 0.0;
    const double flops = (what == kind::none ? 4.0 : 2.0) * length * length * heads * size;
    std::printf(
        "%s T %lld heads %lld size %lld bf16: fwd %.3f ms (%.1f TFLOP/s), dq dk dx %.3f ms, "
        "mask's numbers %.3f ms\n",
        name, static_cast<long long>(length), static_cast<long long>(heads),
        static_cast<long long>(size), f, flops / f * 1e-9, b, m);
  };
  line("none", kind::none);
  line("causal", kind::causal);
  mask.log_a = log_a.matrix();
  numbers.log_a = d_log_a.mutable_matrix();
  line("semiseparable", kind::semiseparable);
  numbers.log_a = {};
  mask.kernel = kernel.matrix();
  numbers.kernel = d_kernel.mutable_matrix();
  line("toeplitz", kind::toeplitz);
  buffer<unsigned char> work(static_cast<index_t>(gram_associative_workspace_bytes(o)));
  const double f = median_ms(
      [&](cudaStream_t s) { gram_associative<T>(s, o, y.mutable_heads(heads), work.data()); });
  const double b = median_ms([&](cudaStream_t s) {
    gram_associative_vjp<T>(s, o, dy.heads(heads), operands, work.data());
  });
  std::printf("gram by associativity: fwd %.3f ms, dq dk dx %.3f ms\n", f, b);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table results;
  const std::vector<index_t> packed{0, 5, 5, 69, 199, 200, 463}, one{130};
  std::vector<quadratic_case> cases;
  const std::vector<std::pair<const char*, kind>> kinds{
      {"none", kind::none},   {"causal", kind::causal},         {"window", kind::window},
      {"decay", kind::decay}, {"semisep", kind::semiseparable}, {"toeplitz", kind::toeplitz}};
  for (const auto& [name, what] : kinds) {
    cases.push_back({name, what, packed, 0, 4, 2, 1, 4, 2, 33, 29, true, true, true, true, true});
    cases.push_back({name, what, one, 2, 3, 3, 3, 1, 1, 64, 64, true, false, false, false, true});
  }
  cases.push_back({"L alone", kind::toeplitz, packed, 0, 4, 1, 1, 2, 2, 1, 150, false, false, true,
                   false, true});
  cases.push_back({"L alone", kind::semiseparable, packed, 0, 4, 1, 1, 4, 4, 1, 7, false, true,
                   false, true, true});
  cases.push_back(
      {"many", kind::toeplitz, {3}, 70001, 1, 1, 1, 1, 1, 4, 4, true, false, false, false, true});
  cases.push_back({"heads",
                   kind::semiseparable,
                   {0, 2, 5},
                   0,
                   70001,
                   1,
                   1,
                   70001,
                   1,
                   4,
                   2,
                   true,
                   false,
                   false,
                   false,
                   true});
  cases.push_back(
      {"gram", kind::none, packed, 0, 4, 2, 1, 4, 1, 33, 129, true, false, true, true, true, true});
  cases.push_back({"gram",
                   kind::none,
                   {1500},
                   2,
                   2,
                   2,
                   2,
                   2,
                   1,
                   64,
                   64,
                   true,
                   false,
                   false,
                   false,
                   true,
                   true});
  cases.push_back({"gram many",
                   kind::none,
                   {3},
                   70001,
                   1,
                   1,
                   1,
                   1,
                   1,
                   4,
                   4,
                   true,
                   false,
                   false,
                   false,
                   true,
                   true});
  for (const auto& c : cases) {
    if (small && std::max(c.rectangles, c.heads) * c.offsets.back() > 2000) continue;
    if (all) check<double>(results, c), check<float>(results, c);
    check<bf16>(results, c);
  }
  if (small) return finish();
  const index_t long_one = (index_t{1} << 20) + 1;
  check<bf16>(results, {"long band",
                        kind::window,
                        {long_one},
                        1,
                        1,
                        1,
                        1,
                        1,
                        1,
                        8,
                        8,
                        true,
                        false,
                        false,
                        false,
                        false,
                        false});
  time_all(4096, 16, 64);
  return finish();
}
