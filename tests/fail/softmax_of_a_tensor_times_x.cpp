// expected-error {{ssm: softmax takes logits, Q * transpose(K) with an optional scale and mask}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> scores(4, 4), v(4, 3);
  (void)eval(softmax(scores) * v);
}
