#pragma once

#include <ssmlib/train/trainer.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace ssm_test {

using namespace ssm;

/// The smallest language model: logits = table[x] + bias, cross-entropy. Targets 0 are not counted,
/// so that batches of one size count different numbers of tokens.
template <Real T>
struct bigram_model {
  explicit bigram_model(index_t vocabulary, std::uint64_t seed = 1)
      : table(normal<T, 2>({vocabulary, vocabulary}, 0.3, seed)),
        bias(normal<T, 1>({vocabulary}, 0.3, seed + 1)) {}

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    f("table", self.table, parameter_kind::matrix);
    f("bias", self.bias, parameter_kind::bias);
  }

  [[nodiscard]] loss_sum<T> loss(const pass<T>& p, const token_batch& batch) const {
    const index_t tokens = batch.inputs.size(), vocabulary = bias.extent(0);
    const auto x = batch.inputs.reshape(tokens), y = batch.targets.reshape(tokens);
    tensor<T, 2> probability(tokens, vocabulary);
    tensor<T, 1> sum = tensor<T, 1>::zeros(1);
    index_t count = 0;
    for (index_t i = 0; i < tokens; ++i) {
      T total = 0;
      for (index_t v = 0; v < vocabulary; ++v)
        total += probability(i, v) = std::exp(table(x(i), v) + bias(v));
      for (index_t v = 0; v < vocabulary; ++v)
        probability(i, v) /= total;
      if (y(i) == 0) continue;
      ++count;
      sum(0) -= std::log(probability(i, y(i)));
    }
    if (p.tape != nullptr) {
      p.tape->record(sum, [sum, x, y, probability, t = p.tape, table = table, bias = bias] {
        const T seed = t->gradient(sum)(0);
        const auto d_table = t->gradient(table);
        const auto d_bias = t->gradient(bias);
        for (index_t i = 0; i < x.size(); ++i) {
          if (y(i) == 0) continue;
          for (index_t v = 0; v < bias.extent(0); ++v) {
            const T d = seed * (probability(i, v) - T(v == y(i) ? 1 : 0));
            if (d_table) d_table(x(i), v) += d;
            if (d_bias) d_bias(v) += d;
          }
        }
      });
    }
    return {sum, count};
  }

  tensor<T, 2> table;
  tensor<T, 1> bias;
};

/// Text-like tokens in [0, vocabulary): each depends on the one before it.
inline std::vector<std::int32_t> chain_tokens(index_t n, index_t vocabulary, std::uint64_t seed) {
  philox random(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
  index_t last = 0;
  for (auto& t : tokens) {
    last = random.uniform() < 0.7 ? (3 * last + 1) % vocabulary : random.below(vocabulary);
    t = static_cast<std::int32_t>(last);
  }
  return tokens;
}

/// Not owned: `tokens` must live as long.
inline token_spans<std::int32_t> one_shard(const std::vector<std::int32_t>& tokens) {
  return token_spans<std::int32_t>(std::span<const std::int32_t>(tokens));
}

template <Element T, int R>
[[nodiscard]] bool same_bits(const tensor<T, R>& a, const tensor<T, R>& b) {
  return a.extents() == b.extents() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

/// The largest |a - b|; infinite where one is not a number.
template <Real T, int R>
[[nodiscard]] double largest_difference(const tensor<T, R>& a, const tensor<T, R>& b) {
  double largest = 0;
  a.zip_with(b, [&](const T& x, const T& y) {
    const double d = std::abs(static_cast<double>(x) - static_cast<double>(y));
    largest = std::max(largest, std::isnan(d) ? std::numeric_limits<double>::infinity() : d);
  });
  return largest;
}

/// Every bit that training changes.
template <Real T>
[[nodiscard]] std::string training_bits(const adamw<T>& optimizer) {
  std::string bits;
  const auto add = [&bits](const tensor<T, 1>& t) {
    bits.append(reinterpret_cast<const char*>(t.data()),
                static_cast<std::size_t>(t.size()) * sizeof(T));
  };
  for (std::size_t i = 0; i < optimizer.parameters().size(); ++i) {
    add(optimizer.parameters()[i].value);
    add(optimizer.first_moments()[i]);
    add(optimizer.second_moments()[i]);
  }
  return bits;
}

}  // namespace ssm_test
