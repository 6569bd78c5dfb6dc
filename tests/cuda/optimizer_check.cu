// Checks AdamW, the norm of the gradients and casts over many tensors on the GPU against loops on
// the CPU, then times them. Exit status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/optimizer.cuh>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

/// Tensors one after another in a few allocations; `shift` elements off a 16-byte line where odd.
template <class R>
struct model {
  std::vector<index_t> sizes, begins;
  rows_buffer<R> gradient, first, second, value;
  buffer<bf16> copy, cast;
  std::vector<adamw_tensor<R>> list;
  buffer<adamw_tensor<R>> tensors;
  buffer<index_t> firsts;
  index_t values = 0;

  model(std::vector<index_t> wanted, bool odd) : sizes(std::move(wanted)) {
    index_t n = 8;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (odd && i % 3 == 1) ++n;
      begins.push_back(n);
      values += sizes[i];
      n = odd && i % 3 == 1 ? n + sizes[i] : round_up(n + sizes[i], 8);
    }
    n = round_up(n, 8);
    gradient = rows_buffer<R>(1, n), first = rows_buffer<R>(1, n), second = rows_buffer<R>(1, n);
    value = rows_buffer<R>(1, n);
    copy = buffer<bf16>(n), cast = buffer<bf16>(n);
    copy.poison(), cast.poison();
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const index_t b = begins[i];
      list.push_back({gradient.data() + b, first.data() + b, second.data() + b, value.data() + b,
                      i % 4 == 3 ? nullptr : copy.data() + b, sizes[i], i % 2 == 0});
    }
    tensors = buffer<adamw_tensor<R>>(list);
    firsts = buffer<index_t>(first_pieces(list));
  }
  [[nodiscard]] tensor_table<adamw_tensor<R>> table() const {
    return {tensors.data(), firsts.data(), static_cast<index_t>(sizes.size()),
            first_pieces(list).back()};
  }
};

template <class R>
adamw_step<R> step_of(int t, double rate) {
  const double b1 = 0.9, b2 = 0.95;
  return {static_cast<R>(b1),
          static_cast<R>(b2),
          static_cast<R>(1 - b1),
          static_cast<R>(1 - b2),
          static_cast<R>(1 - rate * 0.1),
          static_cast<R>(rate / (1 - std::pow(b1, t))),
          static_cast<R>(1 / std::sqrt(1 - std::pow(b2, t))),
          static_cast<R>(1e-8)};
}

void expect(const char* what, bool fine) {
  if (!fine) std::printf("%s  FAILED\n", what), failed = true;
}

/// Three clipped steps: parameters and moments are those of a scalar loop to the last bit.
template <class R>
void check_adamw(table& results, const char* name, const std::vector<index_t>& sizes, bool odd,
                 double largest) {
  const char* type = sizeof(R) == 4 ? "f32" : "f64";
  model<R> m(sizes, odd);
  const auto fill = [](rows_buffer<R>& b, int seed, double low, double high) {
    const auto v = b.fill(seed, low, high);
    return std::vector<R>(v.begin(), v.end());
  };
  std::vector<R> value = fill(m.value, 2, -1, 1), first = fill(m.first, 3, -1e-3, 1e-3),
                 second = fill(m.second, 4, 0, 1e-6), gradient;
  const buffer<double> norms(3);
  const buffer<double> tokens(std::vector<double>{7});
  buffer<double> work(m.table().pieces);
  work.poison();
  double scale = 0;
  for (int t = 1; t <= 3; ++t) {
    gradient = fill(m.gradient, 10 + t, -1e-2, 1e-2);
    gradient_norm<R>(
        nullptr, m.table(),
        {norms.data(), norms.data() + 1, norms.data() + 2, 3.0, tokens.data(), largest},
        work.data());
    const auto c = step_of<R>(t, 1e-2);
    adamw<R>(nullptr, m.table(), c, norms.data() + 2);
    const auto got = norms.host();
    long double exact = 0;  // a sum of doubles one by one would be less exact than what it checks
    for (std::size_t i = 0; i < sizes.size(); ++i)
      for (index_t k = m.begins[i]; k < m.begins[i] + sizes[i]; ++k)
        exact += static_cast<long double>(gradient[k]) * static_cast<long double>(gradient[k]);
    const double sum = static_cast<double>(exact);
    const double norm = 3.0 / 7 * std::sqrt(sum);
    const double wanted = 3.0 / 7 * (largest > 0 && norm > largest ? largest / norm : 1);
    if (t == 3) {
      results.row(name, type);
      results.error("sum", {got[0]}, {sum}, 1e-13);
      results.error("norm", {got[1]}, {norm}, 1e-13);
      results.error("scale", {got[2]}, {wanted}, 1e-13);
    }
    scale = got[2];
    const R s = static_cast<R>(scale);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      for (index_t k = m.begins[i]; k < m.begins[i] + sizes[i]; ++k) {
        const R g = gradient[k] * s;
        const R more = c.rest1 * g, square = c.rest2 * g * g;
        first[k] = std::fma(c.beta1, first[k], more);
        second[k] = std::fma(c.beta2, second[k], square);
        const R size = std::fma(c.root_factor, std::sqrt(second[k]), c.epsilon);
        const R kept = (i % 2 == 0 ? c.keep : R(1)) * value[k];
        value[k] = std::fma(-c.rate, first[k] / size, kept);
      }
    }
  }
  const auto wide = [](const std::vector<R>& v) { return std::vector<double>(v.begin(), v.end()); };
  // Between the tensors nothing changes, so whole buffers are compared.
  results.error("w", m.value.read(), wide(value), 0);
  results.error("m", m.first.read(), wide(first), 0);
  results.error("v", m.second.read(), wide(second), 0);
  results.end();
  const auto copy = m.copy.host();
  bool same = true;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    for (index_t k = m.begins[i]; i % 4 != 3 && k < m.begins[i] + sizes[i]; ++k)
      same = same && copy[k] == bf16(static_cast<float>(value[k]));
  expect("the copies are the rounded values", same);
  if constexpr (std::is_same_v<R, float>) {
    std::vector<cast_tensor<float, bf16>> list;
    std::vector<cast_tensor<bf16, float>> back;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      list.push_back({m.value.data() + m.begins[i], m.cast.data() + m.begins[i], sizes[i]});
      back.push_back({m.cast.data() + m.begins[i], m.first.data() + m.begins[i], sizes[i]});
    }
    const buffer<cast_tensor<float, bf16>> entries(list);
    const buffer<cast_tensor<bf16, float>> back_entries(back);
    cast_tensors<float, bf16>(nullptr,
                              {entries.data(), m.firsts.data(), m.table().count, m.table().pieces});
    cast_tensors<bf16, float>(
        nullptr, {back_entries.data(), m.firsts.data(), m.table().count, m.table().pieces});
    const auto cast = m.cast.host();
    const auto widened = m.first.read();
    for (std::size_t i = 0; i < sizes.size(); ++i)
      for (index_t k = m.begins[i]; k < m.begins[i] + sizes[i]; ++k)
        same = same && cast[k] == bf16(value[k]) && widened[k] == static_cast<float>(cast[k]);
    expect("casts round to nearest", same);
  }
}

