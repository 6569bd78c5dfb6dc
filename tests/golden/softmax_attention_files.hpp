#pragma once

#include "golden_run.hpp"
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/softmax.hpp>

namespace golden {

using namespace ssm;

/// The identity as X: (b, T, 1, T), so that the product is the matrix.
template <class T, class B>
tensor<T, 4, B> identity(index_t batch, index_t length) {
  auto x = tensor<double, 4>::zeros(batch, length, 1, length);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t t = 0; t < length; ++t)
      x(b, t, 0, t) = 1;
  }
  return ssm::detail::on_backend<B>(cast<T>(x));
}

/// (b, T, H, T) -> (b, H, T, T)
template <class T, class B>
tensor<T, 4, B> heads_first(const tensor<T, 4, B>& y) {
  tensor<T, 4, B> m(y.extent(0), y.extent(2), y.extent(1), y.extent(3));
  for (index_t h = 0; h < y.extent(2); ++h) {
    m.slice(1, h, h + 1)
        .reshape(y.extent(0), y.extent(1), y.extent(3))
        .copy_from(y.slice(2, h, h + 1).reshape(y.extent(0), y.extent(1), y.extent(3)));
  }
  return m;
}

struct softmax_attention_files {
  template <class T, class B>
  static void check(summary& total, const inputs<T, B>& in) {
    const auto q = values<4>(in, "in.q");
    const auto k = values<4>(in, "in.k");
    const auto v = values<4>(in, "in.v");
    const auto window_size = static_cast<index_t>(in.file.load_scalar("window"));
    const auto logits = q * transpose(k) * (1 / std::sqrt(static_cast<double>(q.extent(3))));
    const auto mixer =
        window_size == 0 ? softmax(logits + causal) : softmax(logits + window(window_size));

    const auto expected = in.file.template load<double, 4>("out.matrix");
    CAPTURE(in.file.path(), sizeof(T));
    if (sizeof(T) > 2 && in.how == rounding::none)
      CHECK(ssm_test::largest_error(mixer.dense(), expected) < 1e-6);

    for_each_algorithm(total, in, mixer * v, [&](auto algorithm, const std::string& name) {
      run<T, B> r(total, in, name);
      tape<T, B> tape;
      for (const auto& t : {q, k, v})
        tape.watch(t);
      const auto y = eval((mixer * v).with(algorithm), &tape);
      tape.gradient(y).copy_from(values<4>(in, "cotangent.y"));
      tape.backward();
      r.compare("out.y", y);
      r.compare("grad.q", tape.gradient(q));
      r.compare("grad.k", tape.gradient(k));
      r.compare("grad.v", tape.gradient(v));
      const auto product = mixer * identity<T, B>(q.extent(0), q.extent(1));
      r.compare("out.matrix", heads_first(eval(product.with(algorithm))));
      r.finish();
    });
  }
};

}  // namespace golden
