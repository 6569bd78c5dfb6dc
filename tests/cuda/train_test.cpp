#include "support/catch.hpp"
#include "support/gradient_check.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/ssmlib.hpp>

#include <atomic>
#include <chrono>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace ssm;
using ssm_test::relative_error;
using ids_tensor = tensor<std::int32_t, 2>;

/// What T holds of these numbers.
template <class T, int R>
tensor<double, R> rounded(const tensor<double, R>& t) {
  return cast<double>(cast<T>(t));
}
/// Relative errors in norm. For bf16 the results and, through a head, the logits are rounded: each
/// by at most 2^-9 of its size, 0.002.
template <class T>
constexpr double tolerance = std::same_as<T, double>  ? 1e-10
                             : std::same_as<T, float> ? 1e-5
                                                      : 1e-2;

ids_tensor some_targets(index_t b, index_t length, index_t vocabulary) {
  ids_tensor ids(b, length);
  philox random(5);
  for (index_t i = 0; i < ids.size(); ++i) {
    ids.data()[i] = i % 5 == 3 ? -100 : static_cast<std::int32_t>(random.below(vocabulary));
  }
  return ids;
}
ids_tensor some_mask(index_t b, index_t length) {
  ids_tensor mask(b, length);
  for (index_t i = 0; i < mask.size(); ++i)
    mask.data()[i] = i % 4 != 1;
  return mask;
}

/// One operand on both sides: the host's in double is what the device's holds, and it is a slice of
/// something wider.
template <class T>
struct both_sides {
  explicit both_sides(const shape<3>& extents, std::uint64_t seed, double size = 2) {
    const shape<3> wide{extents[0], extents[1], extents[2] + 5};
    host = rounded<T>(uniform<double, 3>(wide, -size, size, seed)).slice(2, 3, 3 + extents[2]);
    device =
        to<cuda>(cast<T>(uniform<double, 3>(wide, -size, size, seed))).slice(2, 3, 3 + extents[2]);
  }
  tensor<double, 3> host;
  tensor<T, 3, cuda> device;
};

template <class T>
struct heads {
  heads(index_t in, index_t out, bool bias, std::uint64_t seed)
      : host(linear<double>::make(in, out, {.bias = bias, .seed = seed})) {
    using W = accum_t<T>;
    // The weights are masters in W and rounded to T for the products.
    host.weight = rounded<T>(host.weight);
    if (bias) host.bias = rounded<T>(host.bias);
    device.weight = to<cuda>(cast<W>(host.weight));
    if (bias) device.bias = to<cuda>(cast<W>(host.bias));
  }
  linear<double> host;
  linear<T, cuda> device;
};

template <class T, int R>
tensor<double, R> on_host(const tensor<T, R, cuda>& t) {
  return cast<double>(to<cpu>(t));
}

/// The errors of f's output and of the gradients of what is watched, on the device against the
/// host. f(pass, which) gives the loss; `which` is 0 for the host.
template <class T>
class comparison {
 public:
  template <class A, class B>
  void watch(const A& host, const B& device) {
    host_.watch(host);
    device_.watch(device);
    gradients_.push_back([=, this] {
      return relative_error(on_host(device_.gradient(device)), host_.gradient(host));
    });
  }
  /// The largest error over two backward passes, whose gradients add up.
  template <class F, class G>
  double error(F on_cpu, G on_cuda) {
    double worst = 0;
    const auto take = [&](double e) { worst = e > worst || e != e ? e : worst; };
    for (int run = 0; run < 2; ++run) {
      const auto wanted = on_cpu(pass<double>{.tape = &host_});
      const auto got = on_cuda(pass<T, cuda>{.tape = &device_});
      take(relative_error(on_host(got), wanted));
      const auto seed = rounded<accum_t<T>>(uniform<double, 1>(wanted.extents(), 0.5, 2, 3));
      host_.gradient(wanted).copy_from(seed);
      device_.gradient(got).copy_from(to<cuda>(cast<accum_t<T>>(seed)));
      host_.backward();
      device_.backward();
    }
    for (const auto& g : gradients_)
      take(g());
    return worst;
  }

