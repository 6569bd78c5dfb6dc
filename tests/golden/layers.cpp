#include "golden_run.hpp"
#include <ssmlib/nn/conv1d.hpp>
#include <ssmlib/nn/norm.hpp>
#include <ssmlib/nn/rope.hpp>

namespace golden {

namespace {

using namespace ssm;

template <class T>
void run_causal_conv1d_as(summary& total, const safetensors_reader& file) {
  const auto x = file.load<T, 3>("in.x"), initial = file.load<T, 3>("in.initial_state");
  const auto weight = file.load<T, 2>("in.weight");
  const auto bias = file.load<T, 1>("in.bias");
  run<T> r(total, file, "one pass");
  tape<T> tape;
  tape.watch(x);
  tape.watch(initial);
  tape.watch(weight);
  tape.watch(bias);
  const auto out =
      op::causal_conv1d_with_state(pass<T>{.tape = &tape}, x, weight, bias,
                                   {.activation = conv1d_activation::silu, .initial = initial});
  tape.gradient(out.y).copy_from(file.load<T, 3>("cotangent.y"));
  tape.gradient(out.final_state).copy_from(file.load<T, 3>("cotangent.final_state"));
  tape.backward();
  r.compare("out.y", out.y);
  r.compare("out.final_state", out.final_state);
  r.compare("grad.x", tape.gradient(x));
  r.compare("grad.weight", tape.gradient(weight));
  r.compare("grad.bias", tape.gradient(bias));
  r.compare("grad.initial_state", tape.gradient(initial));
  r.finish();
}

template <class T>
void run_gated_rmsnorm_as(summary& total, const safetensors_reader& file) {
  const auto settings = file.load<double, 1>("before_group_eps");
  const auto x = file.load<T, 3>("in.x"), z = file.load<T, 3>("in.z");
  const auto weight = file.load<T, 1>("in.weight");
  run<T> r(total, file, "one pass");
  tape<T> tape;
  tape.watch(x);
  tape.watch(z);
  tape.watch(weight);
  const auto y =
      op::gated_rms_norm(pass<T>{.tape = &tape}, x, z, weight,
                         settings(0) != 0 ? gate_order::norm_first : gate_order::gate_first,
                         {.eps = settings(2), .group = static_cast<index_t>(settings(1))});
  tape.gradient(y).copy_from(file.load<T, 3>("cotangent.y"));
  tape.backward();
  r.compare("out.y", y);
  r.compare("grad.x", tape.gradient(x));
  r.compare("grad.z", tape.gradient(z));
  r.compare("grad.weight", tape.gradient(weight));
  r.finish();
}

template <class T>
void run_rope_as(summary& total, const safetensors_reader& file) {
  const auto settings = file.load<double, 1>("interleaved_fraction_first_base");
  const auto x = file.load<T, 4>("in.x");
  const std::vector<index_t> first(static_cast<std::size_t>(x.extent(0)),
                                   static_cast<index_t>(settings(2)));
  run<T> r(total, file, "one pass");
  tape<T> tape;
  tape.watch(x);
  const auto y =
      rope(pass<T>{.tape = &tape}, x,
           sequence_layout::rectangular(x.extent(0), x.extent(1)).at_positions(first),
           {.fraction = settings(1), .base = settings(3), .interleaved = settings(0) != 0});
  tape.gradient(y).copy_from(file.load<T, 4>("cotangent.y"));
  tape.backward();
  r.compare("out.y", y);
  r.compare("grad.x", tape.gradient(x));
  r.finish();
}

}  // namespace

void run_causal_conv1d(summary& total, const safetensors_reader& file) {
  run_causal_conv1d_as<float>(total, file);
  run_causal_conv1d_as<double>(total, file);
}
void run_gated_rmsnorm(summary& total, const safetensors_reader& file) {
  run_gated_rmsnorm_as<float>(total, file);
  run_gated_rmsnorm_as<double>(total, file);
}
void run_rope(summary& total, const safetensors_reader& file) {
  run_rope_as<float>(total, file);
  run_rope_as<double>(total, file);
}

}  // namespace golden
