#include "golden_state.hpp"
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/nn/discretize.hpp>

namespace golden {

namespace {

using namespace ssm;

template <class T>
void run_as(summary& total, const safetensors_reader& file) {
  const auto x = file.load<T, 4>("in.x"), b = file.load<T, 4>("in.B"), c = file.load<T, 4>("in.C");
  const auto dt = file.load<T, 3>("in.dt");
  const auto a = file.load<T, 1>("in.A"), d = file.load<T, 1>("in.D"),
             dt_bias = file.load<T, 1>("in.dt_bias");
  const auto initial = exchanged(file.load<T, 4>("in.initial_state"));

  const auto product = [&](const discretized<T>& steps) {
    return (hadamard(semiseparable(steps.log_a, steps.delta), c * transpose(b)) + diagonal(d)) * x;
  };
  for_each_algorithm(product(discretize({}, dt, a, dt_bias)), [&](auto algorithm,
                                                                  const std::string& name) {
    run<T> r(total, file, name);
    tape<T> tape;
    for (const auto& t : {x, b, c, initial})
      tape.watch(t);
    for (const auto& t : {a, d, dt_bias})
      tape.watch(t);
    tape.watch(dt);
    const auto steps = discretize({.tape = &tape}, dt, a, dt_bias);
    const auto out = eval_with_state(product(steps).with(algorithm), initial, tape);
    tape.gradient(out.y).copy_from(file.load<T, 4>("cotangent.y"));
    tape.gradient(out.final_state).copy_from(exchanged(file.load<T, 4>("cotangent.final_state")));
    tape.backward();
    r.compare("out.y", out.y);
    r.compare("out.final_state", exchanged(out.final_state));
    r.compare("grad.x", tape.gradient(x));
    r.compare("grad.B", tape.gradient(b));
    r.compare("grad.C", tape.gradient(c));
    r.compare("grad.dt", tape.gradient(dt));
    r.compare("grad.A", tape.gradient(a));
    r.compare("grad.D", tape.gradient(d));
    r.compare("grad.dt_bias", tape.gradient(dt_bias));
    r.compare("grad.initial_state", exchanged(tape.gradient(initial)));
    r.finish();
  });
}

}  // namespace

void run_ssd(summary& total, const safetensors_reader& file) {
  run_as<float>(total, file);
  run_as<double>(total, file);
}

}  // namespace golden
