#include "golden_run.hpp"
#include <ssmlib/grad/tape.hpp>
#include <ssmlib/lower/softmax.hpp>

namespace golden {

namespace {

using namespace ssm;

/// The identity as X: (b, T, 1, T), so that the product is the matrix.
template <class T>
tensor<T, 4> identity(index_t batch, index_t length) {
  auto x = tensor<T, 4>::zeros(batch, length, 1, length);
  for (index_t b = 0; b < batch; ++b) {
    for (index_t t = 0; t < length; ++t)
      x(b, t, 0, t) = T(1);
  }
  return x;
}

/// (b, T, H, T) -> (b, H, T, T)
template <class T>
tensor<T, 4> heads_first(const tensor<T, 4>& y) {
  tensor<T, 4> m(y.extent(0), y.extent(2), y.extent(1), y.extent(3));
  for (index_t h = 0; h < y.extent(2); ++h) {
    m.slice(1, h, h + 1)
        .reshape(y.extent(0), y.extent(1), y.extent(3))
        .copy_from(y.slice(2, h, h + 1).reshape(y.extent(0), y.extent(1), y.extent(3)));
  }
  return m;
}

template <class T>
void run_as(summary& total, const safetensors_reader& file) {
  const auto q = file.load<T, 4>("in.q"), k = file.load<T, 4>("in.k"), v = file.load<T, 4>("in.v");
  const auto window_size = static_cast<index_t>(file.load_scalar("window"));
  const auto logits = q * transpose(k) * (1 / std::sqrt(static_cast<double>(q.extent(3))));
  const auto mixer =
      window_size == 0 ? softmax(logits + causal) : softmax(logits + window(window_size));

  const auto expected = file.load<double, 4>("out.matrix");
  CAPTURE(file.path(), sizeof(T));
  CHECK(ssm_test::largest_error(mixer.dense(), expected) < 1e-6);

  for_each_algorithm(mixer * v, [&](auto algorithm, const std::string& name) {
    run<T> r(total, file, name);
    tape<T> tape;
    for (const auto& t : {q, k, v})
      tape.watch(t);
    const auto y = eval((mixer * v).with(algorithm), &tape);
    tape.gradient(y).copy_from(file.load<T, 4>("cotangent.y"));
    tape.backward();
    r.compare("out.y", y);
    r.compare("grad.q", tape.gradient(q));
    r.compare("grad.k", tape.gradient(k));
    r.compare("grad.v", tape.gradient(v));
    const auto product = mixer * identity<T>(q.extent(0), q.extent(1));
    r.compare("out.matrix", heads_first(eval(product.with(algorithm))));
    r.finish();
  });
}

}  // namespace

void run_softmax_attention(summary& total, const safetensors_reader& file) {
  run_as<float>(total, file);
  run_as<double>(total, file);
}

}  // namespace golden
