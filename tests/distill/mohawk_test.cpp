#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/distill/mohawk.hpp>

#include <cmath>
#include <string>
#include <vector>

using namespace ssm;
using ssm_test::random_ids;
using ssm_test::small_config;

namespace {

// The mean Frobenius norm of the difference of two mixers' dense matrices, by the definition.
template <class A, class C>
double dense_distance(const A& student, const C& teacher) {
  const auto m = student.dense(), a = teacher.dense();
  const index_t heads = std::max(m.extent(1), a.extent(1));
  double total = 0;
  for (index_t b = 0; b < m.extent(0); ++b) {
    for (index_t h = 0; h < heads; ++h) {
      double sum = 0;
      for (index_t t = 0; t < m.extent(2); ++t) {
        for (index_t s = 0; s < m.extent(3); ++s) {
          const double d = m(b, group_of(h, heads, m.extent(1)), t, s) -
                           a(b, group_of(h, heads, a.extent(1)), t, s);
          sum += d * d;
        }
      }
      total += std::sqrt(sum);
    }
  }
  return total / double(m.extent(0) * heads);
}

// Stage 1 between two mixers: the value against dense matrices, the gradient of every parameter
// that it reaches against finite differences.
template <class Teacher, class Student>
void check_pair(const Teacher& teacher, const Student& student) {
  const auto u = uniform<double, 3>({2, 75, 24}, -1, 1, 3);
  const auto layout = sequence_layout::rectangular(2, 75);
  const auto target = teacher.matrix_panels_of({}, u, layout);
  const auto loss = [&](tape<double>* t) {
    const pass<double> p{.tape = t};
    return matrix_orientation_loss<double>(p, target, student.matrix_panels_of(p, u, layout));
  };
  const double by_definition = dense_distance(student.matrix({}, u, sequence_layout{}),
                                              teacher.matrix({}, u, sequence_layout{}));
  CHECK(loss(nullptr)(0) == ssm_test::approx(by_definition).epsilon(1e-10));

  tape<double> t;
  const auto parameters = parameters_of<double>(student);
  for (const auto& p : parameters)
    t.watch(p.value);
  const auto l = loss(&t);
  t.gradient(l).fill(1);
  t.backward();
  index_t reached = 0;
  for (const auto& p : parameters) {
    const auto gradient = t.gradient(p.value);
    const auto direction = normal<double, 1>(p.value.extents(), 1, 8);
    const auto original = p.value.clone();
    double inner = 0, square = 0;
    for (index_t i = 0; i < original.size(); ++i) {
      inner += gradient(i) * direction(i);
      square += gradient(i) * gradient(i);
    }
    reached += square > 0;
    const auto moved = [&](double step) {
      for (index_t i = 0; i < original.size(); ++i) {
        p.value(i) = original(i) + step * direction(i);
      }
      return loss(nullptr)(0);
    };
    const double step = 1e-5 / std::sqrt(double(original.size()));
    const double difference = (moved(step) - moved(-step)) / (2 * step);
    p.value.copy_from(original);
    CAPTURE(p.name, inner, difference);
    CHECK(std::abs(inner - difference) < 1e-5 * std::max(std::sqrt(square), 1e-3));
  }
  CHECK(reached > 0);
}

const attention<double>& attention_teacher() {
  static const attention<double> teacher(
      {.width = 24, .heads = 4, .kv_heads = 2, .rope = rope_options{}}, 1);
  return teacher;
}

}  // namespace

TEST_CASE("distill/matrix_orientation: attention to Mamba-2", "[distill][mohawk]") {
  check_pair(attention_teacher(),
             mamba2<double>({.width = 24, .heads = 4, .head_dim = 6, .state = 5, .groups = 2}, 2));
}
TEST_CASE("distill/matrix_orientation: attention to the discrete Mamba-2", "[distill][mohawk]") {
  check_pair(attention_teacher(),
             discrete_mamba2<double>({.width = 24, .heads = 2, .head_dim = 6, .state = 5}, 2));
}
TEST_CASE("distill/matrix_orientation: attention to linear attention", "[distill][mohawk]") {
  check_pair(attention_teacher(), linear_attention<double>({.width = 24, .heads = 4}, 2));
}
TEST_CASE("distill/matrix_orientation: attention to Mamba-1, channel against the head that owns it",
          "[distill][mohawk]") {
  check_pair(attention_teacher(), mamba1<double>({.width = 24, .inner = 8, .state = 3}, 2));
}
TEST_CASE("distill/matrix_orientation: Mamba-2 to retention", "[distill][mohawk]") {
  check_pair(mamba2<double>({.width = 24, .heads = 4, .head_dim = 6, .state = 5}, 1),
             retention<double>({.width = 24, .heads = 2}, 2));
}
TEST_CASE("distill/matrix_orientation: attention to the gated delta rule and to attention",
          "[distill][mohawk]") {
  check_pair(attention_teacher(),
             gated_delta_net<double>({.width = 24, .heads = 2, .head_dim = 6}, 2));
  check_pair(attention_teacher(), attention<double>({.width = 24, .heads = 2}, 2));
}

