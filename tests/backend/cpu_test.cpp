#include "support/catch.hpp"
#include <ssmlib/backend/cpu.hpp>

#include <atomic>
#include <numeric>
#include <vector>

using namespace ssm;

TEST_CASE("backend/cpu: a parallel loop runs every task once", "[backend][cpu][threads]") {
  const int threads = GENERATE(1, 2, 3);
  const cpu::context ctx(threads);
  for (int repeat = 0; repeat < 300; ++repeat) {
    std::vector<std::atomic<int>> runs(17);
    ctx.parallel_for(17, [&](index_t i) { ++runs[static_cast<std::size_t>(i)]; });
    for (const auto& r : runs)
      REQUIRE(r == 1);
  }
}

TEST_CASE("backend/cpu: loops nest and may be empty", "[backend][cpu][threads]") {
  const cpu::context ctx(2);
  std::atomic<int> count{0};
  ctx.parallel_for(4, [&](index_t) { ctx.parallel_for(5, [&](index_t) { ++count; }); });
  ctx.parallel_for(0, [&](index_t) { ++count; });
  CHECK(count == 20);
}

TEST_CASE("backend/cpu: the first exception of a task reaches the caller, and the pool lives on",
          "[backend][cpu][threads]") {
  const cpu::context ctx(2);
  CHECK_THROWS_AS(ctx.parallel_for(8,
                                   [](index_t i) {
                                     if (i == 5) throw value_error("five");
                                   }),
                  value_error);
  std::atomic<int> count{0};
  ctx.parallel_for(8, [&](index_t) { ++count; });
  CHECK(count == 8);
}

TEST_CASE("backend/cpu: ranges cover everything in multiples of the step", "[backend][cpu]") {
  const cpu::context ctx(2);
  std::vector<int> seen(103);
  ctx.parallel_ranges(103, 7, 8, [&](index_t begin, index_t end) {
    CHECK(begin % 8 == 0);
    for (index_t i = begin; i < end; ++i)
      ++seen[static_cast<std::size_t>(i)];
  });
  CHECK(std::accumulate(seen.begin(), seen.end(), 0) == 103);
  CHECK(*std::min_element(seen.begin(), seen.end()) == 1);
}

TEST_CASE("backend/cpu: a context of no threads is refused", "[backend][cpu][error]") {
  CHECK_THROWS_AS(cpu::context(0), value_error);
}

TEST_CASE("backend/cpu_memory: repeated sizes are served from the cache", "[backend][memory]") {
  auto& pool = cpu_memory_pool::instance();
  { const scratch<float> warm(12345); }
  const auto before = pool.stats();
  for (int i = 0; i < 100; ++i) {
    const scratch<float> again(12345);
    again[12344] = 1;
  }
  const auto after = pool.stats();
  CHECK(after.system_allocations == before.system_allocations);
  CHECK(after.in_use == before.in_use);
}

TEST_CASE("backend/cpu_memory: a block wastes at most a quarter and is aligned",
          "[backend][memory]") {
  auto& pool = cpu_memory_pool::instance();
  for (const std::size_t bytes : {std::size_t{300}, std::size_t{5000}, std::size_t{1 << 20},
                                  std::size_t{(1 << 20) + 1}, std::size_t{7777777}}) {
    const std::size_t before = pool.stats().in_use;
    void* block = pool.allocate(bytes);
    const std::size_t taken = pool.stats().in_use - before;
    CHECK(taken >= bytes);
    CHECK(double(taken) <= 1.25 * double(bytes) + 256);
    CHECK(reinterpret_cast<std::uintptr_t>(block) % cpu_memory_pool::alignment == 0);
    pool.deallocate(block, bytes);
  }
}

TEST_CASE("backend/cpu_memory: an impossible request is an error that names its size",
          "[backend][memory][error]") {
  auto& pool = cpu_memory_pool::instance();
  const std::size_t before = pool.stats().in_use;
  CHECK_THROWS_WITH((void)pool.allocate(std::size_t{1} << 60),
                    ssm_test::contains("1152921504606846976 bytes"));
  CHECK(pool.stats().in_use == before);
}
