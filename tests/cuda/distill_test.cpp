#include "compare.hpp"
#include "support/catch.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/io.hpp>
#include <ssmlib/ssmlib.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

using namespace ssm;
using ssm_test::error_of;
using ssm_test::on_cpu;
using ssm_test::on_device;
using ssm_test::relative_error;

/// What T holds of a mixer's parameters, in the CPU's mixer too.
template <class Device, class Host>
void copy_parameters(const Device& device, const Host& host) {
  using T = typename Device::value_type;
  const auto from = parameters_of<T, cuda>(device);
  const auto to_host = parameters_of<double>(host);
  REQUIRE(from.size() == to_host.size());
  for (std::size_t i = 0; i < from.size(); ++i)
    to_host[i].value.copy_from(on_cpu(from[i].value));
}

/// Relative errors in norm. The gradients of small sums that cancel are larger in float.
template <class T>
constexpr double loss_tolerance = std::same_as<T, double>  ? 1e-10
                                  : std::same_as<T, float> ? 1e-5
                                                           : 1e-2;
template <class T>
constexpr double gradient_tolerance = std::same_as<T, double>  ? 1e-9
                                      : std::same_as<T, float> ? 1e-4
                                                               : 3e-2;

/// Loss and gradients, in double on the host.
struct outcome {
  double loss = 0;
  std::vector<tensor<double, 1>> gradients;
  std::vector<std::string> names;
};

/// Stage 1 of two mixers on some input (b, T, d) or packed tokens.
template <class Teacher, class Student, class T, class B>
outcome orientation(const Teacher& teacher, const Student& student, const tensor<T, 3, B>& u,
                    const sequence_layout& layout) {
  tape<T, B> t;
  const auto parameters = parameters_of<T, B>(student);
  for (const auto& p : parameters)
    t.watch(p.value);
  const pass<T, B> p{.tape = &t}, silent{};
  const auto loss = matrix_orientation_loss(p, teacher.matrix_panels_of(silent, u, layout),
                                            student.matrix_panels_of(p, u, layout));
  outcome o;
  o.loss = static_cast<double>(ssm::detail::on_host(loss)(0));
  t.gradient(loss).fill(accum_t<T>(1.5f));
  t.backward();
  for (const auto& q : parameters) {
    o.gradients.push_back(cast<double>(ssm::detail::on_host(t.gradient(q.value))));
    o.names.push_back(q.name);
  }
  return o;
}

double norm(const tensor<double, 1>& t) {
  double sum = 0;
  for (index_t i = 0; i < t.size(); ++i)
    sum += t(i) * t(i);
  return std::sqrt(sum);
}

/// A gradient of zero on the host is one of rounding errors on the device.
void check_outcome(const outcome& got, const outcome& wanted, double of_loss, double of_gradients) {
  CAPTURE(got.loss, wanted.loss);
  CHECK(std::abs(got.loss - wanted.loss) <= of_loss * std::abs(wanted.loss));
  double largest = 0;
  for (const auto& g : wanted.gradients)
    largest = std::max(largest, norm(g));
  CHECK(largest > 0);
  for (std::size_t i = 0; i < wanted.gradients.size(); ++i) {
    double difference = 0;
    for (index_t k = 0; k < wanted.gradients[i].size(); ++k) {
      const double d = got.gradients[i](k) - wanted.gradients[i](k);
      difference += d * d;
    }
    CAPTURE(wanted.names[i], norm(wanted.gradients[i]), std::sqrt(difference));
    CHECK(std::sqrt(difference) <=
          of_gradients * std::max(norm(wanted.gradients[i]), 1e-3 * largest));
  }
}

