#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/distill/hidden_state_alignment.hpp>
#include <ssmlib/distill/matrix_orientation.hpp>
#include <ssmlib/distill/weight_transfer.hpp>
#include <ssmlib/model/language_model.hpp>
#include <ssmlib/train/data.hpp>
#include <ssmlib/train/losses.hpp>
#include <ssmlib/train/selection.hpp>
#include <ssmlib/train/trainer.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace ssm {

/// MOHAWK: a student whose mixers are of another class than the teacher's learns, in this order,
/// the teacher's matrices, the teacher's mixer outputs, and the teacher's predictions. Before stage
/// 1, transfer_weights() gives it everything but the mixers.
/// @source Bick et al. 2024, arXiv:2408.10189.
enum class mohawk_stage { matrix_orientation = 1, hidden_state_alignment = 2, distillation = 3 };

[[nodiscard]] inline std::string to_string(mohawk_stage stage) {
  switch (stage) {
    case mohawk_stage::matrix_orientation:
      return "stage 1, matrix orientation";
    case mohawk_stage::hidden_state_alignment:
      return "stage 2, hidden-state alignment";
    default:
      return "stage 3, distillation";
  }
}

/// The layers where the student's mixer is of another kind than the teacher's.
/// @throws shape_error  patterns of different lengths, or a mixer against an MLP.
template <Real T>
[[nodiscard]] std::vector<index_t> replaced_layers(const language_model<T>& teacher,
                                                   const language_model<T>& student) {
  const std::string &a = teacher.config().pattern, &b = student.config().pattern;
  std::vector<index_t> layers;
  bool fits = a.size() == b.size();
  for (index_t i = 0; fits && i < teacher.layers(); ++i) {
    fits = teacher.block(i).has_mixer() == student.block(i).has_mixer();
    if (teacher.block(i).has_mixer() &&
        a[static_cast<std::size_t>(i)] != b[static_cast<std::size_t>(i)]) {
      layers.push_back(i);
    }
  }
  if (!fits) {
    throw shape_error("ssm: mohawk: the teacher is \"" + a + "\", the student \"" + b +
                      "\"; wanted as many layers, and a mixer where the teacher has one");
  }
  return layers;
}

/// What trains in a stage, as patterns of parameter names: in stages 1 and 2 the replaced mixers,
/// in stage 3 everything.
template <Real T>
[[nodiscard]] std::vector<std::string> mohawk_trained(mohawk_stage stage,
                                                      const language_model<T>& teacher,
                                                      const language_model<T>& student) {
  if (stage == mohawk_stage::distillation) return {"*"};
  std::vector<std::string> patterns;
  for (const index_t i : replaced_layers(teacher, student)) {
    patterns.push_back("layers." + std::to_string(i) + ".mixer.*");
  }
  return patterns;
}

struct mohawk_options {
  double temperature = 1.0;  ///< of stage 3
};

/// The loss of one stage on a batch of token ids, for train().
///
/// Stages 1 and 2 feed every student layer the teacher's own input of that layer, so that layers
/// learn independently; the loss is the mean over the replaced layers. Stage 1 counts sequences,
/// stages 2 and 3 tokens.
/// @param ids  (b, T)
template <Real T>
[[nodiscard]] loss_sum<T> mohawk_loss(mohawk_stage stage, const language_model<T>& teacher,
                                      const language_model<T>& student, const pass<T>& p,
                                      const tensor<std::int32_t, 2>& ids,
                                      const mohawk_options& options = {}) {
  const pass<T> silent{p.ctx, nullptr, false};
  if (stage == mohawk_stage::distillation) {
    const token_loss<T> kl = lm_kl_divergence(
        p, student.hidden(p, ids), student.head(), teacher.hidden(silent, ids), teacher.head(), {},
        {.temperature = options.temperature, .divide_by = 1.0});
    return {kl.loss, kl.tokens};
  }
  const std::vector<index_t> layers = replaced_layers(teacher, student);
  const sequence_layout layout = sequence_layout::rectangular(ids.extent(0), ids.extent(1));
  const bool first = stage == mohawk_stage::matrix_orientation;
  const index_t count = first ? ids.extent(0) : ids.size();
  const T share = static_cast<T>(static_cast<double>(count) /
                                 static_cast<double>(std::max<std::size_t>(layers.size(), 1)));
  auto total = tensor<T, 1>::zeros(1);
  tensor<T, 3> x = teacher.embed(silent, ids);
  std::size_t next = 0;
  for (index_t i = 0; i < teacher.layers() && next < layers.size(); ++i) {
    if (i == layers[next]) {
      ++next;
      const tensor<T, 1> loss =
          first ? matrix_orientation_loss<T>(p, teacher.block(i).mixer_matrix(silent, x, layout),
                                             student.block(i).mixer_matrix(p, x, layout))
                : hidden_state_alignment_loss(p, student.block(i).mixer_output(p, x, layout),
                                              teacher.block(i).mixer_output(silent, x, layout));
      total = eval(total + loss * share, p.tape, p.ctx);
    }
    x = teacher.block(i).forward(silent, x, layout);
  }
  return {total, count};
}

/// Trains the student through one stage.
/// @param optimizer  over the parameters that the stage trains, see mohawk_trained()
/// @return the steps taken
template <Real T, Loader L>
index_t train_mohawk_stage(mohawk_stage stage, const language_model<T>& teacher,
                           const language_model<T>& student, adamw<T>& optimizer, L& loader,
                           const training_options& training,
                           const training_callbacks& callbacks = {},
                           const mohawk_options& options = {},
                           const cpu::context& ctx = default_context<cpu>()) {
  return train<T>(
      optimizer, loader,
      [&](const pass<T>& p, const token_batch& batch) {
        return mohawk_loss(stage, teacher, student, p, batch.inputs, options);
      },
      training, callbacks, ctx);
}

#define SSMLIB_DETAIL_LIST(T)                                                              \
  SSMLIB_INSTANTIATE(distillation,                                                         \
                     loss_sum<T> mohawk_loss<T>(                                           \
                         mohawk_stage, const language_model<T>&, const language_model<T>&, \
                         const pass<T>&, const tensor<std::int32_t, 2>&, const mohawk_options&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
