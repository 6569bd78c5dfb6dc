#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/distill/hidden_state_alignment.hpp>
#include <ssmlib/distill/matrix_orientation.hpp>
#include <ssmlib/distill/weight_transfer.hpp>
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/train/data.hpp>
#include <ssmlib/train/model_losses.hpp>
#include <ssmlib/train/selection.hpp>
#include <ssmlib/train/trainer.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace ssm {

/// MOHAWK: a student whose mixers are of another class than the teacher's learns, in this order,
/// the teacher's matrices, the teacher's mixer outputs, and the teacher's predictions. Before stage
/// 1, transfer_weights() gives it everything but the mixers.
/// @source Bick et al. 2024, arXiv:2408.10189.
enum class mohawk_stage { matrix_orientation = 1, hidden_state_alignment = 2, distillation = 3 };

[[nodiscard]] std::string to_string(mohawk_stage stage);

namespace detail {
[[noreturn]] void throw_unlike_layers(const std::string& teacher, const std::string& student);
[[noreturn]] void throw_nothing_replaced(const std::string& teacher, const std::string& student);
}  // namespace detail

/// The layers where the student's mixer is another function than the teacher's: of another type, or
/// of the same with other options (a window, other heads), see any_block::has_same_mixer.
/// @throws shape_error  patterns of different lengths, or a mixer against an MLP.
template <Floating T, Backend B>
[[nodiscard]] std::vector<index_t> replaced_layers(const language_model<T, B>& teacher,
                                                   const language_model<T, B>& student) {
  std::vector<index_t> layers;
  bool fits = teacher.layers() == student.layers();
  for (index_t i = 0; fits && i < teacher.layers(); ++i) {
    const any_block<T, B>&a = teacher.block(i), &b = student.block(i);
    fits = a.has_mixer() == b.has_mixer();
    if (a.has_mixer() && !a.has_same_mixer(b)) layers.push_back(i);
  }
  if (!fits) detail::throw_unlike_layers(teacher.config().pattern, student.config().pattern);
  return layers;
}

namespace detail {
/// @throws value_error  no layer is replaced: stages 1 and 2 have nothing to do.
template <Floating T, Backend B>
[[nodiscard]] std::vector<index_t> layers_to_align(const language_model<T, B>& teacher,
                                                   const language_model<T, B>& student) {
  std::vector<index_t> layers = replaced_layers(teacher, student);
  if (layers.empty()) throw_nothing_replaced(teacher.config().pattern, student.config().pattern);
  return layers;
}
}  // namespace detail

/// What trains in a stage, as patterns of parameter names: in stages 1 and 2 the replaced mixers,
/// in stage 3 everything.
/// @throws value_error  stages 1 and 2: no mixer is replaced.
template <Floating T, Backend B>
[[nodiscard]] std::vector<std::string> mohawk_trained(mohawk_stage stage,
                                                      const language_model<T, B>& teacher,
                                                      const language_model<T, B>& student) {
  if (stage == mohawk_stage::distillation) return {"*"};
  std::vector<std::string> patterns;
  for (const index_t i : detail::layers_to_align(teacher, student)) {
    patterns.push_back("layers." + std::to_string(i) + ".mixer.*");
  }
  return patterns;
}

struct mohawk_options {
  double temperature = 1.0;  ///< of stage 3
};

/// The loss of one stage on a batch, for train().
///
/// Stages 1 and 2 feed every student layer the teacher's own input of that layer, so that layers
/// learn independently; the loss is the mean over the replaced layers. Stage 1 counts sequences,
/// stage 2 tokens, stage 3 tokens that have a target (all, in a batch without targets).
/// @throws shape_error  layers that cannot be compared. @throws value_error  no mixer is replaced.
template <Floating T, Backend B>
[[nodiscard]] loss_sum<T, B> mohawk_loss(mohawk_stage stage, const language_model<T, B>& teacher,
                                         const language_model<T, B>& student, const pass<T, B>& p,
                                         const token_batch& batch,
                                         const mohawk_options& options = {}) {
  if (stage == mohawk_stage::distillation) {
    return distillation_loss(teacher, student, p, batch, {.temperature = options.temperature});
  }
  const pass<T, B> silent{p.ctx, nullptr, false};
  const std::vector<index_t> layers = detail::layers_to_align(teacher, student);
  const typename B::scope scope(p.ctx);
  const sequence_layout layout = batch.sequences();
  const bool first = stage == mohawk_stage::matrix_orientation;
  const index_t count = first ? layout.sequences() : layout.tokens();
  const accum_t<T> share =
      static_cast<accum_t<T>>(static_cast<double>(count) / static_cast<double>(layers.size()));
  auto total = tensor<accum_t<T>, 1, B>::zeros(1);
  tensor<T, 3, B> x = teacher.embed(silent, batch.inputs);
  std::size_t next = 0;
  for (index_t i = 0; i < teacher.layers() && next < layers.size(); ++i) {
    if (i == layers[next]) {
      ++next;
      const tensor<accum_t<T>, 1, B> loss =
          first ? matrix_orientation_loss(p, teacher.block(i).mixer_matrix(silent, x, layout),
                                          student.block(i).mixer_matrix(p, x, layout))
                : hidden_state_alignment_loss(p, student.block(i).mixer_output(p, x, layout),
                                              teacher.block(i).mixer_output(silent, x, layout));
      total = eval(total + loss * share, p.tape, p.ctx);
    }
    x = teacher.block(i).forward(silent, x, layout);
  }
  return {total, count};
}

/// The same on token ids alone. @param ids  (b, T)
template <Floating T, Backend B>
[[nodiscard]] loss_sum<T, B> mohawk_loss(mohawk_stage stage, const language_model<T, B>& teacher,
                                         const language_model<T, B>& student, const pass<T, B>& p,
                                         const tensor<std::int32_t, 2>& ids,
                                         const mohawk_options& options = {}) {
  return mohawk_loss(stage, teacher, student, p, token_batch{ids, {}, {}}, options);
}

/// Trains the student through one stage.
/// @param optimizer  over the parameters that the stage trains, see mohawk_trained()
/// @return the steps taken
template <Floating T, Backend B, Loader L>
index_t train_mohawk_stage(mohawk_stage stage, const language_model<T, B>& teacher,
                           const language_model<T, B>& student, adamw<T, B>& optimizer, L& loader,
                           const training_options& training,
                           const training_callbacks& callbacks = {},
                           const mohawk_options& options = {},
                           const typename B::context& ctx = default_context<B>()) {
  return train(
      optimizer, loader,
      [&](const pass<T, B>& p, const token_batch& batch) {
        return mohawk_loss(stage, teacher, student, p, batch, options);
      },
      training, callbacks, ctx);
}

#define SSMLIB_DETAIL_LIST(T)                                                                      \
  SSMLIB_INSTANTIATE(                                                                              \
      distillation,                                                                                \
      loss_sum<T> mohawk_loss<T>(mohawk_stage, const language_model<T>&, const language_model<T>&, \
                                 const pass<T>&, const token_batch&, const mohawk_options&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/distill/mohawk_impl.hpp>
#endif
