#pragma once

#include "golden_run.hpp"
#include <ssmlib/grad/tape.hpp>

namespace golden {

/// mixer * X from an initial state on a tape; both results may have gradients.
/// @param initial  (sequences, H, key size, features)
template <class E, class T = typename E::value_type, class B = typename E::backend>
ssm::eval_with_state_result<T, B> eval_with_state(const E& e,
                                                  const tensor<ssm::accum_t<T>, 4, B>& initial,
                                                  ssm::tape<T, B>& tape) {
  const auto r = ssm::eval_with_state(e, initial);
  tape.record_outputs(
      [e, initial, r, &tape] {
        E gradients = e;
        E::operands(gradients,
                    [&](std::string_view, auto& t, ssm::operand) { t = tape.gradient(t); });
        ssm::vjp_into(e, tape.gradient(r.y), gradients,
                      {initial, tape.gradient(r.final_state), tape.gradient(initial)});
      },
      r.y, r.final_state);
  return r;
}

/// A state with its last two axes exchanged: the files of SSD have (head, P, N).
template <class T, class B>
tensor<T, 4, B> exchanged(const tensor<T, 4, B>& s) {
  const tensor<T, 4> from = ssm::detail::on_host(s);
  tensor<T, 4> to(s.extent(0), s.extent(1), s.extent(3), s.extent(2));
  for (index_t b = 0; b < s.extent(0); ++b) {
    for (index_t h = 0; h < s.extent(1); ++h) {
      for (index_t i = 0; i < s.extent(2); ++i) {
        for (index_t j = 0; j < s.extent(3); ++j)
          to(b, h, j, i) = from(b, h, i, j);
      }
    }
  }
  return ssm::detail::on_backend<B>(to);
}

}  // namespace golden
