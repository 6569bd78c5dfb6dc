#include "../support/catch.hpp"
#include "../support/golden_files.hpp"
#include <ssmlib/nn/conv1d.hpp>
#include <ssmlib/nn/norm.hpp>

namespace {

using namespace ssm;
using ssm_test::agrees;

TEMPLATE_TEST_CASE("nn/golden: gated RMSNorm and its gradients are the reference's",
                   "[nn][norm][golden]", float, double) {
  const auto files = ssm_test::golden_files("gated_rmsnorm");
  REQUIRE_FALSE(files.empty());
  for (const auto& path : files) {
    CAPTURE(path);
    const safetensors_reader file(path);
    const auto settings = file.load<double, 1>("before_group_eps");
    const auto x = file.load<TestType, 3>("in.x"), z = file.load<TestType, 3>("in.z");
    const auto weight = file.load<TestType, 1>("in.weight");
    tape<TestType> tape;
    tape.watch(x);
    tape.watch(z);
    tape.watch(weight);
    const auto y =
        op::gated_rms_norm(pass<TestType>{.tape = &tape}, x, z, weight,
                           settings(0) != 0 ? gate_order::norm_first : gate_order::gate_first,
                           {.eps = settings(2), .group = static_cast<index_t>(settings(1))});
    tape.gradient(y).copy_from(file.load<TestType, 3>("cotangent.y"));
    tape.backward();
    CHECK(agrees(file, "out.y", y));
    CHECK(agrees(file, "grad.x", tape.gradient(x)));
    CHECK(agrees(file, "grad.z", tape.gradient(z)));
    CHECK(agrees(file, "grad.weight", tape.gradient(weight)));
  }
}

TEMPLATE_TEST_CASE(
    "nn/golden: the causal convolution with silu and its gradients are the reference's",
    "[nn][conv1d][golden]", float, double) {
  const auto files = ssm_test::golden_files("causal_conv1d_silu");
  REQUIRE_FALSE(files.empty());
  for (const auto& path : files) {
    CAPTURE(path);
    const safetensors_reader file(path);
    const auto x = file.load<TestType, 3>("in.x");
    const auto weight = file.load<TestType, 2>("in.weight");
    const auto bias = file.load<TestType, 1>("in.bias");
    const auto initial = file.load<TestType, 3>("in.initial_state");
    tape<TestType> tape;
    tape.watch(x);
    tape.watch(weight);
    tape.watch(bias);
    tape.watch(initial);
    const auto r =
        op::causal_conv1d_with_state(pass<TestType>{.tape = &tape}, x, weight, bias,
                                     {.activation = conv1d_activation::silu, .initial = initial});
    tape.gradient(r.y).copy_from(file.load<TestType, 3>("cotangent.y"));
    tape.gradient(r.final_state).copy_from(file.load<TestType, 3>("cotangent.final_state"));
    tape.backward();
    CHECK(agrees(file, "out.y", r.y));
    CHECK(agrees(file, "out.final_state", r.final_state));
    CHECK(agrees(file, "grad.x", tape.gradient(x)));
    CHECK(agrees(file, "grad.weight", tape.gradient(weight)));
    CHECK(agrees(file, "grad.bias", tape.gradient(bias)));
    CHECK(agrees(file, "grad.initial_state", tape.gradient(initial)));
  }
}

}  // namespace
