#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/train/cross_entropy.hpp>

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

namespace detail {

/// The tokens of a divergence and what the backward pass needs of each.
template <Real T>
struct divergence_terms {
  tensor<std::int32_t, 2> mask;  // dense, or absent
  double temperature;
  index_t vocabulary;
  tensor<double, 2> saved;  // (tokens, 3): log-sums of student and teacher, divergence

  divergence_terms(const char* operation, const tensor<T, 3>& student, const tensor<T, 3>& teacher,
                   index_t classes, const tensor<std::int32_t, 2>& given_mask, const kl_options& o)
      : mask(given_mask.contiguous()),
        temperature(o.temperature),
        vocabulary(classes),
        saved(tensor<double, 2>::zeros(student.extent(0) * student.extent(1), 3)) {
    const shape<2> tokens{student.extent(0), student.extent(1)};
    if (teacher.extent(0) != tokens[0] || teacher.extent(1) != tokens[1] ||
        (mask && mask.extents() != tokens)) {
      throw shape_error("ssm: " + std::string(operation) + ": the student is " +
                        to_string<3>(student.extents()) + ", the teacher " +
                        to_string<3>(teacher.extents()) +
                        (mask ? ", the mask " + to_string<2>(mask.extents()) : std::string()) +
                        "; wanted the same batch and time");
    }
    if (!(temperature > 0)) {
      throw value_error("ssm: " + std::string(operation) + ": the temperature is " +
                        std::to_string(temperature) + "; wanted a positive number");
    }
  }

  [[nodiscard]] bool counts(index_t t) const { return !mask || mask.data()[t] != 0; }

  void evaluate(index_t t, const T* student, const T* teacher) const {
    const T scale = static_cast<T>(1 / temperature);
    saved(t, 0) = kernels::log_sum_exp(vocabulary, student, scale);
    saved(t, 1) = kernels::log_sum_exp(vocabulary, teacher, scale);
    saved(t, 2) = kernels::kl_divergence(row(t, student, teacher));
  }
  template <bool Add>
  void add_gradients(index_t t, const T* student, const T* teacher, double g, T* d_student,
                     T* d_teacher) const {
    kernels::kl_divergence_vjp<Add>(row(t, student, teacher), saved(t, 2),
                                    static_cast<T>(g / temperature), d_student, d_teacher);
  }

  /// The factor of the sum over tokens: temperature^2 / divisor.
  [[nodiscard]] double factor(const kl_options& o, index_t tokens, index_t batch) const {
    double divisor = o.divide_by;
    if (divisor == 0) {
      const index_t n = o.divisor == kl_divisor::tokens ? tokens : batch;
      divisor = static_cast<double>(std::max<index_t>(1, n));
    }
    return temperature * temperature / divisor;
  }
  [[nodiscard]] token_loss<T> reduce(const kl_options& o, index_t batch) const {
    token_loss<T> r;
    for (index_t t = 0; t < saved.extent(0); ++t) {
      if (!counts(t)) continue;
      r.sum += saved(t, 2);
      ++r.tokens;
    }
    r.loss = scalar<T>(r.sum * factor(o, r.tokens, batch));
    return r;
  }

 private:
  [[nodiscard]] kernels::divergence_row<T> row(index_t t, const T* student,
                                               const T* teacher) const {
    return {vocabulary,  student,    teacher, static_cast<T>(1 / temperature),
            saved(t, 0), saved(t, 1)};
  }
};

/// One block of a model's logits, and its share of the backward pass.
template <Real T>
class logits_tile {
 public:
  logits_tile(const tensor<T, 3>& hidden, const linear<T>& head, index_t vocabulary, index_t block)
      : rows_(input_tokens(hidden)),
        weight_(head.weight.slice(0, 0, vocabulary)),
        bias_(head.bias ? head.bias.slice(0, 0, vocabulary) : head.bias),
        tile_(block * vocabulary) {}

  void compute(const cpu::context& ctx, index_t begin, index_t end) {
    begin_ = begin;
    logits_ = {tile_.data(), {end - begin, weight_.extent(0)}, {weight_.extent(0), 1}};
    linear_rows<T>(ctx, false, rows_between(rows_.const_view(), begin, end), weight_, bias_,
                   logits_);
  }
  [[nodiscard]] T* row(index_t t) const { return logits_.data + (t - begin_) * logits_.stride(0); }
  /// The tile holds the gradient of the logits now.
  void add_gradients(const cpu::context& ctx, tape<T>& tape, view<T, 2> dx) const {
    linear_rows_vjp<T>(ctx, rows_between(rows_.const_view(), begin_, begin_ + logits_.extent(0)),
                       weight_, logits_, rows_between(dx, begin_, begin_ + logits_.extent(0)),
                       tape.gradient(weight_).view(), tape.gradient(bias_));
  }

 private:
  tensor<T, 2> rows_, weight_;
  tensor<T, 1> bias_;
  scratch<T> tile_;
  view<T, 2> logits_;
  index_t begin_ = 0;
};

template <Real T>
[[nodiscard]] bool wants_any(const tape<T>& t, const tensor<T, 3>& hidden, const linear<T>& head) {
  return t.wants(hidden) || t.wants(head.weight) || t.wants(head.bias);
}

}  // namespace detail

