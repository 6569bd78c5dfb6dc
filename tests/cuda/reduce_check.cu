// Checks reductions of rows on the GPU against float64 loops on the CPU, then times them. Exit
// status 0: all pass, 1: a failure, 2: no device.

#include "check.cuh"
#include <ssmlib/kernels/cuda/reduce.cuh>

#include <limits>

using namespace ssm;
using namespace ssm::kernels::cuda;
using namespace ssm::cuda_check;

namespace {

template <class T>
const char* type_name() {
  return sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64";
}

template <class T>
view<T, 4> rows_view(rows_buffer<T>& b, index_t rows, index_t length) {
  const view<T, 2> m = b.mutable_matrix();
  return {m.data, {1, 1, rows, length}, {0, 0, m.strides[0], 1}};
}
std::vector<double> ones(index_t n) {
  return std::vector<double>(static_cast<std::size_t>(n), 1.0);
}

/// @param pad   numbers between the rows of gradients, and before x, so that it is not aligned
template <class T>
void check(table& results, const std::string& name, index_t rows, index_t length, index_t pad) {
  const index_t n = rows * length;
  rows_buffer<T> all(1, n, pad), gradients(1, n, pad), small(1, rows), y(1, rows), out(1, n, pad),
      dx(rows, length, pad), back(rows, length, pad), peaks(rows, length, pad);
  const auto x = all.fill(1, 0, 1), dy = gradients.fill(2, -1, 1), d = small.fill(3, -1, 1);
  std::vector<double> sums(rows), largest(rows), soft(n), d_soft = ones(n), d_max = ones(n),
                                                          d_sum = ones(n);
  parallel(rows, [&](index_t r) {
    const double* row = &x[r * length];
    index_t at = 0;
    long double sum = 0, total = 0, dot = 0;
    for (index_t i = 0; i < length; ++i) {
      sum += row[i];
      if (row[i] > row[at]) at = i;
    }
    sums[r] = static_cast<double>(sum / 3);
    largest[r] = row[at];
    d_max[r * length + at] += d[r];
    for (index_t i = 0; i < length; ++i)
      total += soft[r * length + i] = std::exp(row[i] - row[at]);
    for (index_t i = 0; i < length; ++i) {
      soft[r * length + i] = static_cast<double>(soft[r * length + i] / total);
      dot += soft[r * length + i] * dy[r * length + i];
    }
    for (index_t i = 0; i < length; ++i) {
      d_soft[r * length + i] +=
          soft[r * length + i] * static_cast<double>(dy[r * length + i] - dot);
      d_sum[r * length + i] += d[r] / 3;
    }
  });
  const row_problem<T> p{all.data(), rows, length};
  buffer<unsigned char> work(static_cast<index_t>(row_workspace_bytes(rows, length)));
  const double bound = sizeof(T) == 2 ? 4e-3 : sizeof(T) == 4 ? 1e-6 : 1e-14;
  results.row(name, type_name<T>());
  work.poison(), y.poison();
  sum_rows<T>(nullptr, p, 1.0 / 3, y.data(), work.data());
  results.error("sum", y.read(), sums, bound);
  y.poison(), work.poison();
  max_rows<T>(nullptr, p, y.data(), work.data());
  results.error("max", y.read(), largest, 0);
  dx.set(1), work.poison();
  add_to_rows<T>(nullptr, small.data(), 1.0 / 3, rows_view(dx, rows, length));
  results.error("dsum", dx.read(), d_sum, bound);
  peaks.set(1);
  max_rows_vjp<T>(nullptr, p, small.data(), rows_view(peaks, rows, length), work.data());
  results.error("dmax", peaks.read(), d_max, bound);
  out.poison(), work.poison();
  softmax_rows<T>(nullptr, p, out.data(), work.data());
  const auto soft_read = out.read();
  results.error("softmax", soft_read, soft, bound);
  back.set(1), work.poison();
  softmax_rows_vjp<T>(nullptr, {out.data(), rows, length}, gradients.data(),
                      rows_view(back, rows, length), work.data());
  results.error("dsoftmax", back.read(), d_soft, bound);
  SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
  for (int i = 0; i < 20; ++i) {
    rows_buffer<T> again(1, n, pad), s(1, rows);
    softmax_rows<T>(nullptr, p, again.data(), work.data());
    sum_rows<T>(nullptr, p, 1.0 / 3, s.data(), work.data());
    sum_rows<T>(nullptr, p, 1.0 / 3, y.data(), work.data());
    if (again.read() != soft_read || s.read() != y.read()) {
      std::printf("%s %s: a repeat has other bits\n", name.c_str(), type_name<T>());
      failed = true;
      break;
    }
  }
  results.end();
}

/// Infinities and NaN: what the CPU gives.
template <class T>
void check_special() {
  const auto inf = std::numeric_limits<double>::infinity();
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  for (const index_t length : {5, 3000, 300000}) {
    std::vector<T> x(3 * length, from_double<T>(-inf));
    x[2] = x[4] = from_double<T>(1);                                           // row 0: two largest
    x[length + 1] = from_double<T>(inf), x[length + 3] = from_double<T>(nan);  // row 1
    const buffer<T> from(x), dy(std::vector<T>(3, from_double<T>(2)));         // row 2: -inf only
    buffer<T> y(3), soft(3 * length), dx(std::vector<T>(3 * length, from_double<T>(0)));
    buffer<unsigned char> work(static_cast<index_t>(row_workspace_bytes(index_t{3}, length)));
    const row_problem<T> p{from.data(), 3, length};
    max_rows<T>(nullptr, p, y.data(), work.data());
    max_rows_vjp<T>(nullptr, p, dy.data(), {dx.data(), {1, 1, 3, length}, {0, 0, length, 1}},
                    work.data());
    softmax_rows<T>(nullptr, p, soft.data(), work.data());
    const auto m = y.host(), d = dx.host(), s = soft.host();
    const auto at = [&](const std::vector<T>& v, index_t i) { return to_double(v[i]); };
    const bool fine = at(m, 0) == 1 && std::isnan(at(m, 1)) && at(m, 2) == -inf && at(d, 2) == 2 &&
                      at(d, 4) == 0 && at(d, length + 3) == 2 && at(d, length + 1) == 0 &&
                      at(d, 2 * length) == 2 && at(s, 2) == 0.5 && at(s, 4) == 0.5 &&
                      at(s, 0) == 0 && std::isnan(at(s, length)) && std::isnan(at(s, 2 * length));
    if (!fine) {
      std::printf("infinities and NaN in rows of %lld %s: FAILED\n", static_cast<long long>(length),
                  type_name<T>());
      failed = true;
    }
  }
}

__global__ void fill_ones(float* x, index_t n) {
  const index_t step = index_t{gridDim.x} * blockDim.x;
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step)
    x[i] = i == n - 3 ? 2.0f : 1.0f;
}
/// More than 2^31 elements: one row, and many.
void check_large() {
  const index_t n = (index_t{1} << 31) + 24;
  buffer<float> x(n), y(index_t{1} << 28), soft(n);
  buffer<unsigned char> work(static_cast<index_t>(row_workspace_bytes(index_t{1}, n)));
  fill_ones<<<1024, 256>>>(x.data(), n);
  SSMLIB_CHECK_CUDA(cudaGetLastError());
  const auto one = [&] {
    float v = 0;
    SSMLIB_CHECK_CUDA(cudaMemcpy(&v, y.data(), sizeof v, cudaMemcpyDeviceToHost));
    return static_cast<double>(v);
  };
  sum_rows<float>(nullptr, {x.data(), 1, n}, 1.0, y.data(), work.data());
  bool fine = one() == static_cast<double>(static_cast<float>(static_cast<double>(n) + 1));
  max_rows<float>(nullptr, {x.data(), 1, n}, y.data(), work.data());
  fine = fine && one() == 2.0;
  SSMLIB_CHECK_CUDA(cudaMemset(soft.data(), 0, n * sizeof(float)));
  max_rows_vjp<float>(nullptr, {x.data(), 1, n}, y.data(),
                      {soft.data(), {1, 1, 1, n}, {n, n, n, 1}}, work.data());
  float at = 0;
  SSMLIB_CHECK_CUDA(cudaMemcpy(&at, soft.data() + n - 3, sizeof at, cudaMemcpyDeviceToHost));
  fine = fine && at == 2.0f;
  softmax_rows<float>(nullptr, {x.data(), 1, n}, soft.data(), work.data());
  SSMLIB_CHECK_CUDA(cudaMemcpy(&at, soft.data() + n - 1, sizeof at, cudaMemcpyDeviceToHost));
  const double wanted = std::exp(-1.0) / ((static_cast<double>(n) - 1) * std::exp(-1.0) + 1);
  fine = fine && std::abs(at / wanted - 1) < 1e-6;
  const index_t rows = index_t{1} << 28;  // of 8
  sum_rows<float>(nullptr, {x.data(), rows, 8}, 0.5, y.data(), work.data());
  float last = 0;
  SSMLIB_CHECK_CUDA(cudaMemcpy(&last, y.data() + rows - 1, sizeof last, cudaMemcpyDeviceToHost));
  fine = fine && last == 4.0f;
  softmax_rows<float>(nullptr, {x.data(), rows, 8}, soft.data(), work.data());
  SSMLIB_CHECK_CUDA(
      cudaMemcpy(&last, soft.data() + 8 * rows - 1, sizeof last, cudaMemcpyDeviceToHost));
  fine = fine && last == 0.125f;
  std::printf("2^31 + 24 elements: %s\n", fine ? "ok" : "FAILED");
  failed = failed || !fine;
}

