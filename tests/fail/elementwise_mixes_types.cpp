// expected-error {{ssm: an elementwise expression mixes two element types}}
#include <ssmlib/expr/elementwise.hpp>

int main() {
  ssm::tensor<float, 1> a(4);
  ssm::tensor<double, 1> b(4);
  (void)(a + b);
}
