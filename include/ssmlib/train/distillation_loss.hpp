#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cpu/cross_entropy.hpp>
#include <ssmlib/train/logits_tile.hpp>
#include <ssmlib/train/token_loss.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace ssm {

/// What the sum over tokens of a divergence is divided by: the masked-in tokens, or the batch.
enum class kl_divisor { tokens, batch };

struct kl_options {
  double temperature = 1.0;
  kl_divisor divisor = kl_divisor::tokens;
  /// A divisor of your own, such as the tokens of all parts of a batch, or the sequences of a
  /// packed one; 0: as `divisor` says.
  double divide_by = 0;
  index_t block_tokens = 0;  ///< rows of logits held at a time; 0: by the vocabulary
};

/// What the backward pass of a divergence needs of each token; 0 where a token does not count.
template <Backend B = cpu>
struct divergence_rows {
  tensor<double, 1, B> student_log_sum, teacher_log_sum;  ///< (tokens), at the temperature
  tensor<double, 1, B> divergence;                        ///< (tokens), KL(teacher || student)

  [[nodiscard]] static divergence_rows zeros(index_t tokens) {
    const auto some = [&] { return tensor<double, 1, B>::zeros(tokens); };
    return {some(), some(), some()};
  }
  /// Those of the tokens [begin, end).
  [[nodiscard]] divergence_rows between(index_t begin, index_t end) const {
    return {student_log_sum.slice(0, begin, end), teacher_log_sum.slice(0, begin, end),
            divergence.slice(0, begin, end)};
  }
};

/// The divergences of rows of logits (n, V), both divided by the temperature before the softmax.
/// @param mask  (n): 0 does not count, its results are 0 before and stay 0; absent: all count
template <Real T>
void apply_divergence(const cpu::context& ctx, const tensor<T, 2>& student,
                      const tensor<T, 2>& teacher, const tensor<std::int32_t, 1>& mask,
                      double temperature, const divergence_rows<>& rows) {
  const index_t vocabulary = student.extent(1);
  const T scale = static_cast<T>(1 / temperature);
  detail::for_each_row(ctx, student.extent(0), 8 * vocabulary, [&](index_t t) {
    if (mask && mask(t) == 0) return;
    const T *zs = &student(t, 0), *zt = &teacher(t, 0);
    rows.student_log_sum(t) = kernels::log_sum_exp(vocabulary, zs, scale);
    rows.teacher_log_sum(t) = kernels::log_sum_exp(vocabulary, zt, scale);
    rows.divergence(t) = kernels::kl_divergence<T>(
        {vocabulary, zs, zt, scale, rows.student_log_sum(t), rows.teacher_log_sum(t)});
  });
}
/// d_student, d_teacher = or, with `add`, += the gradients of the sum over t of weights(t)
/// temperature divergence(t). Either may be absent; they may overwrite the logits themselves.
template <Real T>
void apply_divergence_vjp(const cpu::context& ctx, const tensor<T, 2>& student,
                          const tensor<T, 2>& teacher, const tensor<std::int32_t, 1>& mask,
                          double temperature, const divergence_rows<>& rows,
                          const token_weights<T>& weights, const tensor<T, 2>& d_student,
                          const tensor<T, 2>& d_teacher, bool add) {
  const index_t vocabulary = student.extent(1);
  const T scale = static_cast<T>(1 / temperature);
  detail::for_each_row(ctx, student.extent(0), 8 * vocabulary, [&](index_t t) {
    T* ds = d_student ? &d_student(t, 0) : nullptr;
    T* dt = d_teacher ? &d_teacher(t, 0) : nullptr;
    if (mask && mask(t) == 0) {
      if (!add && ds) std::fill_n(ds, vocabulary, T(0));
      if (!add && dt) std::fill_n(dt, vocabulary, T(0));
      return;
    }
    const kernels::divergence_row<T> row{
        vocabulary, &student(t, 0),          &teacher(t, 0),
        scale,      rows.student_log_sum(t), rows.teacher_log_sum(t)};
    const T g = static_cast<T>(weights(t));
    if (add) {
      kernels::kl_divergence_vjp<true>(row, rows.divergence(t), g, ds, dt);
    } else {
      kernels::kl_divergence_vjp<false>(row, rows.divergence(t), g, ds, dt);
    }
  });
}

namespace detail {

/// The tokens of a divergence, and how it becomes a loss.
template <Backend B>
struct divergence_terms {
  tensor<std::int32_t, 1> host_mask;  // (tokens), dense, or absent
  tensor<std::int32_t, 1, B> mask;
  double temperature, factor;  // factor: of the sum over tokens, temperature^2 / divisor
  index_t counted;
  divergence_rows<B> rows;