template <class T>
void time_one(index_t rows, index_t length, double copy) {
  const index_t n = rows * length;
  rows_buffer<T> x(1, n), y(1, n), dx(1, n);
  rows_buffer<T> small(1, rows);
  x.fill_device(1, -1, 1), y.fill_device(2, 0, 1), dx.fill_device(3, -1, 1);
  small.fill_device(4, -1, 1);
  buffer<unsigned char> work(static_cast<index_t>(row_workspace_bytes(rows, length)));
  const row_problem<T> p{x.data(), rows, length};
  const view<T, 4> to{dx.data(), {1, 1, rows, length}, {0, 0, length, 1}};
  const double floor = static_cast<double>(n) * sizeof(T) / copy * 1e3;  // ms for one pass
  const auto report = [&](const char* what, double passes, double ms) {
    std::printf(" %s %.0f us (%.0f %%)", what, 1e3 * ms, 100 * passes * floor / ms);
  };
  std::printf("%8lld x %8lld %s:", static_cast<long long>(rows), static_cast<long long>(length),
              type_name<T>());
  report("sum", 1,
         median_ms([&](cudaStream_t s) { sum_rows<T>(s, p, 1.0, small.data(), work.data()); }));
  report("max", 1,
         median_ms([&](cudaStream_t s) { max_rows<T>(s, p, small.data(), work.data()); }));
  report("dsum", 2, median_ms([&](cudaStream_t s) { add_to_rows<T>(s, small.data(), 1.0, to); }));
  report("softmax", 2,
         median_ms([&](cudaStream_t s) { softmax_rows<T>(s, p, y.data(), work.data()); }));
  report("dsoftmax", 4, median_ms([&](cudaStream_t s) {
           softmax_rows_vjp<T>(s, {y.data(), rows, length}, x.data(), to, work.data());
         }));
  std::printf("\n");
}

}  // namespace

