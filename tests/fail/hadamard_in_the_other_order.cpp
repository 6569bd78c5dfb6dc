// expected-error {{ssm: hadamard(Q * transpose(K), mask) has its operands in the other order}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> q(4, 8), k(4, 8), v(4, 3);
  (void)eval(hadamard(q * transpose(k), ssm::causal) * v);
}
