#include "golden_run.hpp"
#include <ssmlib/distill/hidden_state_alignment.hpp>
#include <ssmlib/distill/matrix_orientation.hpp>
#include <ssmlib/lower/semiseparable.hpp>

namespace golden {

namespace {

using namespace ssm;

template <class T>
void run_matrix_orientation_as(summary& total, const inputs<T>& in) {
  const safetensors_reader& file = in.file;
  const auto b = file.load<T, 4>("in.B"), c = file.load<T, 4>("in.C");
  const auto a_log = file.load<T, 3>("in.a_log");
  run<T> r(total, in, "panels");
  tape<T> tape;
  tape.watch(b);
  tape.watch(c);
  tape.watch(a_log);
  const auto student = hadamard(semiseparable(a_log), c * transpose(b));
  const auto loss = matrix_orientation_loss<T>(
      {.tape = &tape}, panels(file.load<T, 4>("teacher_matrix")), panels(student, &tape));
  tape.gradient(loss).copy_from(file.load<T, 1>("cotangent.loss"));
  tape.backward();
  r.compare("out.loss", loss);
  r.compare("grad.B", tape.gradient(b));
  r.compare("grad.C", tape.gradient(c));
  r.compare("grad.a_log", tape.gradient(a_log));
  r.finish();
}

template <class T>
void run_hidden_state_alignment_as(summary& total, const inputs<T>& in) {
  const safetensors_reader& file = in.file;
  const auto student = file.load<T, 3>("in.student"), teacher = file.load<T, 3>("in.teacher");
  run<T> r(total, in, "one pass");
  tape<T> tape;
  tape.watch(student);
  tape.watch(teacher);
  const auto loss = hidden_state_alignment_loss<T>({.tape = &tape}, student, teacher);
  tape.gradient(loss).copy_from(file.load<T, 1>("cotangent.loss"));
  tape.backward();
  r.compare("out.loss", loss);
  r.compare("grad.student", tape.gradient(student));
  r.compare("grad.teacher", tape.gradient(teacher));
  r.finish();
}

}  // namespace

void run_matrix_orientation(summary& total, const safetensors_reader& file) {
  run_matrix_orientation_as(total, inputs<float>(file));
  run_matrix_orientation_as(total, inputs<double>(file));
}
void run_hidden_state_alignment(summary& total, const safetensors_reader& file) {
  run_hidden_state_alignment_as(total, inputs<float>(file));
  run_hidden_state_alignment_as(total, inputs<double>(file));
}

}  // namespace golden
