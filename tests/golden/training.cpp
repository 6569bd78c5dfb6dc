#include "golden_run.hpp"
#include <ssmlib/train/adamw.hpp>
#include <ssmlib/train/losses.hpp>

namespace golden {

namespace {

using namespace ssm;

/// A head under which hidden states are logits.
template <class T>
linear<T> identity_head(index_t n) {
  linear<T> head{tensor<T, 2>::zeros(n, n), {}};
  for (index_t i = 0; i < n; ++i)
    head.weight(i, i) = T(1);
  return head;
}

template <class T>
void run_kl_distillation_as(summary& total, const safetensors_reader& file) {
  const auto student = file.load<T, 3>("in.student_logits"),
             teacher = file.load<T, 3>("in.teacher_logits");
  const auto mask = file.load<std::int32_t, 2>("mask");
  for (const bool through_heads : {false, true}) {
    run<T> r(total, file, through_heads ? "blocks of logits" : "logits");
    tape<T> tape;
    tape.watch(student);
    tape.watch(teacher);
    const pass<T> p{.tape = &tape};
    kl_options o{.temperature = file.load_scalar("temperature")};
    const auto head = identity_head<T>(student.extent(2));
    if (through_heads) o.block_tokens = 7;
    const auto out = through_heads ? lm_kl_divergence(p, student, head, teacher, head, mask, o)
                                   : kl_divergence(p, student, teacher, mask, o);
    tape.gradient(out.loss).copy_from(file.load<T, 1>("cotangent.loss"));
    tape.backward();
    r.compare("out.loss", out.loss);
    r.compare("grad.student_logits", tape.gradient(student));
    r.compare("grad.teacher_logits", tape.gradient(teacher));
    r.finish();
  }
}

template <class T>
void run_dpo_loss_as(summary& total, const safetensors_reader& file) {
  const std::vector<std::string> names{"policy_chosen", "policy_rejected", "reference_chosen",
                                       "reference_rejected"};
  run<T> r(total, file, "one pass");
  tape<T> tape;
  std::vector<tensor<T, 1>> v;
  for (const auto& name : names) {
    v.push_back(file.load<T, 1>("in." + name));
    tape.watch(v.back());
  }
  const auto out = dpo_loss<T>({.tape = &tape}, v[0], v[1], v[2], v[3], file.load_scalar("beta"));
  tape.gradient(out.loss).copy_from(file.load<T, 1>("cotangent.loss"));
  tape.backward();
  r.compare("out.loss", out.loss);
  for (std::size_t i = 0; i < names.size(); ++i)
    r.compare("grad." + names[i], tape.gradient(v[i]));
  r.finish();
}

template <class T>
void run_adamw_as(summary& total, const safetensors_reader& file) {
  const auto settings = file.load<double, 1>("in.lr_beta1_beta2_eps_decay");
  const auto w = file.load<T, 2>("in.w");
  const auto gradients = file.load<T, 3>("in.grads");
  run<T> r(total, file, "one step a gradient");
  tape<T> tape;
  tape.watch(w);
  adamw<T> optimizer(
      {{"w", w.reshape(w.size()), {w.extent(0), w.extent(1)}, parameter_kind::matrix}},
      {.beta1 = settings(1),
       .beta2 = settings(2),
       .epsilon = settings(3),
       .weight_decay = settings(4)});
  tensor<T, 3> trajectory(gradients.extents());
  const auto at = [&](const tensor<T, 3>& t, index_t i) {
    return t.slice(0, i, i + 1).reshape(w.extent(0), w.extent(1));
  };
  for (index_t i = 0; i < gradients.extent(0); ++i) {
    tape.gradient(w).copy_from(at(gradients, i));
    optimizer.step(tape, settings(0));
    at(trajectory, i).copy_from(w);
  }
  r.compare("out.trajectory", trajectory);
  r.finish();
}

}  // namespace

void run_kl_distillation(summary& total, const safetensors_reader& file) {
  run_kl_distillation_as<float>(total, file);
  run_kl_distillation_as<double>(total, file);
}
void run_dpo_loss(summary& total, const safetensors_reader& file) {
  run_dpo_loss_as<float>(total, file);
  run_dpo_loss_as<double>(total, file);
}
void run_adamw(summary& total, const safetensors_reader& file) {
  run_adamw_as<float>(total, file);
  run_adamw_as<double>(total, file);
}

}  // namespace golden
