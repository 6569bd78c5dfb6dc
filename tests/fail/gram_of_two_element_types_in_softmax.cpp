// expected-error {{ssm: Q * transpose(K) mixes two element types; convert one with cast<T>(...)}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> q(4, 8), v(4, 3);
  const ssm::tensor<double, 2> k(4, 8);
  (void)eval(softmax(q * transpose(k) * 0.5 + ssm::causal) * v);
}