 private:
  tape<double> host_;
  tape<T, cuda> device_;
  std::vector<std::function<double()>> gradients_;
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/train: cross_entropy and its gradient are the CPU's", "[cuda][train]",
                   float, double, bf16) {
  const index_t vocabulary = GENERATE(19, 2050, 50257);
  const both_sides<TestType> logits({2, 17, vocabulary}, 1, 6);
  const auto targets = some_targets(2, 17, vocabulary);
  comparison<TestType> c;
  c.watch(logits.host, logits.device);
  INFO("vocabulary " << vocabulary);
  CHECK(c.error([&](const auto& p) { return cross_entropy(p, logits.host, targets).loss; },
                [&](const auto& p) { return cross_entropy(p, logits.device, targets).loss; }) <
        tolerance<TestType>);
  const auto host = cross_entropy(pass<double>{}, logits.host, targets);
  const auto device = cross_entropy(pass<TestType, cuda>{}, logits.device, targets);
  CHECK(device.tokens == host.tokens);
  CHECK(std::abs(device.sum() - host.sum()) <= 1e-6 * std::abs(host.sum()));
}

TEMPLATE_TEST_CASE("cuda/train: kl_divergence and its gradients are the CPU's", "[cuda][train]",
                   float, double, bf16) {
  const index_t vocabulary = GENERATE(19, 2050, 50257);
  const bool masked = GENERATE(false, true);
  const both_sides<TestType> student({2, 17, vocabulary}, 1, 6),
      teacher({2, 17, vocabulary + 3}, 2, 6);
  const auto mask = masked ? some_mask(2, 17) : ids_tensor{};
  const kl_options o{.temperature = 2.0, .divisor = kl_divisor::batch};
  comparison<TestType> c;
  c.watch(student.host, student.device);
  c.watch(teacher.host, teacher.device);
  INFO("vocabulary " << vocabulary);
  CHECK(
      c.error(
          [&](const auto& p) { return kl_divergence(p, student.host, teacher.host, mask, o).loss; },
          [&](const auto& p) {
            return kl_divergence(p, student.device, teacher.device, mask, o).loss;
          }) < tolerance<TestType>);
}

TEMPLATE_TEST_CASE("cuda/train: lm_cross_entropy and its gradients are the CPU's", "[cuda][train]",
                   float, double, bf16) {
  const index_t block = GENERATE(0, 5);
  const bool bias = GENERATE(false, true);
  const both_sides<TestType> hidden({2, 37, 24}, 1);
  const heads<TestType> head(24, 1009, bias, 4);
  const auto targets = some_targets(2, 37, 1009);
  const cross_entropy_options o{.block_tokens = block};
  comparison<TestType> c;
  c.watch(hidden.host, hidden.device);
  c.watch(head.host.weight, head.device.weight);
  if (bias) c.watch(head.host.bias, head.device.bias);
  CHECK(c.error(
            [&](const auto& p) {
              return lm_cross_entropy(p, hidden.host, head.host, targets, o).loss;
            },
            [&](const auto& p) {
              return lm_cross_entropy(p, hidden.device, head.device, targets, o).loss;
            }) < tolerance<TestType>);
}

TEMPLATE_TEST_CASE("cuda/train: lm_kl_divergence and its gradients are the CPU's", "[cuda][train]",
                   float, double, bf16) {
  const index_t block = GENERATE(0, 5);
  const both_sides<TestType> student({2, 37, 24}, 1), teacher({2, 37, 40}, 2);
  const heads<TestType> head(24, 1009, true, 4), teacher_head(40, 1017, false, 5);
  const auto mask = some_mask(2, 37);
  const kl_options o{.temperature = 0.5, .block_tokens = block};
  comparison<TestType> c;
  c.watch(student.host, student.device);
  c.watch(head.host.weight, head.device.weight);
  c.watch(head.host.bias, head.device.bias);
  c.watch(teacher.host, teacher.device);
  CHECK(c.error(
            [&](const auto& p) {
              return lm_kl_divergence(p, student.host, head.host, teacher.host, teacher_head.host,
                                      mask, o)
                  .loss;
            },
            [&](const auto& p) {
              return lm_kl_divergence(p, student.device, head.device, teacher.device,
                                      teacher_head.device, mask, o)
                  .loss;
            }) < tolerance<TestType>);
}