/// A pair of mixers on the device in T against the CPU in double: on a rectangle and on packed
/// sequences, one of them empty.
template <class Teacher, class Student, class HostTeacher, class HostStudent>
void check_pair(const Teacher& teacher, const Student& student, const HostTeacher& host_teacher,
                const HostStudent& host_student, index_t length = 150) {
  using T = typename Student::value_type;
  // A diagonal of 1 is the only entry of the teacher's first row: a distance of rounding errors.
  for (const auto& p : parameters_of<T, cuda>(student)) {
    if (p.name == "D") p.value.fill(0.5f);
  }
  copy_parameters(teacher, host_teacher);
  copy_parameters(student, host_student);
  const auto u = on_device<T>(uniform<double, 3>({2, length, teacher.width()}, -1, 1, 3));
  const auto packed = u.reshape(index_t{1}, 2 * length, teacher.width());
  const auto whole = sequence_layout::rectangular(2, length),
             parts = sequence_layout::from_lengths({length - 30, 0, 1, length + 29});
  {
    INFO("rectangle");
    check_outcome(orientation(teacher, student, u, whole),
                  orientation(host_teacher, host_student, on_cpu(u), whole), loss_tolerance<T>,
                  gradient_tolerance<T>);
  }
  INFO("packed");
  check_outcome(orientation(teacher, student, packed, parts),
                orientation(host_teacher, host_student, on_cpu(packed), parts), loss_tolerance<T>,
                gradient_tolerance<T>);
}

/// Stage 1 of decays over Q K^T against given matrices.
template <class B>
outcome decayed_gram(const tensor<double, 3, B>& a, const tensor<double, 4, B>& x,
                     const tensor<double, 4, B>& y, const tensor<double, 4, B>& matrices) {
  tape<double, B> t;
  t.watch(a), t.watch(x), t.watch(y);
  const pass<double, B> p{.tape = &t};
  const auto loss = matrix_orientation_loss(
      p, panels(matrices), panels(hadamard(semiseparable(a), x * transpose(y)), &t, p.ctx));
  t.gradient(loss).fill(1);
  t.backward();
  outcome o{ssm::detail::on_host(loss)(0), {}, {"log_a", "q", "k"}};
  o.gradients.push_back(ssm::detail::on_host(t.gradient(a)).reshape(a.size()));
  o.gradients.push_back(ssm::detail::on_host(t.gradient(x)).reshape(x.size()));
  o.gradients.push_back(ssm::detail::on_host(t.gradient(y)).reshape(y.size()));
  return o;
}
/// Stage 2 of two outputs of layers.
template <class T, class B>
outcome alignment(const tensor<T, 3, B>& student, const tensor<T, 3, B>& teacher) {
  tape<T, B> t;
  t.watch(student), t.watch(teacher);
  const auto loss = hidden_state_alignment_loss(pass<T, B>{.tape = &t}, student, teacher);
  t.gradient(loss).fill(accum_t<T>(2.0f));
  t.backward();
  outcome o{static_cast<double>(ssm::detail::on_host(loss)(0)), {}, {"student", "teacher"}};
  for (const auto& x : {student, teacher}) {
    o.gradients.push_back(
        cast<double>(ssm::detail::on_host(t.gradient(x))).reshape(student.size()));
  }
  return o;
}

const attention_options grouped{.width = 48, .heads = 4, .kv_heads = 2, .rope = rope_options{}};

constexpr index_t vocabulary = 61;

model_config small_config(const std::string& pattern) {
  model_config c{.vocabulary = vocabulary, .width = 48, .pattern = pattern};
  c.attention = {.heads = 4, .kv_heads = 2, .rope = rope_options{}};
  c.mamba2 = {.heads = 4, .head_dim = 12, .state = 16, .groups = 2};
  c.discrete_mamba2 = {.heads = 4, .head_dim = 12, .state = 12};
  c.linear_attention = {.heads = 4, .kv_heads = 2};
  return c;
}

/// These models are too small for threads.
const cpu::context& one_thread() {
  static const cpu::context ctx(1);
  return ctx;
}

std::vector<std::int32_t> some_tokens(index_t n) {
  philox random(3);
  std::vector<std::int32_t> tokens{1};
  while (static_cast<index_t>(tokens.size()) < n) {
    tokens.push_back(static_cast<std::int32_t>((3 * tokens.back() + random.below(4)) % vocabulary));
  }
  return tokens;
}

token_batch documents_of(const std::vector<index_t>& lengths) {
  const auto tokens = some_tokens(1000);
  std::vector<std::vector<std::int32_t>> documents;
  index_t first = 0;
  for (const index_t n : lengths) {
    documents.emplace_back(tokens.begin() + first, tokens.begin() + first + n);
    first += n;
  }
  return pack_documents(documents);
}

