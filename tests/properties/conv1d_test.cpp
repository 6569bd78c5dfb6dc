#include "../support/catch.hpp"
#include "../support/gradient_check.hpp"
#include <ssmlib/nn/conv1d.hpp>

namespace {

using namespace ssm;

TEST_CASE("properties/conv1d: a sequence shorter than the filter sees zeros, or its state",
          "[properties][shapes]") {
  const index_t channels = 5, width = 4;
  const auto weight = uniform<double, 2>({channels, width}, -1, 1, 1);
  const auto bias = uniform<double, 1>({channels}, -1, 1, 2);
  const auto history = uniform<double, 3>({2, width - 1, channels}, -1, 1, 3);
  for (const index_t length : {1, 2, 3}) {
    const auto x = uniform<double, 3>({2, length, channels}, -1, 1, 4);
    for (const bool with_history : {false, true}) {
      CAPTURE(length, with_history);
      const auto input = [&](index_t b, index_t t, index_t c) {
        if (t >= 0) return x(b, t, c);
        return with_history ? history(b, width - 1 + t, c) : 0.0;
      };
      tensor<double, 3> expected(x.extents()), state(history.extents());
      for (index_t b = 0; b < 2; ++b) {
        for (index_t c = 0; c < channels; ++c) {
          for (index_t t = 0; t < length; ++t) {
            expected(b, t, c) = bias(c);
            for (index_t j = 0; j < width; ++j)
              expected(b, t, c) += weight(c, j) * input(b, t - (width - 1) + j, c);
          }
          for (index_t j = 0; j < width - 1; ++j)
            state(b, j, c) = input(b, length - (width - 1) + j, c);
        }
      }
      conv1d_options<double> options;
      if (with_history) options.initial = history;
      const auto r = op::causal_conv1d_with_state(pass<double>{}, x, weight, bias, options);
      CHECK(ssm_test::relative_error(r.y, expected) < 1e-14);
      CHECK(ssm_test::same_bits(r.final_state, state));
    }
  }
}

}  // namespace
