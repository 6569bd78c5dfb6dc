#pragma once

#include "golden_state.hpp"
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/wrappers.hpp>

namespace golden {

using namespace ssm;

struct selective_scan_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto u = values<3>(in, "in.u");
    const auto dt = values<3>(in, "in.dt");
    const auto b = values<3>(in, "in.B");
    const auto c = values<3>(in, "in.C");
    const auto z = values<3>(in, "in.z");
    const auto a = parameter<2>(in, "in.A");
    const auto d = parameter<1>(in, "in.D");
    const auto dt_bias = values<1>(in, "in.dt_bias");
    const auto state = parameter<3>(in, "in.initial_state");
    const auto initial =
        state.reshape(state.extent(0), state.extent(1), state.extent(2), index_t{1});

    const auto with_group = [](const tensor<T, 3, B>& t) {
      return t.reshape(t.extent(0), t.extent(1), index_t{1}, t.extent(2));
    };
    const auto product = [&](const tensor<T, 3, B>& delta) {
      return (selective(delta, a, with_group(c), with_group(b)) + diagonal(d)) * channels(u);
    };
    for_each_algorithm(total, in, product(dt), [&](auto algorithm, const std::string& name) {
      run<T, B> r(total, in, name);
      tape<T, B> tape;
      for (const auto& t : {u, dt, b, c, z})
        tape.watch(t);
      tape.watch(state);
      tape.watch(d);
      tape.watch(dt_bias);
      tape.watch(a);
      const auto raw = stored(in, eval_as<T>(dt + dt_bias, &tape));
      const auto delta = stored(in, eval_as<T>(softplus(raw), &tape));
      const auto out = eval_with_state(product(delta).with(algorithm), initial, tape);
      (void)stored(in, out.y);
      const auto y =
          eval_as<T>(out.y.reshape(u.extent(0), u.extent(1), u.extent(2)) * silu(z), &tape);
      tape.gradient(y).copy_from(values<3>(in, "cotangent.y"));
      tape.gradient(out.final_state)
          .reshape(state.extent(0), state.extent(1), state.extent(2))
          .copy_from(parameter<3>(in, "cotangent.final_state"));
      tape.backward();
      r.compare("out.y", y);
      r.compare("out.final_state",
                out.final_state.reshape(state.extent(0), state.extent(1), state.extent(2)));
      r.compare("grad.u", tape.gradient(u));
      r.compare("grad.dt", tape.gradient(dt));
      r.compare("grad.A", tape.gradient(a));
      r.compare("grad.B", tape.gradient(b));
      r.compare("grad.C", tape.gradient(c));
      r.compare("grad.D", tape.gradient(d));
      r.compare("grad.z", tape.gradient(z));
      r.compare("grad.dt_bias", tape.gradient(dt_bias));
      r.compare("grad.initial_state", tape.gradient(state));
      r.finish();
    });
  }
};

}  // namespace golden