template <class T, class B>
outcome stage_outcome(mohawk_stage stage, const token_batch& batch,
                      const typename B::context& ctx) {
  const language_model<T, B> teacher(small_config("*-*-"), 1), student(small_config("M-L-"), 2);
  tape<T, B> t;
  const auto parameters = student.parameters();
  for (const auto& p : parameters)
    t.watch(p.value);
  const auto l = mohawk_loss(stage, teacher, student, pass<T, B>{ctx, &t, false}, batch);
  outcome o;
  o.loss = static_cast<double>(ssm::detail::on_host(l.sum)(0)) / static_cast<double>(l.count);
  t.gradient(l.sum).fill(accum_t<T>(1.0f));
  t.backward();
  for (const auto& p : parameters) {
    o.gradients.push_back(cast<double>(ssm::detail::on_host(t.gradient(p.value))));
    o.names.push_back(p.name);
  }
  return o;
}

template <class T>
void check_stage(mohawk_stage stage, double of_loss, double of_gradients) {
  const token_batch rectangle{tensor<std::int32_t, 2>(3, 70), {}, {}};
  std::ranges::copy(some_tokens(210), rectangle.inputs.data());
  for (const token_batch& batch : {rectangle, documents_of({9, 2, 140, 17})}) {
    INFO((batch.layout ? "packed" : "rectangle"));
    check_outcome(stage_outcome<T, cuda>(stage, batch, default_context<cuda>()),
                  stage_outcome<double, cpu>(stage, batch, one_thread()), of_loss, of_gradients);
  }
}

mohawk_stage some_stage() {
  return GENERATE(mohawk_stage::matrix_orientation, mohawk_stage::hidden_state_alignment,
                  mohawk_stage::distillation);
}

/// A student with its optimiser and data for one stage.
template <class T, class B>
struct stage_run {
  stage_run(mohawk_stage s, std::uint64_t seed)
      : stage(s), teacher(small_config("*-*-"), 1), student(small_config("M-L-"), seed) {
    if (seed == 2) transfer_weights(teacher, student);
  }
  void train_to(index_t steps, std::function<void(const step_info&)> on_step,
                const typename B::context& ctx = default_context<B>()) {
    train_mohawk_stage(
        stage, teacher, student, optimizer, loader,
        {.steps = steps, .tokens_per_step = 8 * 33, .learning_rate = 3e-3, .micro_batch = 3},
        {.on_step = std::move(on_step)}, {}, ctx);
  }
  [[nodiscard]] std::vector<parameter<T, B>> trained() const {
    return select_parameters(student.parameters(),
                             any_of_patterns{mohawk_trained(stage, teacher, student)})
        .trained;
  }

  mohawk_stage stage;
  language_model<T, B> teacher, student;
  std::vector<std::int32_t> tokens = some_tokens(4000);
  token_spans<std::int32_t> spans{std::span<const std::int32_t>(tokens)};
  data_loader<token_spans<std::int32_t>> loader{spans, {.sequence_length = 33, .seed = 2}};
  adamw<T, B> optimizer{trained()};
};

}  // namespace