TEST_CASE("distill/matrix_orientation: a mixer is at distance 0 from itself, with gradient 0",
          "[distill][mohawk]") {
  const mamba2<double> m({.width = 24, .heads = 2, .head_dim = 6, .state = 4}, 1);
  const auto u = uniform<double, 3>({1, 40, 24}, -1, 1, 3);
  const auto layout = sequence_layout::rectangular(1, 40);
  tape<double> t;
  for (const auto& p : parameters_of<double>(m))
    t.watch(p.value);
  const pass<double> p{.tape = &t};
  const auto loss = matrix_orientation_loss<double>(p, m.matrix_panels_of({}, u, layout),
                                                    m.matrix_panels_of(p, u, layout));
  CHECK(loss(0) == 0.0);
  t.gradient(loss).fill(1);
  t.backward();
  for (const auto& q : parameters_of<double>(m)) {
    const auto g = t.gradient(q.value);
    for (index_t i = 0; i < g.size(); ++i)
      REQUIRE(g(i) == 0.0);
  }
}

TEST_CASE("distill/matrix_orientation: heads or lengths that do not fit are refused",
          "[distill][mohawk][error]") {
  const auto u = uniform<double, 3>({1, 8, 24}, -1, 1, 3);
  const auto all = sequence_layout::rectangular(1, 8),
             parts = sequence_layout::from_lengths({3, 5});
  const attention<double> two({.width = 24, .heads = 2}, 1), three({.width = 24, .heads = 3}, 1);
  CHECK_THROWS_AS(matrix_orientation_loss<double>({}, two.matrix_panels_of({}, u, all),
                                                  three.matrix_panels_of({}, u, all)),
                  shape_error);
  CHECK_THROWS_AS(matrix_orientation_loss<double>({}, two.matrix_panels_of({}, u, all),
                                                  two.matrix_panels_of({}, u, parts)),
                  shape_error);
}

TEST_CASE("distill/matrix_orientation: one layer at T = 32,768 stays under 2 GiB",
          "[distill][mohawk][slow]") {
  const index_t length = 32768;
  const attention<float> teacher({.width = 128, .heads = 4}, 1);
  const mamba2<float> student({.width = 128, .heads = 4, .head_dim = 32, .state = 32, .groups = 4},
                              2);
  const auto u = uniform<float, 3>({1, length, 128}, -1, 1, 3);
  const auto layout = sequence_layout::rectangular(1, length);
  auto& pool = cpu_memory_pool::instance();
  pool.reset_peak();
  tape<float> t;
  for (const auto& p : parameters_of<float>(student))
    t.watch(p.value);
  {
    const pass<float> p{.tape = &t};
    const auto loss = matrix_orientation_loss<float>(p, teacher.matrix_panels_of({}, u, layout),
                                                     student.matrix_panels_of(p, u, layout));
    CHECK(std::isfinite(loss(0)));
    t.gradient(loss).fill(1);
    t.backward();
  }
  {
    const pass<float> p{.tape = &t};
    const auto y = student.forward(p, u, layout);
    t.gradient(y).fill(1);
    t.backward();
  }
  const double gib = double(pool.stats().peak) / double(1 << 30);
  WARN("peak " << gib << " GiB");
  CHECK(gib < 2.0);
  CHECK(std::isfinite(t.gradient(student.in_proj.weight)(0, 0)));
}

TEST_CASE("distill/hidden_state_alignment: equal states have loss and gradient 0",
          "[distill][mohawk]") {
  const auto x = uniform<double, 3>({2, 5, 4}, -1, 1, 1);
  tape<double> t;
  t.watch(x);
  const auto loss = hidden_state_alignment_loss<double>({.tape = &t}, x, x.clone());
  CHECK(loss(0) == 0.0);
  t.gradient(loss).fill(1);
  t.backward();
  CHECK(t.gradient(x)(1, 2, 3) == 0.0);
}

