// expected-error {{ssm: a Toeplitz kernel is (head, distance) or (distance)}}
#include <ssmlib/ssmlib.hpp>

int main() {
  const ssm::tensor<float, 3> kernel(2, 3, 4);
  (void)ssm::toeplitz(kernel);
}
