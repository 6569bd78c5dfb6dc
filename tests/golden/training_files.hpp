#pragma once

#include "golden_run.hpp"
#include <ssmlib/train/adamw.hpp>
#include <ssmlib/train/losses.hpp>

namespace golden {

using namespace ssm;

/// A head under which hidden states are logits.
template <class T, class B>
linear<T, B> identity_head(index_t n) {
  auto weight = tensor<accum_t<T>, 2>::zeros(n, n);
  for (index_t i = 0; i < n; ++i)
    weight(i, i) = 1;
  return {ssm::detail::on_backend<B>(weight), {}};
}

struct kl_distillation_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto student = values<3>(in, "in.student_logits");
    const auto teacher = values<3>(in, "in.teacher_logits");
    const auto mask = in.file.template load<std::int32_t, 2>("mask");
    for (const bool through_heads : {false, true}) {
      run<T, B> r(total, in, through_heads ? "blocks of logits" : "logits");
      tape<T, B> tape;
      tape.watch(student);
      tape.watch(teacher);
      const pass<T, B> p{.tape = &tape};
      kl_options o{.temperature = in.file.load_scalar("temperature")};
      const auto head = identity_head<T, B>(student.extent(2));
      if (through_heads) o.block_tokens = 7;
      const auto out = through_heads ? lm_kl_divergence(p, student, head, teacher, head, mask, o)
                                     : kl_divergence(p, student, teacher, mask, o);
      tape.gradient(out.loss).copy_from(parameter<1>(in, "cotangent.loss"));
      tape.backward();
      r.compare("out.loss", out.loss);
      r.compare("grad.student_logits", tape.gradient(student));
      r.compare("grad.teacher_logits", tape.gradient(teacher));
      r.finish();
    }
  }
};

struct dpo_loss_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const std::vector<std::string> names{"policy_chosen", "policy_rejected", "reference_chosen",
                                         "reference_rejected"};
    run<T, B> r(total, in, "one pass");
    tape<T, B> tape;
    std::vector<tensor<accum_t<T>, 1, B>> v;
    for (const auto& name : names) {
      v.push_back(parameter<1>(in, "in." + name));
      tape.watch(v.back());
    }
    const auto out =
        dpo_loss(pass<T, B>{.tape = &tape}, v[0], v[1], v[2], v[3], in.file.load_scalar("beta"));
    tape.gradient(out.loss).copy_from(parameter<1>(in, "cotangent.loss"));
    tape.backward();
    r.compare("out.loss", out.loss);
    for (std::size_t i = 0; i < names.size(); ++i)
      r.compare("grad." + names[i], tape.gradient(v[i]));
    r.finish();
  }
};

struct adamw_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto settings = in.file.template load<double, 1>("in.lr_beta1_beta2_eps_decay");
    const auto w = parameter<2>(in, "in.w");
    const auto gradients = parameter<3>(in, "in.grads");
    run<T, B> r(total, in, "one step a gradient");
    tape<T, B> tape;
    tape.watch(w);
    adamw<T, B> optimizer(
        {{"w", w.reshape(w.size()), {w.extent(0), w.extent(1)}, parameter_kind::matrix}},
        {.beta1 = settings(1),
         .beta2 = settings(2),
         .epsilon = settings(3),
         .weight_decay = settings(4)});
    tensor<accum_t<T>, 3, B> trajectory(gradients.extents());
    const auto at = [&](const tensor<accum_t<T>, 3, B>& t, index_t i) {
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
};

}  // namespace golden
