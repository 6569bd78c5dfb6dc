#pragma once

#include "golden_run.hpp"
#include <ssmlib/nn/conv1d.hpp>
#include <ssmlib/nn/norm.hpp>
#include <ssmlib/nn/rope.hpp>

namespace golden {

using namespace ssm;

struct causal_conv1d_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto x = values<3>(in, "in.x");
    const auto initial = values<3>(in, "in.initial_state");
    const auto weight = parameter<2>(in, "in.weight");
    const auto bias = parameter<1>(in, "in.bias");
    run<T, B> r(total, in, "one pass");
    tape<T, B> tape;
    tape.watch(x);
    tape.watch(initial);
    tape.watch(weight);
    tape.watch(bias);
    const auto out =
        op::causal_conv1d_with_state(pass<T, B>{.tape = &tape}, x, weight, bias,
                                     {.activation = conv1d_activation::silu, .initial = initial});
    tape.gradient(out.y).copy_from(values<3>(in, "cotangent.y"));
    tape.gradient(out.final_state).copy_from(values<3>(in, "cotangent.final_state"));
    tape.backward();
    r.compare("out.y", out.y);
    r.compare("out.final_state", out.final_state);
    r.compare("grad.x", tape.gradient(x));
    r.compare("grad.weight", tape.gradient(weight));
    r.compare("grad.bias", tape.gradient(bias));
    r.compare("grad.initial_state", tape.gradient(initial));
    r.finish();
  }
};

struct gated_rmsnorm_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto settings = in.file.template load<double, 1>("before_group_eps");
    const auto x = values<3>(in, "in.x");
    const auto z = values<3>(in, "in.z");
    const auto weight = parameter<1>(in, "in.weight");
    run<T, B> r(total, in, "one pass");
    tape<T, B> tape;
    tape.watch(x);
    tape.watch(z);
    tape.watch(weight);
    const auto y =
        op::gated_rms_norm(pass<T, B>{.tape = &tape}, x, z, weight,
                           settings(0) != 0 ? gate_order::norm_first : gate_order::gate_first,
                           {.eps = settings(2), .group = static_cast<index_t>(settings(1))});
    tape.gradient(y).copy_from(values<3>(in, "cotangent.y"));
    tape.backward();
    r.compare("out.y", y);
    r.compare("grad.x", tape.gradient(x));
    r.compare("grad.z", tape.gradient(z));
    r.compare("grad.weight", tape.gradient(weight));
    r.finish();
  }
};

struct rope_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto settings = in.file.template load<double, 1>("interleaved_fraction_first_base");
    const auto x = values<4>(in, "in.x");
    const std::vector<index_t> first(static_cast<std::size_t>(x.extent(0)),
                                     static_cast<index_t>(settings(2)));
    run<T, B> r(total, in, "one pass");
    tape<T, B> tape;
    tape.watch(x);
    const auto y =
        rope(pass<T, B>{.tape = &tape}, x,
             sequence_layout::rectangular(x.extent(0), x.extent(1)).at_positions(first),
             {.fraction = settings(1), .base = settings(3), .interleaved = settings(0) != 0});
    tape.gradient(y).copy_from(values<4>(in, "cotangent.y"));
    tape.backward();
    r.compare("out.y", y);
    r.compare("grad.x", tape.gradient(x));
    r.finish();
  }
};

}  // namespace golden