  template <Floating T>
  divergence_terms(const char* operation, const tensor<T, 3, B>& student,
                   const tensor<T, 3, B>& teacher, const tensor<std::int32_t, 2>& given_mask,
                   const kl_options& o)
      : temperature(o.temperature), counted(student.extent(0) * student.extent(1)) {
    const shape<2> tokens{student.extent(0), student.extent(1)};
    if (teacher.extent(0) != tokens[0] || teacher.extent(1) != tokens[1] ||
        (given_mask && given_mask.extents() != tokens)) {
      throw shape_error(
          "ssm: " + std::string(operation) + ": the student is " + to_string<3>(student.extents()) +
          ", the teacher " + to_string<3>(teacher.extents()) +
          (given_mask ? ", the mask " + to_string<2>(given_mask.extents()) : std::string()) +
          "; wanted the same batch and time");
    }
    if (!(temperature > 0)) {
      throw value_error("ssm: " + std::string(operation) + ": the temperature is " +
                        std::to_string(temperature) + "; wanted a positive number");
    }
    rows = divergence_rows<B>::zeros(counted);
    if (given_mask) {
      host_mask = given_mask.contiguous().reshape(given_mask.size());
      mask = on_backend<B>(host_mask);
      counted -= std::count(host_mask.data(), host_mask.data() + host_mask.size(), 0);
    }
    double divisor = o.divide_by;
    if (divisor == 0) {
      const index_t n = o.divisor == kl_divisor::tokens ? counted : tokens[0];
      divisor = static_cast<double>(std::max<index_t>(1, n));
    }
    factor = temperature * temperature / divisor;
  }

  [[nodiscard]] bool any_counts(index_t begin, index_t end) const {
    return !host_mask || std::any_of(host_mask.data() + begin, host_mask.data() + end,
                                     [](std::int32_t m) { return m != 0; });
  }
  template <Floating T>
  [[nodiscard]] token_loss<T, B> loss(const typename B::context& ctx) const {
    return make_token_loss<T, B>(ctx, rows.divergence, 1, factor, 1, counted);
  }
  /// @param g  the gradient of the loss
  template <Real R>
  [[nodiscard]] token_weights<R, B> weights(const tensor<R, 1, B>& g) const {
    return {g, factor, temperature};
  }
};

}  // namespace detail

/// Word-level distillation from logits:
///
///     loss = temperature^2 / divisor * sum over masked-in tokens of KL(teacher || student)
///
/// with both distributions softened by the temperature.
/// @param student, teacher  (b, T, V); of different vocabularies the common first entries count
/// @param mask              (b, T), on the host: 0 does not count; absent: all count
/// @return                  the loss; sum() is the plain sum of divergences
/// @throws shape_error  the sizes do not fit. @throws value_error  a temperature that is not > 0.
/// @source Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
template <Floating T, Backend B>
[[nodiscard]] token_loss<T, B> kl_divergence(const pass<T, B>& p, const tensor<T, 3, B>& student,
                                             const tensor<T, 3, B>& teacher,
                                             const tensor<std::int32_t, 2>& mask = {},
                                             const kl_options& o = {}) {
  const typename B::scope scope(p.ctx);
  const detail::divergence_terms<B> terms("kl_divergence", student, teacher, mask, o);
  const index_t vocabulary = std::min(student.extent(2), teacher.extent(2));
  const auto common = [vocabulary](const tensor<T, 2, B>& rows) {
    return rows ? rows.slice(1, 0, vocabulary) : rows;
  };
  const tensor<T, 2, B> s = common(detail::input_tokens(student)),
                        q = common(detail::input_tokens(teacher));
  apply_divergence(p.ctx, s, q, terms.mask, terms.temperature, terms.rows);
  const auto r = terms.template loss<T>(p.ctx);
  if (p.tape == nullptr || !(p.tape->wants(student) || p.tape->wants(teacher))) return r;
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, tape = p.tape] {
    const detail::output_tokens<T, 3, B> ds(tape->gradient(student)), dq(tape->gradient(teacher));
    apply_divergence_vjp(ctx, s, q, terms.mask, terms.temperature, terms.rows,
                         terms.weights(tape->gradient(loss)), common(ds.get()), common(dq.get()),
                         true);
    ds.finish();
    dq.finish();
  });
  return r;
}