TEMPLATE_TEST_CASE("cuda/distill: stage 1 of attention and Mamba-2 is the CPU's, with gradient",
                   "[cuda][distill]", float, double, bf16) {
  const mamba2_options o{.width = 48, .heads = 4, .head_dim = 12, .state = 16, .groups = 2};
  check_pair(attention<TestType, cuda>(grouped, 1), mamba2<TestType, cuda>(o, 2),
             attention<double>(grouped, 1), mamba2<double>(o, 2));
}
TEMPLATE_TEST_CASE("cuda/distill: stage 1 goes over many tiles", "[cuda][distill]", float, double) {
  // 128 product heads: tiles of 256 x 256.
  const attention_options a{.width = 64, .heads = 128, .head_dim = 8};
  const mamba2_options o{.width = 64, .heads = 128, .head_dim = 4, .state = 8, .groups = 128};
  check_pair(attention<TestType, cuda>(a, 1), mamba2<TestType, cuda>(o, 2), attention<double>(a, 1),
             mamba2<double>(o, 2), 600);
}
TEMPLATE_TEST_CASE("cuda/distill: stage 1 of attention and the discrete Mamba-2 is the CPU's",
                   "[cuda][distill]", float, bf16) {
  const discrete_mamba2_options o{.width = 48, .heads = 2, .head_dim = 6, .state = 5};
  check_pair(attention<TestType, cuda>(grouped, 1), discrete_mamba2<TestType, cuda>(o, 2),
             attention<double>(grouped, 1), discrete_mamba2<double>(o, 2));
}
TEMPLATE_TEST_CASE("cuda/distill: stage 1 of attention and linear attention is the CPU's",
                   "[cuda][distill]", float, bf16) {
  const linear_attention_options o{.width = 48, .heads = 4, .kv_heads = 2};
  check_pair(attention<TestType, cuda>(grouped, 1),
             linear_attention<TestType, feature::elu_plus_one, cuda>(o, 2),
             attention<double>(grouped, 1), linear_attention<double>(o, 2));
}
TEMPLATE_TEST_CASE("cuda/distill: stage 1 of Mamba-2 and retention is the CPU's", "[cuda][distill]",
                   float, bf16) {
  const mamba2_options o{.width = 48, .heads = 4, .head_dim = 12, .state = 5};
  const retention_options r{.width = 48, .heads = 2};
  check_pair(mamba2<TestType, cuda>(o, 1), retention<TestType, cuda>(r, 2), mamba2<double>(o, 1),
             retention<double>(r, 2));
}
TEMPLATE_TEST_CASE("cuda/distill: stage 1 of attention with a window and attention is the CPU's",
                   "[cuda][distill]", float, bf16) {
  attention_options window = grouped;
  window.window = 20;
  const attention_options two{.width = 48, .heads = 2};
  check_pair(attention<TestType, cuda>(window, 1), attention<TestType, cuda>(two, 2),
             attention<double>(window, 1), attention<double>(two, 2));
  check_pair(attention<TestType, cuda>(two, 1), attention<TestType, cuda>(window, 2),
             attention<double>(two, 1), attention<double>(window, 2));
}
TEMPLATE_TEST_CASE("cuda/distill: stage 1 of attention and Mamba-1 or the delta rule is the CPU's",
                   "[cuda][distill]", float) {
  const mamba1_options m{.width = 48, .inner = 8, .state = 3};
  check_pair(attention<TestType, cuda>(grouped, 1), mamba1<TestType, cuda>(m, 2),
             attention<double>(grouped, 1), mamba1<double>(m, 2));
  const gated_delta_net_options g{.width = 48, .heads = 2, .head_dim = 6};
  check_pair(attention<TestType, cuda>(grouped, 1), gated_delta_net<TestType, cuda>(g, 2),
             attention<double>(grouped, 1), gated_delta_net<double>(g, 2));
}

TEMPLATE_TEST_CASE("cuda/distill: stages 1 and 2 have the golden values and gradients",
                   "[cuda][distill]", float, double) {
  using T = TestType;
  const double bound = std::same_as<T, double> ? 1e-7 : 1e-5;  // the golden numbers are floats
  const auto compare = [&](const auto& got, const auto& wanted) {
    CHECK(error_of(got, wanted) < bound);
  };
  tape<T, cuda> t;
  const pass<T, cuda> p{.tape = &t};
  const auto backward = [&](const auto& loss, const safetensors_reader& file) {
    compare(loss, file.load<double, 1>("out.loss"));
    t.gradient(loss).copy_from(to<cuda>(file.load<T, 1>("cotangent.loss")));
    t.backward();
  };
  const std::string folder = SSMLIB_TEST_DATA "/ops/";
  const safetensors_reader first(folder + "mohawk_matrix_orientation.safetensors");
  const auto b = to<cuda>(first.load<T, 4>("in.B")), c = to<cuda>(first.load<T, 4>("in.C"));
  const auto log_a = to<cuda>(first.load<T, 3>("in.a_log"));
  t.watch(b), t.watch(c), t.watch(log_a);
  backward(
      matrix_orientation_loss(p, panels(to<cuda>(first.load<T, 4>("teacher_matrix"))),
                              panels(hadamard(semiseparable(log_a), c * transpose(b)), &t, p.ctx)),
      first);
  compare(t.gradient(b), first.load<double, 4>("grad.B"));
  compare(t.gradient(c), first.load<double, 4>("grad.C"));
  compare(t.gradient(log_a), first.load<double, 3>("grad.a_log"));
  const safetensors_reader second(folder + "mohawk_hidden_state.safetensors");
  const auto student = to<cuda>(second.load<T, 3>("in.student")),
             teacher = to<cuda>(second.load<T, 3>("in.teacher"));
  t.watch(student), t.watch(teacher);
  backward(hidden_state_alignment_loss(p, student, teacher), second);
  compare(t.gradient(student), second.load<double, 3>("grad.student"));
  compare(t.gradient(teacher), second.load<double, 3>("grad.teacher"));
}

