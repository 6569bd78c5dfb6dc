#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <thread>
#include <vector>

namespace {

using namespace ssm;
using ssm_test::contains;

// What came back from the device, for comparison with ==.
template <class T, int R, class B>
std::vector<T> elements_of(const tensor<T, R, B>& t) {
  const tensor<T, R> host = ssm::detail::on_host(t).contiguous();
  return {host.data(), host.data() + host.size()};
}

tensor<float, 3> numbers(index_t a, index_t b, index_t c) {
  return uniform<float, 3>({a, b, c}, -1.0, 1.0, 7);
}

}  // namespace

TEST_CASE("cuda/backend: a tensor comes back from the device as it went", "[cuda][backend]") {
  const auto host = numbers(3, 5, 7);
  const auto there = to<cuda>(host);
  CHECK(elements_of(there) == elements_of(host));
  CHECK(elements_of(there.slice(2, 2, 6)) == elements_of(host.slice(2, 2, 6)));
  CHECK(elements_of(to<cuda>(host.slice(1, 1, 4))) == elements_of(host.slice(1, 1, 4)));
  CHECK_FALSE(to<cuda>(tensor<float, 2>{}));
  CHECK(to<cuda>(tensor<float, 2>(0, 4)).extent(1) == 4);
}

TEST_CASE("cuda/backend: strided copies, fills and sums are those of the CPU", "[cuda][backend]") {
  const auto host = numbers(4, 6, 10);
  const auto there = to<cuda>(host);
  const auto part = host.slice(1, 1, 5).slice(2, 3, 8);
  const auto part_there = there.slice(1, 1, 5).slice(2, 3, 8);
  CHECK(elements_of(part_there.clone()) == elements_of(part));
  part.fill(2.5f);
  part_there.fill(2.5f);
  ssm::detail::add_to(part, part.clone());
  ssm::detail::add_to(part_there, part_there.clone());
  CHECK(elements_of(there) == elements_of(host));
  CHECK(elements_of(tensor<double, 2, cuda>::zeros(3, 4)) == std::vector<double>(12, 0.0));
  CHECK_THROWS_AS(there.copy_from(there.slice(0, 0, 1)), shape_error);
}

TEST_CASE("cuda/backend: bf16 sums are rounded once", "[cuda][backend]") {
  const auto a = cast<bf16>(numbers(2, 3, 50)), b = cast<bf16>(numbers(3, 2, 50).reshape(2, 3, 50));
  const auto sum = to<cuda>(a);
  ssm::detail::add_to(sum, to<cuda>(b));
  std::vector<bf16> wanted;
  for (index_t i = 0; i < a.size(); ++i)
    wanted.push_back(bf16(float(a.data()[i]) + float(b.data()[i])));
  CHECK(elements_of(sum) == wanted);
}

TEST_CASE("cuda/backend: memory returns to the pool and is counted", "[cuda][backend]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  const auto before = ctx.memory().in_use;
  {
    const tensor<float, 1, cuda> block(1 << 20);
    CHECK(ctx.memory().in_use - before >= (std::size_t{4} << 20));
  }
  ctx.synchronize();
  CHECK(ctx.memory().in_use == before);
  CHECK(ctx.memory().cached >= (std::size_t{4} << 20));
  ctx.trim();
  CHECK(ctx.memory().cached == 0);
}

TEST_CASE("cuda/backend: a full card is an error with numbers, and the context goes on",
          "[cuda][backend]") {
  const cuda::context ctx;
  const cuda::scope scope(ctx);
  std::vector<tensor<float, 1, cuda>> held;
  constexpr index_t gib = index_t{1} << 28;  // floats
  const auto fill = [&] {
    for (;;)
      held.emplace_back(gib);
  };
  CHECK_THROWS_WITH(fill(), contains("1073741824 bytes") && contains("bytes free") &&
                                contains("use a smaller batch"));
  CHECK(held.size() >= 1);
  CHECK_THROWS_AS((tensor<float, 1, cuda>(index_t{1} << 50)), backend_error);
  held.clear();
  const auto host = numbers(2, 3, 4);
  CHECK(elements_of(to<cuda>(host, ctx)) == elements_of(host));
  ctx.trim();
}

TEST_CASE("cuda/backend: a device that is not there is refused by name", "[cuda][backend]") {
  CHECK_THROWS_WITH(cuda::context(99), contains("device 99") && contains("there"));
}

TEST_CASE("cuda/backend: two threads with a context each compute what one does",
          "[cuda][backend]") {
  const auto work = [](std::vector<float>& result) {
    const cuda::context ctx;
    const cuda::scope scope(ctx);
    auto t = to<cuda>(numbers(8, 64, 33), ctx);
    for (int i = 0; i < 200; ++i) {
      ssm::detail::add_to(t.slice(2, 0, 16), t.slice(2, 17, 33));
      t = t.clone();
    }
    result = elements_of(t);
  };
  std::vector<float> alone, first, second;
  work(alone);
  std::thread other([&] { work(second); });
  work(first);
  other.join();
  CHECK(first == alone);
  CHECK(second == alone);
}

TEST_CASE("cuda/backend: scopes nest, and outside of them the default context is current",
          "[cuda][backend]") {
  const cuda::context a, b;
  {
    const cuda::scope in_a(a);
    {
      const cuda::scope in_b(b);
      CHECK(cuda::current().stream() == b.stream());
    }
    CHECK(cuda::current().stream() == a.stream());
  }
  CHECK(cuda::current().stream() == default_context<cuda>().stream());
}
