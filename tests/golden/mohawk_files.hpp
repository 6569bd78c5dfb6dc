#pragma once

#include "golden_run.hpp"
#include <ssmlib/distill/hidden_state_alignment.hpp>
#include <ssmlib/distill/matrix_orientation.hpp>
#include <ssmlib/lower/semiseparable.hpp>

namespace golden {

using namespace ssm;

/// Panels of matrices that are there; specialised where a backend has other ones.
template <class T, class B>
struct given_matrices {
  static auto panels_of(const tensor<accum_t<T>, 4, B>& matrices) { return panels(matrices); }
};

struct matrix_orientation_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto b = values<4>(in, "in.B");
    const auto c = values<4>(in, "in.C");
    const auto a_log = parameter<3>(in, "in.a_log");
    run<T, B> r(total, in, "panels");
    tape<T, B> tape;
    tape.watch(b);
    tape.watch(c);
    tape.watch(a_log);
    const auto student = hadamard(semiseparable(a_log), c * transpose(b));
    const auto teacher = given_matrices<T, B>::panels_of(parameter<4>(in, "teacher_matrix"));
    const auto loss =
        matrix_orientation_loss(pass<T, B>{.tape = &tape}, teacher, panels(student, &tape));
    tape.gradient(loss).copy_from(parameter<1>(in, "cotangent.loss"));
    tape.backward();
    r.compare("out.loss", loss);
    r.compare("grad.B", tape.gradient(b));
    r.compare("grad.C", tape.gradient(c));
    r.compare("grad.a_log", tape.gradient(a_log));
    r.finish();
  }
};

struct hidden_state_alignment_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto student = values<3>(in, "in.student");
    const auto teacher = values<3>(in, "in.teacher");
    run<T, B> r(total, in, "one pass");
    tape<T, B> tape;
    tape.watch(student);
    tape.watch(teacher);
    const auto loss = hidden_state_alignment_loss(pass<T, B>{.tape = &tape}, student, teacher);
    tape.gradient(loss).copy_from(parameter<1>(in, "cotangent.loss"));
    tape.backward();
    r.compare("out.loss", loss);
    r.compare("grad.student", tape.gradient(student));
    r.compare("grad.teacher", tape.gradient(teacher));
    r.finish();
  }
};

}  // namespace golden