TEST_CASE("cuda/distill: a reset hides what is before it, and costs no gradient",
          "[cuda][distill]") {
  // A log decay of -infinity at two tokens, one of them the first.
  const index_t n = 90;
  auto log_a = uniform<double, 3>({1, n, 2}, -0.3, 0, 4);
  log_a(0, 0, 0) = log_a(0, 40, 0) = log_a(0, 41, 1) = -std::numeric_limits<double>::infinity();
  const auto q = uniform<double, 4>({1, n, 2, 6}, -1, 1, 1),
             k = uniform<double, 4>({1, n, 2, 6}, -1, 1, 2);
  const auto target = uniform<double, 4>({1, 2, n, n}, -1, 1, 3);
  const outcome got = decayed_gram(to<cuda>(log_a), to<cuda>(q), to<cuda>(k), to<cuda>(target));
  check_outcome(got, decayed_gram(log_a, q, k, target), 1e-12, 1e-10);
  CHECK(std::isfinite(norm(got.gradients[0])));
}

TEST_CASE("cuda/distill: a mixer is at distance 0 from itself, with gradient 0",
          "[cuda][distill]") {
  const mamba2<bf16, cuda> m({.width = 48, .heads = 2, .head_dim = 24, .state = 16}, 1);
  const auto u = on_device<bf16>(uniform<double, 3>({2, 100, 48}, -1, 1, 3));
  const outcome o = orientation(m, m, u, sequence_layout::rectangular(2, 100));
  CHECK(o.loss == 0.0);
  for (const auto& g : o.gradients)
    CHECK(norm(g) == 0.0);
}

TEST_CASE("cuda/distill: stage 1 gives the same bits again", "[cuda][distill]") {
  const attention<bf16, cuda> teacher({.width = 128, .heads = 8, .rope = rope_options{}}, 1);
  const mamba2<bf16, cuda> student(
      {.width = 128, .heads = 8, .head_dim = 16, .state = 16, .groups = 4}, 2);
  const auto u = on_device<bf16>(uniform<double, 3>({2, 1100, 128}, -1, 1, 3));
  const auto layout = sequence_layout::rectangular(2, 1100);
  const outcome first = orientation(teacher, student, u, layout);
  for (int repeat = 0; repeat < 5; ++repeat) {
    const outcome again = orientation(teacher, student, u, layout);
    CHECK(again.loss == first.loss);
    for (std::size_t i = 0; i < first.gradients.size(); ++i)
      CHECK(ssm_test::same_bits(again.gradients[i], first.gradients[i]));
  }
}

TEST_CASE("cuda/distill: tiles of a matrix are its dense entries", "[cuda][distill]") {
  const attention<double, cuda> a(grouped, 1);
  const gated_delta_net<double, cuda> g({.width = 48, .heads = 2, .head_dim = 6}, 2);
  const auto u = on_device<double>(uniform<double, 3>({2, 40, 48}, -1, 1, 3));
  const auto layout = sequence_layout::rectangular(2, 40);
  const auto check = [&](const auto& mixer) {
    const auto panels = mixer.matrix_panels_of({}, u, layout);
    const auto dense = mixer.matrix({}, u, sequence_layout{}).dense();
    const auto tile = on_cpu(panels->tile(default_context<cuda>(), 1, 47, 71, 50, 63));
    double worst = 0;
    for (index_t t = 47; t < 71; ++t) {
      for (index_t s = 50; s < 63; ++s) {
        for (index_t h = 0; h < tile.extent(1); ++h) {
          worst = std::max(worst, std::abs(tile(t - 47, h, s - 50) - dense(1, h, t - 40, s - 40)));
        }
      }
    }
    CHECK(worst < 1e-12);
  };
  check(a);
  check(g);
}