/// The same through the output heads, holding one block of logits of each model at a time.
///
/// @param student, teacher            hidden states (b, T, d), (b, T, d')
/// @param student_head, teacher_head  weight (V, d), bias (V) or absent
/// @param mask                        (b, T), on the host, or absent
/// @cost   the products with both heads, forward; backward these again and two more for each model
///         whose gradient is wanted.
template <Floating T, Backend B>
[[nodiscard]] token_loss<T, B> lm_kl_divergence(
    const pass<T, B>& p, const tensor<T, 3, B>& student,
    const std::type_identity_t<linear<T, B>>& student_head, const tensor<T, 3, B>& teacher,
    const std::type_identity_t<linear<T, B>>& teacher_head,
    const tensor<std::int32_t, 2>& mask = {}, const kl_options& o = {}) {
  detail::check_linear("lm_kl_divergence", student, student_head.weight, student_head.bias);
  detail::check_linear("lm_kl_divergence", teacher, teacher_head.weight, teacher_head.bias);
  const typename B::scope scope(p.ctx);
  const detail::divergence_terms<B> terms("lm_kl_divergence", student, teacher, mask, o);
  const index_t vocabulary = std::min(student_head.out_features(), teacher_head.out_features());
  const index_t tokens = student.extent(0) * student.extent(1);
  const index_t block = detail::logits_block<T, B>(o.block_tokens, 2 * vocabulary, tokens);
  const tensor<T, 2, B> student_weight = detail::weight_of(p, student_head.weight),
                        teacher_weight = detail::weight_of(p, teacher_head.weight);
  // f(begin, end, student's tile, its logits, teacher's tile, its logits) for the blocks with
  // tokens that count.
  const auto for_each_block = [=](const typename B::context& ctx, auto f) {
    detail::logits_tile<T, B> s(student, student_head, student_weight, vocabulary, block);
    detail::logits_tile<T, B> q(teacher, teacher_head, teacher_weight, vocabulary, block);
    for (index_t begin = 0; begin < tokens; begin += block) {
      const index_t end = std::min(tokens, begin + block);
      if (!terms.any_counts(begin, end)) continue;
      f(begin, end, s, s.compute(ctx, begin, end), q, q.compute(ctx, begin, end));
    }
  };
  for_each_block(p.ctx, [&](index_t begin, index_t end, const auto&, const tensor<T, 2, B>& zs,
                            const auto&, const tensor<T, 2, B>& zt) {
    apply_divergence(p.ctx, zs, zt, detail::rows_between(terms.mask, begin, end), terms.temperature,
                     terms.rows.between(begin, end));
  });
  const auto r = terms.template loss<T>(p.ctx);
  if (!detail::wants_any(p.tape, student, student_head) &&
      !detail::wants_any(p.tape, teacher, teacher_head)) {
    return r;
  }
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, tape = p.tape] {
    const auto weights = terms.weights(tape->gradient(loss));
    const bool student_wanted = detail::wants_any<T, B>(tape, student, student_head);
    const bool teacher_wanted = detail::wants_any<T, B>(tape, teacher, teacher_head);
    const detail::output_tokens<T, 3, B> ds(tape->gradient(student)), dq(tape->gradient(teacher));
    for_each_block(ctx, [&](index_t begin, index_t end, const auto& s, const tensor<T, 2, B>& zs,
                            const auto& q, const tensor<T, 2, B>& zt) {
      const tensor<T, 2, B> absent;
      apply_divergence_vjp(ctx, zs, zt, detail::rows_between(terms.mask, begin, end),
                           terms.temperature, terms.rows.between(begin, end),
                           weights.between(begin, end), student_wanted ? zs : absent,
                           teacher_wanted ? zt : absent, false);
      if (student_wanted) s.add_gradients(ctx, *tape, ds.get());
      if (teacher_wanted) q.add_gradients(ctx, *tape, dq.get());
    });
    ds.finish();
    dq.finish();
  });
  return r;
}

#define SSMLIB_DETAIL_LIST(T)                                                                    \
  SSMLIB_INSTANTIATE(training, token_loss<T> kl_divergence<T>(                                   \
                                   const pass<T>&, const tensor<T, 3>&, const tensor<T, 3>&,     \
                                   const tensor<std::int32_t, 2>&, const kl_options&));          \
  SSMLIB_INSTANTIATE(                                                                            \
      training, token_loss<T> lm_kl_divergence<T>(                                               \
                    const pass<T>&, const tensor<T, 3>&, const std::type_identity_t<linear<T>>&, \
                    const tensor<T, 3>&, const std::type_identity_t<linear<T>>&,                 \
                    const tensor<std::int32_t, 2>&, const kl_options&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
