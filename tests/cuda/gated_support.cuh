#pragma once

#include "check.cuh"
#include <ssmlib/kernels/cuda/gated_linear.hpp>

#include <cstdint>
#include <limits>
#include <numeric>

/// @file
/// What the GPU checks of gated linear attention and the delta rule share: operands that live on
/// both sides, cases, and the state of one head in float64.

namespace ssm::cuda_check {

struct random_numbers {
  std::uint64_t state;
  double next() {
    state += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
};

/// (rows, groups, width) on the device, each row followed by `pad` numbers of no one's, and the
/// same numbers, rounded to T, in float64.
template <class T>
struct operand {
  index_t rows, groups, width, pad;
  std::vector<double> host;
  buffer<T> device;

  operand(index_t r, index_t g, index_t w, index_t padding = 0)
      : rows(r), groups(g), width(w), pad(padding), host(r * g * w) {}
  [[nodiscard]] index_t stride() const { return groups * width + pad; }

  void random(std::uint64_t seed, double low, double high) {
    random_numbers numbers{seed};
    for (double& x : host)
      x = to_double(from_double<T>(low + (high - low) * numbers.next()));
  }
  void fill(double x) { std::fill(host.begin(), host.end(), x); }
  void upload() {
    std::vector<T> all(rows * stride() + pad, from_double<T>(0.5));
    for (index_t r = 0; r < rows; ++r)
      for (index_t c = 0; c < groups * width; ++c)
        all[pad + r * stride() + c] = from_double<T>(host[r * groups * width + c]);
    device = buffer<T>(all);
  }
  void poison() {
    device = buffer<T>(rows * stride() + pad);
    device.poison();
  }
  [[nodiscard]] std::vector<double> read(double shift = 0) const {
    const auto all = device.host();
    std::vector<double> v(rows * groups * width);
    for (index_t r = 0; r < rows; ++r)
      for (index_t c = 0; c < groups * width; ++c)
        v[r * groups * width + c] = to_double(all[pad + r * stride() + c]) + shift;
    return v;
  }
  [[nodiscard]] view<T, 3> mutable_rows() const {
    return {device.data() + pad, {rows, groups, width}, {stride(), width, 1}};
  }
  [[nodiscard]] view<const T, 3> get() const { return mutable_rows(); }
  [[nodiscard]] view<T, 2> mutable_column() const {
    return {device.data() + pad, {rows, groups}, {stride(), 1}};
  }
  [[nodiscard]] view<const T, 2> column() const { return mutable_column(); }
  /// A row as seen by head h.
  [[nodiscard]] const double* at(index_t row, index_t h, index_t heads) const {
    return &host[(row * groups + h * groups / heads) * width];
  }
};

struct gated_case {
  const char* name;
  std::vector<index_t> lengths;
  index_t heads, groups, keys, features;
  bool packed = true;
  bool strong = false;  ///< gates from 1 to e^-20, and exact resets
  bool slices = false;  ///< rows that nothing aligns
  bool add = false;
  bool states = true;  ///< initial and final

  [[nodiscard]] std::vector<index_t> offsets() const {
    std::vector<index_t> o{0};
    for (index_t n : lengths)
      o.push_back(o.back() + n);
    return o;
  }
  [[nodiscard]] index_t tokens() const { return offsets().back(); }
  [[nodiscard]] index_t sequences() const { return static_cast<index_t>(lengths.size()); }
};

template <class T>
struct states_buffer {
  index_t sequences, heads, keys, features;
  operand<T> data;
  states_buffer(index_t s, index_t h, index_t n, index_t p)
      : sequences(s), heads(h), keys(n), features(p), data(s, h, n * p) {}
  [[nodiscard]] view<T, 4> get() const {
    return {data.device.data(),
            {sequences, heads, keys, features},
            {heads * keys * features, keys * features, features, 1}};
  }
};

template <class T>
[[nodiscard]] const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}

/// Random gates: mild, or strong with resets of -infinity.
template <class R>
void random_gates(operand<R>& gates, std::uint64_t seed, bool strong) {
  gates.random(seed, strong ? -20 : -0.2, 0);
  if (!strong) return;
  random_numbers numbers{seed + 1};
  for (double& x : gates.host) {
    const double u = numbers.next();
    if (u < 0.02) x = -std::numeric_limits<double>::infinity();
    if (u > 0.5) x = to_double(from_double<R>(x * 0.01));
  }
}

/// Where two buffers differ in a bit.
template <class T>
[[nodiscard]] index_t different_bits(const std::vector<T>& a, const std::vector<T>& b) {
  index_t count = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    count += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  return count;
}

inline void expect(bool fine, const char* what) {
  std::printf("%s%s\n", what, fine ? "" : "  FAILED");
  failed = failed || !fine;
}

inline const std::vector<gated_case>& gated_cases() {
  static const std::vector<gated_case> cases{
      {"64x64", {100, 64}, 2, 2, 64, 64},
      {"128x128", {200, 129, 0, 1}, 4, 2, 128, 128, true, false, false, true},
      {"256x256", {130}, 1, 1, 256, 256, false},
      {"192x96", {77, 65}, 2, 1, 192, 96, true, false, false, true},
      {"odd", {33, 0, 70}, 3, 1, 37, 21, true, false, true, true},
      {"tiny", {5, 1, 17}, 2, 2, 1, 1, true, false, false, false, false},
      {"strong", {150, 90}, 2, 2, 64, 64, true, true},
      {"strong odd", {100}, 2, 1, 100, 72, false, true, true},
      {"batch", {40, 40, 40}, 2, 2, 64, 128, false, false, false, false, false},
      {"wide out", {70}, 2, 2, 16, 320, true, false, false, true},
  };
  return cases;
}
/// Enough heads to fill the card, which takes other kernels.
inline std::vector<gated_case> full_cases() {
  std::vector<index_t> lengths(14, 70);
  lengths[3] = 0, lengths[7] = 200;
  return {{"full 128", lengths, 16, 8, 128, 64, true, false, false, true},
          {"full 60", lengths, 16, 16, 60, 100}};
}
inline gated_case long_case() {
  return {"2^20+1", {(index_t{1} << 20) + 1}, 1, 1, 8, 4};
}
inline gated_case many_case() {
  return {"70001 x 3", std::vector<index_t>(70001, 3), 1, 1, 4, 8, true, false, false, false,
          false};
}

}  // namespace ssm::cuda_check
