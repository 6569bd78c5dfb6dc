#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/distill/mohawk.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

using namespace ssm;
using ssm_test::small_config;

namespace {

using documents = std::vector<std::vector<std::int32_t>>;

documents some_documents(const std::vector<index_t>& lengths, std::uint64_t seed) {
  philox random(seed);
  documents list;
  for (const index_t n : lengths) {
    std::vector<std::int32_t> d(static_cast<std::size_t>(n));
    for (auto& id : d)
      id = static_cast<std::int32_t>(random.below(19));
    list.push_back(d);
  }
  return list;
}

struct outcome {
  double sum = 0;
  index_t count = 0;
  std::vector<tensor<double, 1>> gradients;
};

// The loss and the gradients of all batches together.
template <class F>
outcome run(const std::vector<parameter<double>>& parameters,
            const std::vector<token_batch>& batches, F loss) {
  tape<double> t;
  for (const auto& p : parameters)
    t.watch(p.value);
  outcome o;
  for (const token_batch& b : batches) {
    const loss_sum<double> l = loss(pass<double>{.tape = &t}, b);
    o.sum += l.sum(0);
    o.count += l.count;
    t.gradient(l.sum).fill(1);
    t.backward();
    t.clear();
  }
  for (const auto& p : parameters)
    o.gradients.push_back(t.gradient(p.value).clone());
  return o;
}

// Packed documents against each of them as a rectangle of its own.
template <class F>
void check_packed(const std::vector<parameter<double>>& parameters, const documents& all, F loss) {
  std::vector<token_batch> separate;
  for (const auto& d : all) {
    token_batch b = pack_documents(documents{d});
    b.layout = {};
    separate.push_back(b);
  }
  const outcome one = run(parameters, {pack_documents(all)}, loss);
  const outcome each = run(parameters, separate, loss);
  CHECK(one.count == each.count);
  CHECK(std::abs(one.sum - each.sum) <= 1e-12 * std::abs(each.sum));
  double norm = 0, worst = 0;
  for (std::size_t k = 0; k < parameters.size(); ++k) {
    for (index_t i = 0; i < one.gradients[k].size(); ++i) {
      norm = std::max(norm, std::abs(each.gradients[k](i)));
      worst = std::max(worst, std::abs(one.gradients[k](i) - each.gradients[k](i)));
    }
  }
  CHECK(norm > 1e-3);
  CHECK(worst <= 1e-12 * std::max(1.0, norm));
}

// Documents in groups of three, packed.
struct document_loader {
  documents all;
  std::size_t at = 0;

  token_batch next(index_t) {
    documents three;
    for (int i = 0; i < 3; ++i)
      three.push_back(all[at++ % all.size()]);
    return pack_documents(three);
  }
  std::size_t state() const { return at; }
  void restore(std::size_t s) { at = s; }
  index_t sequence_length() const { return 1; }
};

}  // namespace

TEST_CASE("train/data: packed documents predict nothing across a boundary", "[train][data]") {
  const documents all = {{1, 2, 3}, {}, {4}, {5, 6}};
  const token_batch b = pack_documents(all);
  REQUIRE(b.inputs.extents() == shape<2>{1, 6});
  CHECK(b.layout.sequences() == 4);
  const std::vector<std::int32_t> inputs(b.inputs.data(), b.inputs.data() + 6),
      targets(b.targets.data(), b.targets.data() + 6);
  CHECK(inputs == std::vector<std::int32_t>{1, 2, 3, 4, 5, 6});
  CHECK(targets == std::vector<std::int32_t>{2, 3, no_target, no_target, 6, no_target});
}

TEST_CASE("train/next_token: packed documents give the loss and gradients of separate ones",
          "[train][losses][ragged]") {
  const std::string pattern = GENERATE(as<std::string>{}, "*-", "* with a window", "M-", "m", "D",
                                       "R", "L", "G", "P", "p", "M*-");
  CAPTURE(pattern);
  auto config = small_config(pattern.substr(0, pattern.find(' ')));
  if (pattern.ends_with("window")) config.attention.window = 5;
  const language_model<double> m(config, 1);
  check_packed(
      m.parameters(), some_documents({9, 2, 70, 17}, 3),
      [&](const pass<double>& p, const token_batch& b) { return next_token_loss(m, p, b); });
}

TEST_CASE("distill/mohawk: packed documents give every stage's loss and gradients of separate ones",
          "[distill][mohawk][ragged]") {
  const auto stage = GENERATE(mohawk_stage::matrix_orientation,
                              mohawk_stage::hidden_state_alignment, mohawk_stage::distillation);
  CAPTURE(to_string(stage));
  const language_model<double> teacher(small_config("*-*-"), 1), student(small_config("M-L-"), 2);
  const auto patterns = any_of_patterns{mohawk_trained(stage, teacher, student)};
  const auto trained = select_parameters(student.parameters(), patterns).trained;
  check_packed(trained, some_documents({9, 2, 70, 17}, 3),
               [&](const pass<double>& p, const token_batch& b) {
                 return mohawk_loss(stage, teacher, student, p, b);
               });
}

TEST_CASE("distill/mohawk: a stage trains on packed documents", "[distill][mohawk][ragged]") {
  const auto stage = GENERATE(mohawk_stage::matrix_orientation,
                              mohawk_stage::hidden_state_alignment, mohawk_stage::distillation);
  CAPTURE(to_string(stage));
  const language_model<float> teacher(small_config("*-"), 1), student(small_config("M-"), 2);
  transfer_weights(teacher, student);
  document_loader loader{some_documents({20, 3, 11, 1, 30, 8}, 4)};
  adamw<float> optimizer(select_parameters(student.parameters(),
                                           any_of_patterns{mohawk_trained(stage, teacher, student)})
                             .trained);
  std::vector<step_info> steps;
  train_mohawk_stage(stage, teacher, student, optimizer, loader,
                     {.steps = 20, .tokens_per_step = 1, .learning_rate = 1e-2},
                     {.on_step = [&](const step_info& i) { steps.push_back(i); }});
  // Steps alternate between two batches.
  CHECK(steps[18].loss < 0.9 * steps[0].loss);
  CHECK(steps[19].loss < 0.9 * steps[1].loss);
  const index_t tokens = stage == mohawk_stage::hidden_state_alignment ? 34 : 31;
  CHECK(steps[0].tokens == (stage == mohawk_stage::matrix_orientation ? 3 : tokens));
}

TEST_CASE("train/next_token: a layout of other tokens is refused", "[train][losses][error]") {
  const language_model<float> m(small_config("M"), 1);
  auto batch = pack_documents(some_documents({5, 4}, 1));
  batch.layout = sequence_layout::from_lengths({5, 5});
  CHECK_THROWS_WITH(next_token_loss(m, pass<float>{}, batch),
                    ssm_test::contains("the layout has 10 tokens"));
}
