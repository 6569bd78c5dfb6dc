#include "ceilings.hpp"

#include <ssmlib/kernels/cpu/gemm.hpp>
#include <ssmlib/kernels/cpu/simd.hpp>

#if defined(SSMLIB_BENCH_CBLAS)
#include <cblas.h>
#endif

#include <chrono>
#include <cstring>
#include <thread>

namespace bench {

namespace {

constexpr index_t gemm_size = 1024;
constexpr double gemm_flops = 2.0 * gemm_size * gemm_size * gemm_size;
constexpr index_t exps_a_task = 4096, exp_passes = 64, exp_tasks = 64;
constexpr index_t copied = index_t{64} << 20;  // bytes: beyond any cache

timed_case gemm_case(session& s, int threads) {
  return {.name = "ceiling/gemm/threads" + std::to_string(threads),
          .work = {gemm_flops, unit::flops},
          .prepare =
              [&ctx = s.context(threads)] {
                const auto a = filled<2>({gemm_size, gemm_size}, -1, 1, 1);
                const auto b = filled<2>({gemm_size, gemm_size}, -1, 1, 2);
                const ssm::tensor<float, 2> c(gemm_size, gemm_size);
                return [=, &ctx] {
                  ssm::kernels::gemm<float>(ctx, 1.0f, a.const_view(), b.const_view(), 0.0f,
                                            c.view());
                };
              },
          .repetitions = 3 * s.options().repetitions};
}

#if defined(SSMLIB_BENCH_CBLAS)
timed_case blas_case(session& s, int threads) {
  return {.name = "ceiling/openblas/threads" + std::to_string(threads),
          .work = {gemm_flops, unit::flops},
          .prepare =
              [threads] {
                openblas_set_num_threads(threads);
                const auto a = filled<2>({gemm_size, gemm_size}, -1, 1, 1);
                const auto b = filled<2>({gemm_size, gemm_size}, -1, 1, 2);
                const ssm::tensor<float, 2> c(gemm_size, gemm_size);
                return [=] {
                  const auto n = static_cast<int>(gemm_size);
                  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1.0f, a.data(), n,
                              b.data(), n, 0.0f, c.data(), n);
                };
              },
          .repetitions = 3 * s.options().repetitions,
          // Its threads spin for a while after a product; they must not run into the next case.
          .clean_up = [] { std::this_thread::sleep_for(std::chrono::milliseconds(80)); }};
}
#endif

timed_case exp_case(session& s) {
  return {
      .name = "ceiling/exp",
      .work = {static_cast<double>(exps_a_task * exp_passes * exp_tasks), unit::exps},
      .prepare =
          [&ctx = s.context()] {
            const auto x = filled<2>({exp_tasks, exps_a_task}, -8, 0, 3);
            const ssm::tensor<float, 2> y(exp_tasks, exps_a_task);
            return [=, &ctx] {
              ctx.parallel_for(exp_tasks, [&](index_t task) {
                using pack = ssm::simd::pack<float>;
                const float* from = &x(task, 0);
                float* to = &y(task, 0);
                for (index_t pass = 0; pass < exp_passes; ++pass) {
                  for (index_t i = 0; i < exps_a_task; i += 2 * pack::width) {
                    ssm::simd::exp(pack::load(from + i)).store(to + i);
                    ssm::simd::exp(pack::load(from + i + pack::width)).store(to + i + pack::width);
                  }
                  asm volatile("" : : "r"(to) : "memory");  // every pass is wanted
                }
              });
            };
          },
      .repetitions = 3 * s.options().repetitions};
}

timed_case copy_case(session& s) {
  return {
      .name = "ceiling/copy", .work = {2.0 * copied, unit::bytes}, .prepare = [&ctx = s.context()] {
        const auto x = filled<1>({copied / 4}, -1, 1, 4);
        const ssm::tensor<float, 1> y(copied / 4);
        return [=, &ctx] {
          ctx.parallel_ranges(copied, 64, 4096, [&](index_t begin, index_t end) {
            std::memcpy(reinterpret_cast<char*>(y.data()) + begin,
                        reinterpret_cast<const char*>(x.data()) + begin,
                        static_cast<std::size_t>(end - begin));
          });
        };
      }};
}

}  // namespace

void add_ceilings(session& s) {
  const int n = s.options().threads;
  s.add(gemm_case(s, n), true);
  if (n > 1) s.add(gemm_case(s, 1), true);
#if defined(SSMLIB_BENCH_CBLAS)
  s.add(blas_case(s, n), true);
  if (n > 1) s.add(blas_case(s, 1), true);
#endif
  s.add(exp_case(s), true);
  s.add(copy_case(s), true);
}

ceilings measured_ceilings(const session& s) {
  const auto rate = [&](const std::string& name) {
    const timing t = s.time_of("ceiling/" + name);
    return t ? s.find("ceiling/" + name)->work.amount / t.median : 0.0;
  };
  const std::string all = "/threads" + std::to_string(s.options().threads);
  return {.gemm_1 = rate("gemm/threads1"),
          .gemm_n = rate("gemm" + all),
          .blas_1 = rate("openblas/threads1"),
          .blas_n = rate("openblas" + all),
          .exps = rate("exp"),
          .copy = rate("copy")};
}

}  // namespace bench