TEMPLATE_TEST_CASE("cuda/train: sequence_log_probability and its gradients are the CPU's",
                   "[cuda][train]", float, double, bf16) {
  const bool packed = GENERATE(false, true);
  const both_sides<TestType> hidden({packed ? 1 : 3, packed ? 60 : 20, 24}, 1);
  const heads<TestType> head(24, 1009, false, 4);
  const auto targets = some_targets(hidden.host.extent(0), hidden.host.extent(1), 1009);
  const auto mask = some_mask(targets.extent(0), targets.extent(1));
  const auto layout = packed ? sequence_layout::from_lengths({17, 0, 1, 42}) : sequence_layout{};
  comparison<TestType> c;
  c.watch(hidden.host, hidden.device);
  c.watch(head.host.weight, head.device.weight);
  CHECK(c.error(
            [&](const auto& p) {
              return sequence_log_probability(p, hidden.host, head.host, targets, mask, layout);
            },
            [&](const auto& p) {
              return sequence_log_probability(p, hidden.device, head.device, targets, mask, layout);
            }) < tolerance<TestType>);
}

TEMPLATE_TEST_CASE("cuda/train: dpo_loss, its gradients and its ranking are the CPU's",
                   "[cuda][train]", float, double) {
  const index_t pairs = GENERATE(1, 700);
  std::vector<tensor<double, 1>> host;
  std::vector<tensor<TestType, 1, cuda>> device;
  comparison<TestType> c;
  for (std::uint64_t k = 0; k < 4; ++k) {
    host.push_back(rounded<TestType>(uniform<double, 1>({2 * pairs}, -9, -7, k))
                       .reshape(pairs, 2)
                       .slice(1, 1, 2)
                       .reshape(pairs));
    device.push_back(to<cuda>(cast<TestType>(uniform<double, 1>({2 * pairs}, -9, -7, k)))
                         .reshape(pairs, 2)
                         .slice(1, 1, 2)
                         .reshape(pairs));
    c.watch(host.back(), device.back());
  }
  const auto on = [](const auto& p, const auto& v) {
    return dpo_loss(p, v[0], v[1], v[2], v[3], 0.3);
  };
  CHECK(c.error([&](const auto& p) { return on(p, host).loss; },
                [&](const auto& p) { return on(p, device).loss; }) < tolerance<TestType>);
  const auto wanted = on(pass<double>{}, host);
  const auto got = on(pass<TestType, cuda>{}, device);
  CHECK(got.accuracy() == ssm_test::approx(wanted.accuracy()).epsilon(1e-12));
  CHECK(got.mean_margin() == ssm_test::approx(wanted.mean_margin()).epsilon(1e-12));
}

TEST_CASE("cuda/train: a batch without counted tokens has loss 0 and no gradient",
          "[cuda][train]") {
  const both_sides<float> hidden({1, 3, 24}, 1);
  const heads<float> head(24, 19, false, 4);
  tape<float, cuda> t;
  t.watch(hidden.device);
  const auto r = lm_cross_entropy(pass<float, cuda>{.tape = &t}, hidden.device, head.device,
                                  ids_tensor::full({1, 3}, -100));
  CHECK(r.sum() == 0.0);
  CHECK(to<cpu>(r.loss)(0) == 0.0f);
  CHECK_FALSE(t.wants(r.loss));
  const auto none = lm_cross_entropy(pass<float, cuda>{}, hidden.device.slice(1, 0, 0), head.device,
                                     ids_tensor(1, 0));
  CHECK(none.sum() == 0.0);
}

TEST_CASE("cuda/train: 20 backward passes of a loss give the same bits", "[cuda][train]") {
  const both_sides<float> hidden({2, 501, 24}, 1);
  const heads<float> head(24, 1009, true, 4);
  const auto targets = some_targets(2, 501, 1009);
  tensor<float, 2> first;
  for (int run = 0; run < 20; ++run) {
    tape<float, cuda> t;
    t.watch(head.device.weight);
    const auto r = lm_cross_entropy(pass<float, cuda>{.tape = &t}, hidden.device, head.device,
                                    targets, {.block_tokens = 100});
    t.gradient(r.loss).fill(1.0f);
    t.backward();
    const auto gradient = to<cpu>(t.gradient(head.device.weight));
    if (run == 0) first = gradient;
    CHECK(ssm_test::same_bits(gradient, first));
  }
}