TEST_CASE("distill/weight_transfer: everything but replaced mixers is copied",
          "[distill][transfer]") {
  const language_model<float> teacher(small_config("*-*-"), 1), student(small_config("M-*-"), 2);
  const auto copied = transfer_weights(teacher, student);
  const auto from = teacher.parameters();
  index_t same = 0;
  for (const auto& p : student.parameters()) {
    const bool replaced = p.name.starts_with("layers.0.mixer");
    const bool listed = std::ranges::find(copied, p.name) != copied.end();
    CAPTURE(p.name);
    CHECK(listed == !replaced);
    for (const auto& q : from) {
      if (q.name == p.name && listed) {
        CHECK(detail::equal_elements(p.value, q.value));
        ++same;
      }
    }
  }
  CHECK(same == static_cast<index_t>(copied.size()));
  CHECK_THROWS_AS(transfer_weights(teacher, language_model<float>(small_config("M-"), 1)),
                  shape_error);
}

TEST_CASE("distill/weight_transfer: Q, K, V and O of attention become C, B, x and out of Mamba-2",
          "[distill][transfer]") {
  const attention<double> teacher({.width = 24, .heads = 4, .kv_heads = 2}, 1);
  const mamba2<double> student({.width = 24,
                                .heads = 4,
                                .head_dim = 6,
                                .state = 6,
                                .groups = 4,
                                .conv_width = 1,
                                .activation = conv1d_activation::none},
                               2);
  student.conv1d.weight.fill(1);  // a convolution that passes its input
  student.conv1d.bias.fill(0);
  transfer_attention(teacher, student);
  const auto u = uniform<double, 3>({1, 9, 24}, -1, 1, 3);
  const auto layout = sequence_layout::rectangular(1, 9);
  const auto attention_parts = teacher.project({}, u, layout, nullptr);
  const auto mamba_parts = student.project({}, u, layout, nullptr);
  const auto& logits = attention_parts.product.mixer.logits;
  const auto& kernel = mamba_parts.product.mixer.inner.kernel;
  double worst = 0;
  for (index_t t = 0; t < 9; ++t) {
    for (index_t h = 0; h < 4; ++h) {
      for (index_t i = 0; i < 6; ++i) {
        worst = std::max({worst, std::abs(kernel.q(0, t, h, i) - logits.q(0, t, h, i)),
                          std::abs(kernel.k(0, t, h, i) - logits.k(0, t, h / 2, i)),
                          std::abs(mamba_parts.product.x(0, t, h, i) -
                                   attention_parts.product.x(0, t, h / 2, i))});
      }
    }
  }
  CHECK(worst < 1e-14);
  CHECK(detail::equal_elements(student.out_proj.weight, teacher.o_proj.weight));
  const mamba2<double> small({.width = 24, .heads = 2, .head_dim = 6, .state = 6, .groups = 2}, 2);
  CHECK_THROWS_WITH(transfer_attention(teacher, small), ssm_test::contains("head count is 2"));
}

TEST_CASE("distill/weight_transfer: what linear attention has no place for is refused",
          "[distill][transfer][error]") {
  using ssm_test::contains;
  const attention<double> eight({.width = 32, .heads = 4}, 1);
  const linear_attention<double> two({.width = 32, .heads = 2}, 2);
  CHECK_THROWS_WITH(transfer_attention(eight, two),
                    contains("to linear attention: the student's head count is 2, wanted the "
                             "teacher's 4"));
  const linear_attention<double> shared({.width = 32, .heads = 4, .kv_heads = 2}, 2);
  CHECK_THROWS_WITH(transfer_attention(eight, shared), contains("kv_head count is 2"));
  const linear_attention<double> narrow({.width = 32, .heads = 4, .head_dim = 4}, 2);
  CHECK_THROWS_WITH(transfer_attention(eight, narrow), contains("head_dim is 4"));
}

TEST_CASE("distill/weight_transfer: an attention with biases is refused",
          "[distill][transfer][error]") {
  using ssm_test::contains;
  const attention<double> biased({.width = 24, .heads = 4, .bias = true}, 1);
  const auto says = contains("the teacher's projections have biases");
  CHECK_THROWS_WITH(
      transfer_attention(
          biased,
          mamba2<double>({.width = 24, .heads = 4, .head_dim = 6, .state = 6, .groups = 4}, 2)),
      says);
  CHECK_THROWS_WITH(
      transfer_attention(
          biased, discrete_mamba2<double>({.width = 24, .heads = 4, .head_dim = 6, .state = 6}, 2)),
      says);
  CHECK_THROWS_WITH(
      transfer_attention(biased, linear_attention<double>({.width = 24, .heads = 4}, 2)), says);
}

