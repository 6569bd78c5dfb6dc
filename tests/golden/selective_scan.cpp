#include "golden_state.hpp"
#include <ssmlib/lower/elementwise.hpp>
#include <ssmlib/lower/selective.hpp>
#include <ssmlib/lower/wrappers.hpp>

namespace golden {

namespace {

using namespace ssm;

template <class T>
void run_as(summary& total, const safetensors_reader& file) {
  const auto u = file.load<T, 3>("in.u"), dt = file.load<T, 3>("in.dt"),
             b = file.load<T, 3>("in.B"), c = file.load<T, 3>("in.C"), z = file.load<T, 3>("in.z");
  const auto a = file.load<T, 2>("in.A");
  const auto d = file.load<T, 1>("in.D"), dt_bias = file.load<T, 1>("in.dt_bias");
  const auto state = file.load<T, 3>("in.initial_state");
  const auto initial = state.reshape(state.extent(0), state.extent(1), state.extent(2), index_t{1});

  const auto with_group = [](const tensor<T, 3>& t) {
    return t.reshape(t.extent(0), t.extent(1), index_t{1}, t.extent(2));
  };
  const auto product = [&](const tensor<T, 3>& delta) {
    return (selective(delta, a, with_group(c), with_group(b)) + diagonal(d)) * channels(u);
  };
  for_each_algorithm(product(dt), [&](auto algorithm, const std::string& name) {
    run<T> r(total, file, name);
    tape<T> tape;
    for (const auto& t : {u, dt, b, c, z, state})
      tape.watch(t);
    for (const auto& t : {d, dt_bias})
      tape.watch(t);
    tape.watch(a);
    const auto delta = eval(softplus(dt + dt_bias), &tape);
    const auto out = eval_with_state(product(delta).with(algorithm), initial, tape);
    const auto y = eval(out.y.reshape(u.extent(0), u.extent(1), u.extent(2)) * silu(z), &tape);
    tape.gradient(y).copy_from(file.load<T, 3>("cotangent.y"));
    tape.gradient(out.final_state)
        .reshape(state.extent(0), state.extent(1), state.extent(2))
        .copy_from(file.load<T, 3>("cotangent.final_state"));
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

}  // namespace

void run_selective_scan(summary& total, const safetensors_reader& file) {
  run_as<float>(total, file);
  run_as<double>(total, file);
}

}  // namespace golden
