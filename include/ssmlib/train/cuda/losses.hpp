#pragma once

#include <ssmlib/kernels/cuda/cross_entropy.hpp>
#include <ssmlib/kernels/cuda/loss_values.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/train/losses.hpp>

#include <cstdint>

/// @file
/// Losses on CUDA. Nothing here waits for the device: sums and gradients of losses stay on it.

namespace ssm {

namespace detail {
/// @param sign  -1 turns the gradient around
template <Real R>
[[nodiscard]] kernels::cuda::row_factor<R> row_factor(const token_weights<R, cuda>& w,
                                                      double sign = 1) {
  return {w.values.data(), w.step(), sign * w.factor / w.divisor, nullptr};
}
template <Floating T>
[[nodiscard]] kernels::cuda::cross_entropy_problem<T> target_problem(
    const tensor<T, 2, cuda>& logits, const tensor<std::int32_t, 1, cuda>& targets,
    std::int32_t ignored) {
  return {logits.const_view(), targets.data(), ignored};
}
template <Floating T>
[[nodiscard]] kernels::cuda::kl_divergence_problem<T> divergence_problem(
    const tensor<T, 2, cuda>& student, const tensor<T, 2, cuda>& teacher,
    const tensor<std::int32_t, 1, cuda>& mask, double temperature) {
  return {student.const_view(), teacher.const_view(), mask.data(),
          static_cast<accum_t<T>>(1 / temperature)};
}
[[nodiscard]] inline kernels::cuda::kl_divergence_rows row_pointers(
    const divergence_rows<cuda>& rows) {
  return {rows.student_log_sum.data(), rows.teacher_log_sum.data(), rows.divergence.data()};
}
}  // namespace detail

template <Floating T>
void apply_log_probability(const cuda::context& ctx, const tensor<T, 2, cuda>& logits,
                           const tensor<std::int32_t, 1, cuda>& targets, std::int32_t ignored,
                           const tensor<double, 1, cuda>& log_probability,
                           const tensor<double, 1, cuda>& log_sum) {
  if (logits.size() == 0) return;
  kernels::cuda::cross_entropy<T>(ctx.stream(), detail::target_problem(logits, targets, ignored),
                                  log_sum.data(), log_probability.data());
}
template <Floating T>
void apply_log_probability_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& logits,
                               const tensor<std::int32_t, 1, cuda>& targets, std::int32_t ignored,
                               const tensor<double, 1, cuda>& log_sum,
                               const token_weights<accum_t<T>, cuda>& weights,
                               const tensor<T, 2, cuda>& d_logits, bool add) {
  if (logits.size() == 0) return;
  // The kernel has softmax - onehot, the gradient of the loss.
  kernels::cuda::cross_entropy_vjp<T>(
      ctx.stream(), detail::target_problem(logits, targets, ignored), log_sum.data(),
      detail::row_factor(weights, -1), d_logits.view(), add);
}

template <Floating T>
void apply_divergence(const cuda::context& ctx, const tensor<T, 2, cuda>& student,
                      const tensor<T, 2, cuda>& teacher, const tensor<std::int32_t, 1, cuda>& mask,
                      double temperature, const divergence_rows<cuda>& rows) {
  if (student.size() == 0) return;
  kernels::cuda::kl_divergence<T>(ctx.stream(),
                                  detail::divergence_problem(student, teacher, mask, temperature),
                                  detail::row_pointers(rows));
}
template <Floating T>
void apply_divergence_vjp(const cuda::context& ctx, const tensor<T, 2, cuda>& student,
                          const tensor<T, 2, cuda>& teacher,
                          const tensor<std::int32_t, 1, cuda>& mask, double temperature,
                          const divergence_rows<cuda>& rows,
                          const token_weights<accum_t<T>, cuda>& weights,
                          const tensor<T, 2, cuda>& d_student, const tensor<T, 2, cuda>& d_teacher,
                          bool add) {
  if (student.size() == 0) return;
  kernels::cuda::kl_divergence_vjp<T>(
      ctx.stream(), detail::divergence_problem(student, teacher, mask, temperature),
      detail::row_pointers(rows), detail::row_factor(weights), d_student.view(), d_teacher.view(),
      add);
}

inline void apply_token_sums(const cuda::context& ctx, const tensor<double, 1, cuda>& values,
                             const sequence_layout& layout, double sign,
                             const tensor<double, 1, cuda>& sums) {
  if (sums.size() == 0) return;
  if (values.size() == 0) return sums.fill(0.0);
  const kernels::cuda::token_values<double> v{values.data(), values.size()};
  if (layout) {
    const detail::device_layout offsets(ctx, layout);
    kernels::cuda::sum_sequences<double>(ctx.stream(), v, offsets.offsets, offsets.sequences,
                                         sums.data());
  } else {
    const tensor<double, 1, cuda> count(1);
    const detail::cuda_workspace workspace(ctx,
                                           kernels::cuda::sum_tokens_workspace_bytes<double>(v));
    kernels::cuda::sum_tokens<double>(ctx.stream(), v, {sums.data(), count.data()},
                                      workspace.data());
  }
  if (sign == 1) return;
  kernels::cuda::scale_values<double>(ctx.stream(), sums.size(), sums.data(), sign, 1, sums.data());
}
template <Real R>
void apply_scaled(const cuda::context& ctx, const tensor<double, 1, cuda>& from, double factor,
                  double divisor, const tensor<R, 1, cuda>& to) {
  kernels::cuda::scale_values<R>(ctx.stream(), to.size(), from.data(), factor, divisor, to.data());
}
template <Real R>
void apply_spread(const cuda::context& ctx, const tensor<R, 1, cuda>& from,
                  const tensor<std::int32_t, 1, cuda>& index, const tensor<R, 1, cuda>& to) {
  kernels::cuda::gather_values<R>(ctx.stream(), to.size(), from.data(), index.data(), to.data());
}

/// to += factor(0) from.
template <Floating T, int R>
void apply_scaled_gradient(const cuda::context& ctx, const tensor<T, R, cuda>& from,
                           const tensor<accum_t<T>, 1, cuda>& factor,
                           const tensor<T, R, cuda>& to) {
  if (to.size() == 0) return;
  const tensor<T, R, cuda> values = from.contiguous();
  const bool dense = to.is_contiguous();
  const tensor<T, R, cuda> target = dense ? to : tensor<T, R, cuda>(to.extents());
  const bool add = dense && !detail::overwrites(to);
  kernels::cuda::scale_gradient<T>(ctx.stream(), to.size(), values.data(), factor.data(),
                                   target.data(), add);
  if (!dense) detail::add_to(to, target);
}

template <Real R>
void apply_preference(const cuda::context& ctx, const answer_scores<R, cuda>& scores, double beta,
                      const tensor<double, 1, cuda>& margins, const tensor<R, 1, cuda>& loss) {
  const auto view = [&](std::size_t k) { return scores[k].const_view(); };
  kernels::cuda::preference<R>(ctx.stream(), {{view(0), view(1), view(2), view(3)}, beta},
                               margins.data(), loss.data());
}
template <Real R>
void apply_preference_vjp(const cuda::context& ctx, double beta,
                          const tensor<double, 1, cuda>& margins, const tensor<R, 1, cuda>& d_loss,
                          const answer_scores<R, cuda>& d_scores) {
  const auto view = [&](std::size_t k) { return d_scores[k].view(); };
  kernels::cuda::preference_vjp<R>(ctx.stream(), margins.size(), beta, margins.data(),
                                   d_loss.data(), {view(0), view(1), view(2), view(3)});
}

}  // namespace ssm