int main() {
  if (!have_device()) return 2;
  table results;
  struct shape_case {
    index_t rows, length, pad;
  };
  for (const auto& [rows, length, pad] : {shape_case{7, 1, 0},
                                          {1009, 3, 1},
                                          {70001, 7, 0},
                                          {300, 64, 0},
                                          {33, 250, 3},
                                          {40, 1024, 8},
                                          {9, 4099, 0},
                                          {5, 8192, 0},
                                          {3, 30011, 1},
                                          {2, 300000, 0},
                                          {1, 1000003, 0}}) {
    const std::string name = std::to_string(rows) + " x " + std::to_string(length);
    check<double>(results, name, rows, length, pad);
    check<float>(results, name, rows, length, pad);
    check<bf16>(results, name, rows, length, pad);
  }
  check_special<double>();
  check_special<float>();
  check_special<bf16>();
  check_large();
  const double copy = copy_bandwidth();
  std::printf(
      "device copy %.2f TB/s; in brackets the share of its time for what is read and "
      "written at least\n",
      copy / 1e12);
  time_one<bf16>(1 << 22, 64, copy);
  time_one<bf16>(1 << 16, 4096, copy);
  time_one<bf16>(4096, 65536, copy);
  time_one<bf16>(1, 1 << 28, copy);
  time_one<float>(1 << 21, 64, copy);
  time_one<float>(1 << 15, 4096, copy);
  time_one<float>(1 << 15, 4095, copy);
  time_one<float>(1024, 131072, copy);
  time_one<float>(1, 1 << 27, copy);
  return finish();
}
