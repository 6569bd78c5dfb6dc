#pragma once

#include "golden_state.hpp"
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/gated_linear.hpp>
#include <ssmlib/nn/l2_normalize.hpp>

namespace golden {

using namespace ssm;

struct gated_linear_attention_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto q = values<4>(in, "in.q");
    const auto k = values<4>(in, "in.k");
    const auto v = values<4>(in, "in.v");
    const auto log_gate = parameter<4>(in, "in.log_gate");
    const auto initial = parameter<4>(in, "in.initial_state");
    const auto product = gated(log_gate, q * transpose(k)) * v;
    for_each_algorithm(total, in, product, [&](auto algorithm, const std::string& name) {
      run<T, B> r(total, in, name);
      tape<T, B> tape;
      for (const auto& t : {q, k, v})
        tape.watch(t);
      for (const auto& t : {log_gate, initial})
        tape.watch(t);
      const auto out = eval_with_state(product.with(algorithm), initial, tape);
      tape.gradient(out.y).copy_from(values<4>(in, "cotangent.y"));
      tape.gradient(out.final_state).copy_from(parameter<4>(in, "cotangent.final_state"));
      tape.backward();
      r.compare("out.y", out.y);
      r.compare("out.final_state", out.final_state);
      r.compare("grad.q", tape.gradient(q));
      r.compare("grad.k", tape.gradient(k));
      r.compare("grad.v", tape.gradient(v));
      r.compare("grad.log_gate", tape.gradient(log_gate));
      r.compare("grad.initial_state", tape.gradient(initial));
      r.finish();
    });
  }
};

struct gated_delta_rule_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto q = values<4>(in, "in.q");
    const auto k = values<4>(in, "in.k");
    const auto v = values<4>(in, "in.v");
    const auto initial = parameter<4>(in, "in.initial_state");
    const auto log_decay = parameter<3>(in, "in.log_decay");
    const auto beta = parameter<3>(in, "in.beta");
    const auto product = [&](const tensor<T, 4, B>& keys) {
      return delta_rule(log_decay, beta, q * transpose(keys)) * v;
    };
    for_each_algorithm(total, in, product(k), [&](auto algorithm, const std::string& name) {
      run<T, B> r(total, in, name);
      tape<T, B> tape;
      for (const auto& t : {q, k, v})
        tape.watch(t);
      tape.watch(initial);
      for (const auto& t : {log_decay, beta})
        tape.watch(t);
      const auto keys = stored(in, l2_normalize(pass<T, B>{.tape = &tape}, k, 0));
      const auto out = eval_with_state(product(keys).with(algorithm), initial, tape);
      tape.gradient(out.y).copy_from(values<4>(in, "cotangent.y"));
      tape.gradient(out.final_state).copy_from(parameter<4>(in, "cotangent.final_state"));
      tape.backward();
      r.compare("out.y", out.y);
      r.compare("out.final_state", out.final_state);
      r.compare("grad.q", tape.gradient(q));
      r.compare("grad.k", tape.gradient(k));
      r.compare("grad.v", tape.gradient(v));
      r.compare("grad.log_decay", tape.gradient(log_decay));
      r.compare("grad.beta", tape.gradient(beta));
      r.compare("grad.initial_state", tape.gradient(initial));
      r.finish();
    });
  }
};

}  // namespace golden
