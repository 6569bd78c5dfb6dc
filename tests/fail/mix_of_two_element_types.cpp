// expected-error {{ssm: mixer * X mixes two element types; convert one with cast<T>(...)}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 2> q(4, 8), k(4, 8);
  const ssm::tensor<double, 2> v(4, 3);
  (void)(softmax(q * transpose(k)) * v);
}