/// Word-level distillation from logits:
///
///     loss = temperature^2 / divisor * sum over masked-in tokens of KL(teacher || student)
///
/// with both distributions softened by the temperature.
/// @param student, teacher  (b, T, V); of different vocabularies the common first entries count
/// @param mask              (b, T): 0 does not count; absent: all count
/// @return                  the loss; `sum` is the plain sum of divergences
/// @throws shape_error  the sizes do not fit. @throws value_error  a temperature that is not > 0.
/// @source Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
template <Real T>
[[nodiscard]] token_loss<T> kl_divergence(const pass<T>& p, const tensor<T, 3>& student,
                                          const tensor<T, 3>& teacher,
                                          const tensor<std::int32_t, 2>& mask = {},
                                          const kl_options& o = {}) {
  const index_t vocabulary = std::min(student.extent(2), teacher.extent(2));
  const detail::divergence_terms<T> terms("kl_divergence", student, teacher, vocabulary, mask, o);
  const tensor<T, 2> s = detail::input_tokens(student), q = detail::input_tokens(teacher);
  const index_t tokens = s.extent(0), batch = student.extent(0);
  detail::for_each_row(p.ctx, 0, tokens, 8 * vocabulary, [&](index_t t) {
    if (terms.counts(t)) terms.evaluate(t, &s(t, 0), &q(t, 0));
  });
  const token_loss<T> r = terms.reduce(o, batch);
  if (p.tape == nullptr || !(p.tape->wants(student) || p.tape->wants(teacher))) return r;
  const double factor = terms.factor(o, r.tokens, batch);
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, tape = p.tape] {
    const double g = static_cast<double>(tape->gradient(loss)(0)) * factor;
    const detail::output_tokens<T, 3> ds(tape->gradient(student)), dq(tape->gradient(teacher));
    detail::for_each_row(ctx, 0, tokens, 8 * vocabulary, [&](index_t t) {
      if (!terms.counts(t)) return;
      terms.template add_gradients<true>(t, &s(t, 0), &q(t, 0), g,
                                         ds.get() ? &ds.get()(t, 0) : nullptr,
                                         dq.get() ? &dq.get()(t, 0) : nullptr);
    });
    ds.finish();
    dq.finish();
  });
  return r;
}

/// The same through the output heads, holding one block of logits of each model at a time.
///
/// @param student, teacher            hidden states (b, T, d), (b, T, d')
/// @param student_head, teacher_head  weight (V, d), bias (V) or absent
/// @param mask                        (b, T), or absent
/// @cost   the products with both heads, forward; backward these again and two more for each model
///         whose gradient is wanted.
template <Real T>
[[nodiscard]] token_loss<T> lm_kl_divergence(const pass<T>& p, const tensor<T, 3>& student,
                                             const std::type_identity_t<linear<T>>& student_head,
                                             const tensor<T, 3>& teacher,
                                             const std::type_identity_t<linear<T>>& teacher_head,
                                             const tensor<std::int32_t, 2>& mask = {},
                                             const kl_options& o = {}) {
  detail::check_linear("lm_kl_divergence", student, student_head.weight, student_head.bias);
  detail::check_linear("lm_kl_divergence", teacher, teacher_head.weight, teacher_head.bias);
  const index_t vocabulary = std::min(student_head.out_features(), teacher_head.out_features());
  const detail::divergence_terms<T> terms("lm_kl_divergence", student, teacher, vocabulary, mask,
                                          o);
  const index_t batch = student.extent(0), tokens = batch * student.extent(1);
  const index_t block = detail::logits_block<T>(o.block_tokens, 2 * vocabulary, tokens);
  // f(begin, end, student tile, teacher tile) for the blocks with tokens that count.
  const auto for_each_block = [=](const cpu::context& ctx, auto f) {
    detail::logits_tile<T> s(student, student_head, vocabulary, block);
    detail::logits_tile<T> q(teacher, teacher_head, vocabulary, block);
    for (index_t begin = 0; begin < tokens; begin += block) {
      const index_t end = std::min(tokens, begin + block);
      bool any = false;
      for (index_t t = begin; t < end; ++t)
        any = any || terms.counts(t);
      if (!any) continue;
      s.compute(ctx, begin, end);
      q.compute(ctx, begin, end);
      f(begin, end, s, q);
    }
  };
  for_each_block(p.ctx, [&](index_t begin, index_t end, const auto& s, const auto& q) {
    detail::for_each_row(p.ctx, begin, end, 8 * vocabulary, [&](index_t t) {
      if (terms.counts(t)) terms.evaluate(t, s.row(t), q.row(t));
    });
  });
  const token_loss<T> r = terms.reduce(o, batch);
  if (p.tape == nullptr || !(detail::wants_any(*p.tape, student, student_head) ||
                             detail::wants_any(*p.tape, teacher, teacher_head))) {
    return r;
  }
  const double factor = terms.factor(o, r.tokens, batch);
  p.tape->record(r.loss, [=, loss = r.loss, &ctx = p.ctx, tape = p.tape] {
    const double g = static_cast<double>(tape->gradient(loss)(0)) * factor;
    const bool student_wanted = detail::wants_any<T>(*tape, student, student_head);
    const bool teacher_wanted = detail::wants_any<T>(*tape, teacher, teacher_head);
    const detail::output_tokens<T, 3> ds(tape->gradient(student)), dq(tape->gradient(teacher));
    for_each_block(ctx, [&](index_t begin, index_t end, const auto& s, const auto& q) {
      detail::for_each_row(ctx, begin, end, 8 * vocabulary, [&](index_t t) {
        if (terms.counts(t)) {
          return terms.template add_gradients<false>(t, s.row(t), q.row(t), g, s.row(t),
                                                     teacher_wanted ? q.row(t) : nullptr);
        }
        std::fill_n(s.row(t), vocabulary, T(0));
        std::fill_n(q.row(t), vocabulary, T(0));
      });
      if (student_wanted) s.add_gradients(ctx, *tape, ds.get().view());
      if (teacher_wanted) q.add_gradients(ctx, *tape, dq.get().view());
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
