// expected-error {{ssm: these logits have a mask already; add one, + causal or + window(w)}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> q(4, 8), k(4, 8), v(4, 3);
  (void)eval(softmax(q * transpose(k) + ssm::causal + ssm::window(3)) * v);
}