TEST_CASE("cuda/distill: stage 1 at T = 32,768 takes memory for tiles, not for matrices",
          "[cuda][distill]") {
  const index_t length = 32768;
  const cuda::context& ctx = default_context<cuda>();
  const attention<bf16, cuda> teacher({.width = 128, .heads = 4}, 1);
  const mamba2<bf16, cuda> student(
      {.width = 128, .heads = 4, .head_dim = 32, .state = 32, .groups = 4}, 2);
  const auto u = on_device<bf16>(uniform<double, 3>({1, length, 128}, -1, 1, 3));
  const auto layout = sequence_layout::rectangular(1, length);
  ctx.reset_peak();
  const outcome o = orientation(teacher, student, u, layout);
  const double gib = static_cast<double>(ctx.memory().peak) / double(1 << 30);
  WARN("peak " << gib << " GiB");
  CHECK(std::isfinite(o.loss));
  CHECK(std::isfinite(norm(o.gradients[0])));
  // A matrix of one head alone has 4 GiB in float.
  CHECK(gib < 1.0);
}

// A layer of Phi-1.5's size. The products of both matrices are counted once forward, and in the
// gradient again with two more of it; so are the log-sum-exps, at twice the teacher's.
TEST_CASE("cuda/distill: stage 1 of a layer of 32 heads holds a small part of its matrices",
          "[cuda][distill]") {
  const cuda::context& ctx = default_context<cuda>();
  const index_t length = 2048, heads = 32, size = 64;
  const auto some = [&](std::uint64_t seed) {
    return on_device<bf16>(uniform<double, 4>({1, length, heads, size}, -0.4, 0.4, seed));
  };
  const auto q = some(1), k = some(2), c = some(3), b = some(4);
  const auto log_a = on_device<float>(uniform<double, 3>({1, length, heads}, -0.1, 0, 5)),
             weight = on_device<float>(uniform<double, 3>({1, length, heads}, 0.1, 0.5, 6));
  const auto run = [&](bool with_gradient) {
    tape<bf16, cuda> t;
    if (with_gradient) t.watch(c), t.watch(b), t.watch(log_a), t.watch(weight);
    const pass<bf16, cuda> p{ctx, with_gradient ? &t : nullptr, false};
    const auto loss = matrix_orientation_loss(
        p, panels(softmax(q * transpose(k) * 0.125 + causal), p.tape, ctx),
        panels(hadamard(semiseparable(log_a, weight), c * transpose(b)), p.tape, ctx));
    if (!with_gradient) return;
    t.gradient(loss).fill(1.0f);
    t.backward();
  };
  const auto milliseconds = [&](auto f) {
    std::vector<double> times;
    for (int i = 0; i < 12; ++i) {
      ctx.synchronize();
      const auto start = std::chrono::steady_clock::now();
      f();
      ctx.synchronize();
      times.push_back(
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
              .count());
    }
    std::ranges::sort(times);
    return times[4];
  };
  ctx.reset_peak();
  const double before = static_cast<double>(ctx.memory().in_use);
  run(true);
  ctx.synchronize();
  const double mib = (static_cast<double>(ctx.memory().peak) - before) / double(1 << 20);
  const auto x = on_device<bf16>(uniform<double, 2>({8192, 8192}, -1, 1, 1)),
             y = on_device<bf16>(uniform<double, 2>({8192, 8192}, -1, 1, 2));
  const double gemm = 2 * std::pow(8192, 3) * 1e-9 / milliseconds([&] { (void)matmul(x, y); });
  const double loss = milliseconds([&] { run(false); }), both = milliseconds([&] { run(true); });
  const double pairs = 0.5 * static_cast<double>(heads * length * (length + 1));
  const double flops = pairs * static_cast<double>(size) * 1e-9;
  WARN("peak " << mib << " MiB; GEMM " << gemm << " TFLOP/s; loss " << loss << " ms, "
               << 8 * flops / loss << " TFLOP/s; with gradient " << both << " ms, "
               << 16 * flops / both << " TFLOP/s");
  // The two matrices would be 1,024 MiB in float.
  CHECK(mib < 300);
}

