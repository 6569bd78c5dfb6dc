#pragma once

#include "golden_state.hpp"
#include <ssmlib/lower/semiseparable.hpp>
#include <ssmlib/nn/discretize.hpp>

namespace golden {

using namespace ssm;

struct ssd_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto x = values<4>(in, "in.x");
    const auto b = values<4>(in, "in.B");
    const auto c = values<4>(in, "in.C");
    const auto dt = values<3>(in, "in.dt");
    const auto a = parameter<1>(in, "in.A");
    const auto d = parameter<1>(in, "in.D");
    const auto dt_bias = parameter<1>(in, "in.dt_bias");
    const auto initial = exchanged(parameter<4>(in, "in.initial_state"));

    const auto product = [&](const discretized<T, B>& steps) {
      return (hadamard(semiseparable(steps.log_a, steps.delta), c * transpose(b)) + diagonal(d)) *
             x;
    };
    for_each_algorithm(total, in, product(discretize(pass<T, B>{}, dt, a, dt_bias)),
                       [&](auto algorithm, const std::string& name) {
                         run<T, B> r(total, in, name);
                         tape<T, B> tape;
                         for (const auto& t : {x, b, c})
                           tape.watch(t);
                         tape.watch(initial);
                         for (const auto& t : {a, d, dt_bias})
                           tape.watch(t);
                         tape.watch(dt);
                         const auto steps = discretize(pass<T, B>{.tape = &tape}, dt, a, dt_bias);
                         const auto out =
                             eval_with_state(product(steps).with(algorithm), initial, tape);
                         tape.gradient(out.y).copy_from(values<4>(in, "cotangent.y"));
                         tape.gradient(out.final_state)
                             .copy_from(exchanged(parameter<4>(in, "cotangent.final_state")));
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
};

}  // namespace golden
