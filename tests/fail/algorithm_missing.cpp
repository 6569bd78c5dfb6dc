// Softmax attention has no state of fixed size.
// expected-error {{ssm: this mixer has no such algorithm; M::algorithms lists the ones}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> q(4, 8), k(4, 8), v(4, 3);
  const auto y = softmax(q * transpose(k) + ssm::causal) * v;
  (void)y.with(ssm::alg::recurrent{});
}
