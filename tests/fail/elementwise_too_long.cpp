// expected-error {{ssm: an elementwise expression has more than 16 tensors}}
#include <ssmlib/expr/elementwise.hpp>

int main() {
  ssm::tensor<float, 1> x(4);
  const auto four = x + x + x + x;
  const auto sixteen = four + four + (four + four);
  (void)(sixteen + x);
}