TEST_CASE("cuda/train: no loss and no optimiser step waits for the device", "[cuda][train]") {
  struct gate {
    std::atomic<bool> open{false}, waited_in_vain{false};
  };
  const both_sides<float> hidden({2, 37, 24}, 1);
  const heads<float> head(24, 1009, true, 4);
  const auto targets = some_targets(2, 37, 1009);
  const auto list = parameters_of<float, cuda>(head.device);
  adamw<float, cuda> optimizer(list);
  tape<float, cuda> t;
  for (const auto& p : list)
    t.watch(p.value);
  const pass<float, cuda> p{.tape = &t};
  const auto step = [&] {
    t.zero_gradients();
    const auto loss = lm_cross_entropy(p, hidden.device, head.device, targets);
    const auto kl = lm_kl_divergence(p, hidden.device, head.device, hidden.device, head.device);
    const auto score = sequence_log_probability(p, hidden.device, head.device, targets, {},
                                                sequence_layout::from_lengths({30, 44}));
    const auto dpo = dpo_loss(p, score, score, score, score, 0.1);
    for (const auto& l : {loss.loss, kl.loss, dpo.loss})
      t.gradient(l).fill(1.0f);
    t.backward();
    optimizer.step(t, 1e-3);
  };
  step();  // loads the kernels, which may wait
  default_context<cuda>().synchronize();
  gate g;
  SSMLIB_CHECK_CUDA(cudaLaunchHostFunc(
      default_context<cuda>().stream(),
      [](void* argument) {
        auto& mine = *static_cast<gate*>(argument);
        const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        while (!mine.open && std::chrono::steady_clock::now() < limit)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        mine.waited_in_vain = !mine.open;
      },
      &g));
  step();
  CHECK_FALSE(g.waited_in_vain);
  g.open = true;
  default_context<cuda>().synchronize();
}

TEMPLATE_TEST_CASE("cuda/train: AdamW's parameters and moments are the CPU's, to the bit",
                   "[cuda][train]", float, double) {
  const std::vector<index_t> sizes{1, 7, 8191, 8192, 20001, 0, 64};
  // Parts of one tensor, so that some begin at odd addresses.
  index_t total = 0;
  for (const index_t n : sizes)
    total += n;
  const auto values = uniform<TestType, 1>({total}, -1, 1, 1);
  const auto there = to<cuda>(values);
  std::vector<parameter<TestType>> host;
  std::vector<parameter<TestType, cuda>> device;
  for (index_t begin = 0; const index_t n : sizes) {
    const auto kind = n % 2 == 0 ? parameter_kind::matrix : parameter_kind::norm;
    host.push_back({"p" + std::to_string(n), values.slice(0, begin, begin + n), {n}, kind});
    device.push_back({"p" + std::to_string(n), there.slice(0, begin, begin + n), {n}, kind});
    begin += n;
  }
  adamw<TestType> reference(host, {.weight_decay = 0.3});
  adamw<TestType, cuda> optimizer(device, {.weight_decay = 0.3});
  for (std::uint64_t step = 0; step < 5; ++step) {
    const auto gradient = normal<TestType, 1>({total}, 1, 10 + step);
    tape<TestType> t;
    tape<TestType, cuda> u;
    t.watch(values);
    u.watch(there);
    t.gradient(values).copy_from(gradient);
    u.gradient(there).copy_from(to<cuda>(gradient));
    const double norm = gradient_norm(t, host, 0.5);
    CHECK(gradient_norm(u, device, 0.5) == ssm_test::approx(norm).epsilon(1e-13));
    reference.step(t, 0.01, 0.7);
    optimizer.step(u, 0.01, 0.7);
  }
  CHECK(ssm_test::same_bits(to<cpu>(there), values));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    CHECK(ssm_test::same_bits(to<cpu>(optimizer.first_moments()[i]), reference.first_moments()[i]));
    CHECK(
        ssm_test::same_bits(to<cpu>(optimizer.second_moments()[i]), reference.second_moments()[i]));
  }
}

TEST_CASE("cuda/train: a gradient that is not finite is named", "[cuda][train]") {
  const auto w = to<cuda>(tensor<float, 1>::zeros(5));
  const std::vector<parameter<bf16, cuda>> list{{"layers.0.w", w, {5}, parameter_kind::matrix}};
  tape<bf16, cuda> t;
  t.watch(w);
  t.gradient(w).slice(0, 3, 4).fill(INFINITY);
  CHECK_THROWS_WITH(require_finite_gradient(gradient_norm(t, list), t, list, 7),
                    ssm_test::contains("'layers.0.w' (5) is inf at value 3"));
}
