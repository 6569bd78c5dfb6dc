#include "../support/catch.hpp"
#include "../support/golden_files.hpp"
#include <ssmlib/train/losses.hpp>

namespace {

using namespace ssm;
using ssm_test::agrees;

/// An identity head, under which hidden states are logits.
template <Real T>
linear<T> identity_head(index_t n) {
  linear<T> head{tensor<T, 2>::zeros(n, n), {}};
  for (index_t i = 0; i < n; ++i)
    head.weight(i, i) = T(1);
  return head;
}

TEMPLATE_TEST_CASE("train/losses: distillation and both its gradients are the reference's",
                   "[train][losses][golden]", float, double) {
  const bool through_heads = GENERATE(false, true);
  const auto files = ssm_test::golden_files("kl_distillation");
  REQUIRE_FALSE(files.empty());
  for (const auto& path : files) {
    CAPTURE(path, through_heads);
    const safetensors_reader file(path);
    const auto student = file.load<TestType, 3>("in.student_logits");
    const auto teacher = file.load<TestType, 3>("in.teacher_logits");
    const auto mask = file.load<std::int32_t, 2>("mask");
    const kl_options o{.temperature = file.load_scalar("temperature")};
    tape<TestType> tape;
    tape.watch(student);
    tape.watch(teacher);
    const pass<TestType> p{.tape = &tape};
    const auto head = identity_head<TestType>(student.extent(2));
    const auto r = through_heads ? lm_kl_divergence(p, student, head, teacher, head, mask, o)
                                 : kl_divergence(p, student, teacher, mask, o);
    tape.gradient(r.loss).copy_from(file.load<TestType, 1>("cotangent.loss"));
    tape.backward();
    CHECK(agrees(file, "out.loss", r.loss));
    CHECK(agrees(file, "grad.student_logits", tape.gradient(student)));
    CHECK(agrees(file, "grad.teacher_logits", tape.gradient(teacher)));
  }
}

TEMPLATE_TEST_CASE("train/losses: DPO and its four gradients are the reference's",
                   "[train][losses][golden]", float, double) {
  const auto files = ssm_test::golden_files("dpo_loss");
  REQUIRE_FALSE(files.empty());
  for (const auto& path : files) {
    CAPTURE(path);
    const safetensors_reader file(path);
    const std::vector<std::string> names{"policy_chosen", "policy_rejected", "reference_chosen",
                                         "reference_rejected"};
    std::vector<tensor<TestType, 1>> v;
    tape<TestType> tape;
    for (const auto& name : names) {
      v.push_back(file.load<TestType, 1>("in." + name));
      tape.watch(v.back());
    }
    const auto r =
        dpo_loss(pass<TestType>{.tape = &tape}, v[0], v[1], v[2], v[3], file.load_scalar("beta"));
    tape.gradient(r.loss).copy_from(file.load<TestType, 1>("cotangent.loss"));
    tape.backward();
    CHECK(agrees(file, "out.loss", r.loss));
    for (std::size_t i = 0; i < names.size(); ++i) {
      CHECK(agrees(file, "grad." + names[i], tape.gradient(v[i])));
    }
  }
}

}  // namespace
