#pragma once

#include <ssmlib/expr/concepts.hpp>

#include <cmath>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace ssm::detail {

/// The gradient of one operand of a packed batch, as it is compared with that of its sequences.
struct packed_operand {
  std::string name;
  bool per_token;
  std::vector<double> values, sum = {};  // sum: over the sequences, for a parameter
  double scale = 0;                      // the sequences' norms, whatever cancels in the sum
  bool same = true;
  double difference = 0, square = 0;  // of the sequences' elements, per token

  void compare(const std::vector<double>& packed, const std::vector<double>& separate) {
    same = same && packed == separate;
    if (per_token) {
      for (std::size_t i = 0; i < separate.size(); ++i) {
        difference += (packed[i] - separate[i]) * (packed[i] - separate[i]);
        square += separate[i] * separate[i];
      }
      return;
    }
    sum.resize(separate.size(), 0.0);
    double own_square = 0;
    for (std::size_t i = 0; i < separate.size(); ++i) {
      sum[i] += separate[i];
      own_square += separate[i] * separate[i];
    }
    scale += std::sqrt(own_square);
  }
  /// Of a per-token operand, in norm.
  [[nodiscard]] double error() const {
    return std::sqrt(difference) / (square > 0 ? std::sqrt(square) : 1.0);
  }
  [[nodiscard]] double error_of_sum() const {
    double squares = 0;
    for (std::size_t i = 0; i < sum.size(); ++i)
      squares += (values[i] - sum[i]) * (values[i] - sum[i]);
    return std::sqrt(squares) / (scale > 0 ? scale : 1.0);
  }
};

/// The elements of every operand, of the tokens [begin, end) where it has a time axis.
template <class P>
[[nodiscard]] std::vector<packed_operand> operands_of(P& e, index_t begin, index_t end) {
  std::vector<packed_operand> all;
  P::operands(e, [&](std::string_view name, auto& t, operand kind) {
    auto part = t;
    bool per_token = false;
    if constexpr (std::remove_cvref_t<decltype(t)>::rank >= 2) {
      per_token = kind == operand::per_token;
      if (per_token && t) part = t.slice(1, begin, end);
    }
    packed_operand o{std::string(name), per_token, {}};
    const auto exact = exact_on_host(part);
    for (index_t i = 0; i < exact.size(); ++i)
      o.values.push_back(exact.data()[i]);
    all.push_back(std::move(o));
  });
  return all;
}

}  // namespace ssm::detail