TEST_CASE("distill/mohawk: a mixer of the same letter with other options is replaced",
          "[distill][mohawk]") {
  const language_model<float> teacher(small_config("*-*-"), 1);
  auto config = small_config("*-*-");
  const auto change = GENERATE(0, 1, 2, 3);
  if (change == 0) config.attention.window = 8;
  if (change == 1) config.attention.kv_heads = 4;  // GQA to MHA
  if (change == 2) config.attention.rope->base = 500.0;
  if (change == 3) config.attention.scale = 0.1;
  const language_model<float> student(config, 2);
  CHECK(replaced_layers(teacher, student) == std::vector<index_t>{0, 2});
  CHECK(transfer_weights(teacher, student).size() == teacher.parameters().size() - 8);
  const auto ids = random_ids(1, 20, 3);
  const auto loss =
      mohawk_loss(mohawk_stage::matrix_orientation, teacher, student, pass<float>{}, ids);
  CHECK(loss.sum(0) > 0.01f);
}

TEST_CASE("distill/mohawk: options of the start replace no mixer", "[distill][mohawk]") {
  auto config = small_config("DmM");
  const language_model<float> teacher(config, 1);
  config.discrete_mamba2.identity_init = true;
  config.mamba1.dt_max = 0.2;
  config.mamba2.a_max = 8;
  const language_model<float> student(config, 2);
  CHECK(replaced_layers(teacher, student).empty());
  CHECK(transfer_weights(teacher, student).size() == teacher.parameters().size());
}

TEST_CASE("distill/mohawk: stages 1 and 2 with nothing to replace are one sentence",
          "[distill][mohawk][error]") {
  const language_model<float> teacher(small_config("*-"), 1), student(small_config("*-"), 2);
  const auto stage =
      GENERATE(mohawk_stage::matrix_orientation, mohawk_stage::hidden_state_alignment);
  const auto says = ssm_test::contains("every mixer of the student \"*-\" is the same function");
  CHECK_THROWS_WITH(mohawk_trained(stage, teacher, student), says);
  CHECK_THROWS_WITH(mohawk_loss(stage, teacher, student, pass<float>{}, random_ids(1, 5, 1)), says);
  CHECK_NOTHROW(mohawk_loss(mohawk_stage::distillation, teacher, student, pass<float>{},
                            random_ids(1, 5, 1)));
}

TEST_CASE("distill/mohawk: stages 1 and 2 train the replaced mixers only, stage 3 everything",
          "[distill][mohawk]") {
  const language_model<float> teacher(small_config("*-*-"), 1), student(small_config("*-M-"), 2);
  const auto count = [&](mohawk_stage stage) {
    return select_parameters(student.parameters(),
                             any_of_patterns{mohawk_trained(stage, teacher, student)})
        .trained.size();
  };
  CHECK(count(mohawk_stage::matrix_orientation) == 8);
  CHECK(count(mohawk_stage::hidden_state_alignment) == 8);
  CHECK(count(mohawk_stage::distillation) == student.parameters().size());
}

TEST_CASE("distill/mohawk: each stage lowers its own loss, with one micro-batch or several",
          "[distill][mohawk]") {
  const auto stage = GENERATE(mohawk_stage::matrix_orientation,
                              mohawk_stage::hidden_state_alignment, mohawk_stage::distillation);
  CAPTURE(to_string(stage));
  const language_model<float> teacher(small_config("*-*-"), 1);
  std::vector<double> first, last;
  for (const index_t micro : {index_t{0}, index_t{1}}) {
    const language_model<float> student(small_config("M-L-"), 2);
    transfer_weights(teacher, student);
    std::vector<std::uint8_t> text(4000);
    philox random(4);
    for (auto& c : text)
      c = static_cast<std::uint8_t>(random.below(19));
    const token_spans source{std::span<const std::uint8_t>(text)};
    data_loader loader(source, {.sequence_length = 32, .seed = 1});
    adamw<float> optimizer(select_parameters(student.parameters(), any_of_patterns{mohawk_trained(
                                                                       stage, teacher, student)})
                               .trained);
    std::vector<double> losses;
    train_mohawk_stage(
        stage, teacher, student, optimizer, loader,
        {.steps = 25, .tokens_per_step = 128, .learning_rate = 1e-2, .micro_batch = micro},
        {.on_step = [&](const step_info& i) { losses.push_back(i.loss); }});
    CHECK(losses.back() < 0.9 * losses.front());
    first.push_back(losses.front());
    last.push_back(losses[3]);
  }
  CHECK(first[0] == ssm_test::approx(first[1]).epsilon(1e-4));
  CHECK(last[0] == ssm_test::approx(last[1]).epsilon(1e-2));
}
