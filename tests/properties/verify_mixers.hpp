#pragma once

#include "mixers.hpp"
#include <ssmlib/mixer/verify.hpp>

#include <sstream>

namespace properties {

/// verify() of the product that `mixer` picks from random operands.
template <class T, class Pick>
ssm::verify_report verify_of(Pick pick) {
  return ssm::verify(
      [&](index_t batch, index_t length, ssm::philox& random) {
        return pick(operands<T>({.batch = batch,
                                 .length = length,
                                 .heads = 2,
                                 .query_heads = 1,
                                 .key_heads = 2,
                                 .keys = 3,
                                 .features = 2,
                                 .window = 6,
                                 .seed = random.bits() % 1000}));
      },
      {.lengths = {1, 2, 17, 65}});
}

template <class T, class Pick>
void require_verified(Pick pick) {
  const ssm::verify_report report = verify_of<T>(pick);
  std::ostringstream table;
  table << report;
  INFO(table.str());
  CHECK(report.passed());
}

}  // namespace properties