TEMPLATE_TEST_CASE("cuda/distill: stage 2's loss and gradients are the CPU's", "[cuda][distill]",
                   float, double, bf16) {
  auto teacher = uniform<double, 3>({2, 37, 50}, -1, 1, 2);
  const auto student = uniform<double, 3>({2, 37, 50}, -1, 1, 1);
  for (index_t c = 0; c < 50; ++c)
    teacher(1, 3, c) = student(1, 3, c);  // one token at distance 0
  const auto s = on_device<TestType>(student), q = on_device<TestType>(teacher);
  check_outcome(alignment(s, q), alignment(on_cpu(s), on_cpu(q)), loss_tolerance<TestType>,
                ssm_test::tolerance<TestType>);
}

TEST_CASE("cuda/distill: each stage's loss and gradients of models are the CPU's",
          "[cuda][distill]") {
  const auto stage = some_stage();
  CAPTURE(to_string(stage));
  check_stage<double>(stage, 1e-10, 1e-8);
  check_stage<float>(stage, 1e-4, 1e-3);
}

TEST_CASE("cuda/distill: each stage lowers its own loss in bf16", "[cuda][distill]") {
  const auto stage = some_stage();
  CAPTURE(to_string(stage));
  stage_run<bf16, cuda> run(stage, 2);
  std::vector<double> losses;
  run.train_to(40, [&](const step_info& i) { losses.push_back(i.loss); });
  CHECK(losses.back() < 0.9 * losses.front());
}

TEST_CASE("cuda/distill: a stage that is resumed from a checkpoint goes on to the same bits",
          "[cuda][distill]") {
  const auto stage = some_stage();
  CAPTURE(to_string(stage));
  const auto path = std::filesystem::temp_directory_path() /
                    ("ssmlib_cuda_stage_" + std::to_string(::getpid()) + ".safetensors");
  stage_run<bf16, cuda> whole(stage, 2);
  const auto parameters = whole.student.parameters();
  std::vector<double> losses;
  whole.train_to(6, [&](const step_info& i) {
    losses.push_back(i.loss);
    if (i.step == 2) {
      save_checkpoint(path, parameters, whole.optimizer, {whole.loader.state(), {}, {}});
    }
  });
  stage_run<bf16, cuda> resumed(stage, 99);
  const auto loaded = resumed.student.parameters();
  resumed.loader.restore(load_checkpoint(path, loaded, resumed.optimizer).loader);
  resumed.train_to(
      6, [&](const step_info& i) { CHECK(i.loss == losses[static_cast<std::size_t>(i.step)]); });
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    CAPTURE(parameters[i].name);
    CHECK(ssm_test::same_bits(ssm::detail::on_host(parameters[i].value),
                              ssm::detail::on_host(loaded[i].value)));
  }
  std::filesystem::remove(path);
}

TEST_CASE("cuda/distill: weights and mixers go over as on the CPU", "[cuda][distill]") {
  const model_config config = [] {
    model_config c = small_config("MDL-");
    c.mamba2 = {.heads = 4, .head_dim = 12, .state = 12, .groups = 4};
    return c;
  }();
  const language_model<bf16, cuda> teacher(small_config("***-"), 1), student(config, 2);
  const language_model<float> host_teacher(small_config("***-"), 1), host_student(config, 2);
  CHECK(transfer_weights(teacher, student) == transfer_weights(host_teacher, host_student));
  CHECK(transfer_mixers(teacher, student) == transfer_mixers(host_teacher, host_student));
  const auto a = student.parameters();
  const auto b = host_student.parameters();
  for (std::size_t i = 0; i < a.size(); ++i) {
    CAPTURE(a[i].name);
    CHECK(ssm_test::same_bits(ssm::detail::on_host(a[i].value), b[i].value));
  }
}