/// A gradient that is not finite has no finite norm and no step.
void check_refusal() {
  model<float> m({100, 5000}, false);
  for (auto* b : {&m.first, &m.second})
    b->fill_device(1, 0, 0);
  m.gradient.fill_device(1, NAN, NAN), m.value.fill_device(1, 1, 1);
  const buffer<double> norms(3);
  const buffer<double> work(m.table().pieces);
  gradient_norm<float>(nullptr, m.table(),
                       {norms.data(), norms.data() + 1, norms.data() + 2, 1, nullptr, 1.0},
                       work.data());
  adamw<float>(nullptr, m.table(), step_of<float>(1, 1e-2), norms.data() + 2);
  const auto w = m.value.read();
  expect("no step from a gradient that is not finite",
         std::all_of(w.begin(), w.end(), [](double x) { return x == 1; }) &&
             !std::isfinite(norms.host()[1]));
  adamw<float>(nullptr, {nullptr, nullptr, 0, 0}, step_of<float>(1, 1e-2), nullptr);
  gradient_norm<float>(nullptr, {nullptr, nullptr, 0, 0}, {norms.data()}, nullptr);
  expect("no tensors have the norm 0", norms.host()[0] == 0);
}

void time_model(const char* name, const std::vector<index_t>& sizes, double copy) {
  model<float> m(sizes, false);
  m.gradient.fill_device(1, -1e-2, 1e-2), m.value.fill_device(2, -1, 1);
  m.first.fill_device(3, -1e-3, 1e-3), m.second.fill_device(4, 0, 1e-6);
  const buffer<double> norms(3);
  const buffer<double> work(m.table().pieces);
  const auto table = m.table();
  const auto n = static_cast<double>(m.values);
  double copies = 0;
  for (const auto& t : m.list)
    copies += t.copy ? 2.0 * t.size : 0;
  std::vector<cast_tensor<float, bf16>> list;
  for (const auto& t : m.list)
    list.push_back({t.value, m.cast.data() + (t.value - m.value.data()), t.size});
  const buffer<cast_tensor<float, bf16>> entries(list);
  const double norm = median_ms([&](cudaStream_t s) {
    gradient_norm<float>(s, table,
                         {norms.data(), norms.data() + 1, norms.data() + 2, 1.0, nullptr, 1.0},
                         work.data());
  });
  const double step = median_ms(
      [&](cudaStream_t s) { adamw<float>(s, table, step_of<float>(10, 1e-4), norms.data() + 2); });
  const double cast = median_ms([&](cudaStream_t s) {
    cast_tensors<float, bf16>(s, {entries.data(), table.first, table.count, table.pieces});
  });
  const auto share = [&](double bytes, double ms) { return 100 * bytes / copy * 1e3 / ms; };
  std::printf(
      "%s, %.0fM values in %zu tensors: norm %.3f ms (%.0f%% of copy), adamw with copies %.3f ms "
      "(%.0f%%), cast %.3f ms (%.0f%%)\n",
      name, n / 1e6, sizes.size(), norm, share(4 * n, norm), step, share(28 * n + copies, step),
      cast, share(6 * n, cast));
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv);
  table results;
  std::vector<index_t> many{1, 3, 8192, 8193, 0, 100000, 4, 16384, 77, 0};
  for (int i = 0; i < 700; ++i)
    many.push_back(1 + 37 * (i % 29));
  for (const bool odd : {false, true}) {
    check_adamw<float>(results, odd ? "odd" : "aligned", many, odd, 0.001);
    check_adamw<double>(results, odd ? "odd" : "aligned", many, odd, 0);
  }
  check_adamw<float>(results, "one", {1}, false, 0);
  check_refusal();
  if (small) return finish();
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  std::vector<index_t> few, large{index_t{50304} * 2048};
  for (int layer = 0; layer < 24; ++layer)
    for (index_t n : {768 * 3352, 1536 * 768, 1536 * 4, 1536, 24, 24, 24, 768})
      few.push_back(n);
  for (int layer = 0; layer < 16; ++layer)
    for (index_t n : {2048 * 8512, 4096 * 2048, 4096 * 4, 4096, 64, 64, 64, 2048})
      large.push_back(n);
  time_model("small", few, copy);
  time_model("large", large, copy);
  return finish();
}
