// expected-error {{ssm: advance(mixer * X, state): the state is one of another kind of mixer}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> q(4, 8), k(4, 8), v(4, 3);
  auto state = make_state(softmax(q * transpose(k) + ssm::causal) * v, 1);
  (void)advance(hadamard(ssm::causal, q * transpose(k)) * v, state);
}
