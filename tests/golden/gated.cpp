#include "golden_state.hpp"
#include <ssmlib/lower/delta_rule.hpp>
#include <ssmlib/lower/gated_linear.hpp>
#include <ssmlib/nn/l2_normalize.hpp>

namespace golden {

namespace {

using namespace ssm;

template <class T>
void run_gated_linear_as(summary& total, const safetensors_reader& file) {
  const auto q = file.load<T, 4>("in.q"), k = file.load<T, 4>("in.k"), v = file.load<T, 4>("in.v"),
             log_gate = file.load<T, 4>("in.log_gate"),
             initial = file.load<T, 4>("in.initial_state");
  const auto product = gated(log_gate, q * transpose(k)) * v;
  for_each_algorithm(product, [&](auto algorithm, const std::string& name) {
    run<T> r(total, file, name);
    tape<T> tape;
    for (const auto& t : {q, k, v, log_gate, initial})
      tape.watch(t);
    const auto out = eval_with_state(product.with(algorithm), initial, tape);
    tape.gradient(out.y).copy_from(file.load<T, 4>("cotangent.y"));
    tape.gradient(out.final_state).copy_from(file.load<T, 4>("cotangent.final_state"));
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

template <class T>
void run_delta_rule_as(summary& total, const safetensors_reader& file) {
  const auto q = file.load<T, 4>("in.q"), k = file.load<T, 4>("in.k"), v = file.load<T, 4>("in.v"),
             initial = file.load<T, 4>("in.initial_state");
  const auto log_decay = file.load<T, 3>("in.log_decay"), beta = file.load<T, 3>("in.beta");
  const auto product = [&](const tensor<T, 4>& keys) {
    return delta_rule(log_decay, beta, q * transpose(keys)) * v;
  };
  for_each_algorithm(product(k), [&](auto algorithm, const std::string& name) {
    run<T> r(total, file, name);
    tape<T> tape;
    for (const auto& t : {q, k, v, initial})
      tape.watch(t);
    for (const auto& t : {log_decay, beta})
      tape.watch(t);
    const auto keys = l2_normalize(pass<T>{.tape = &tape}, k, 0);
    const auto out = eval_with_state(product(keys).with(algorithm), initial, tape);
    tape.gradient(out.y).copy_from(file.load<T, 4>("cotangent.y"));
    tape.gradient(out.final_state).copy_from(file.load<T, 4>("cotangent.final_state"));
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

}  // namespace

void run_gated_linear_attention(summary& total, const safetensors_reader& file) {
  run_gated_linear_as<float>(total, file);
  run_gated_linear_as<double>(total, file);
}
void run_gated_delta_rule(summary& total, const safetensors_reader& file) {
  run_delta_rule_as<float>(total, file);
  run_delta_rule_as<double>(total, file);
}

}  // namespace golden
