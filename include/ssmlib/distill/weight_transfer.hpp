#pragma once

#include <ssmlib/mixer/attention.hpp>
#include <ssmlib/mixer/linear_attention.hpp>
#include <ssmlib/mixer/mamba2.hpp>
#include <ssmlib/model/language_model.hpp>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace ssm {

namespace detail {

/// Whether a parameter belongs to a sequence mixer: "layers.3.mixer.in_proj.weight".
[[nodiscard]] inline bool is_mixer_parameter(std::string_view name) {
  return name.find(".mixer.") != std::string_view::npos;
}

/// to's heads get from's rows, head by head: head h of `heads` from head h * from_heads / heads.
/// Rows of a head are `size` each.
template <Floating T, Backend B>
void copy_head_rows(const tensor<T, 2, B>& to, index_t heads, const tensor<T, 2, B>& from,
                    index_t from_heads, index_t size) {
  for (index_t h = 0; h < heads; ++h) {
    const index_t g = group_of(h, heads, from_heads);
    to.slice(0, h * size, (h + 1) * size).copy_from(from.slice(0, g * size, (g + 1) * size));
  }
}

/// @throws shape_error  the student's size is not the teacher's.
void require_equal(const char* operation, const char* what, index_t actual, index_t wanted);
/// @throws value_error  the teacher's projections have biases, which the student has no place for.
void require_no_bias(const char* operation, const attention_options& teacher);

}  // namespace detail

/// MOHAWK's weight transfer: copies every parameter of the teacher that is not a mixer's, and that
/// the student has by the same name and shape (embedding, norms, MLPs, head); mixers that are the
/// same function in both, see any_block::has_same_mixer, are copied too.
///
/// @return the names that were copied
/// @throws shape_error  patterns of different lengths, or a parameter of another shape.
/// @source Bick et al. 2024 (MOHAWK), arXiv:2408.10189, section 4.3.
template <Floating T, Backend B>
std::vector<std::string> transfer_weights(const language_model<T, B>& teacher,
                                          const language_model<T, B>& student) {
  const std::string &from = teacher.config().pattern, &to = student.config().pattern;
  if (from.size() != to.size()) {
    throw shape_error("ssm: transfer_weights: the teacher \"" + from + "\" has " +
                      std::to_string(from.size()) + " layers, the student \"" + to + "\" has " +
                      std::to_string(to.size()) + "; wanted as many, mixer against mixer");
  }
  const auto sources = teacher.parameters();
  std::vector<std::string> copied;
  for (const parameter<T, B>& target : student.parameters()) {
    for (const parameter<T, B>& source : sources) {
      if (source.name != target.name) continue;
      if (detail::is_mixer_parameter(target.name)) {
        const auto layer = static_cast<index_t>(std::stoll(target.name.substr(7)));
        if (!teacher.block(layer).has_same_mixer(student.block(layer))) break;
      }
      if (source.extents != target.extents) {
        throw shape_error("ssm: transfer_weights: " + target.name + " is " +
                          to_string(source.extents) + " in the teacher and " +
                          to_string(target.extents) +
                          " in the student; wanted the same width and hidden sizes");
      }
      target.value.copy_from(source.value);
      copied.push_back(target.name);
    }
  }
  return copied;
}

/// Starts a Mamba-2 mixer from attention as in Mamba-in-the-Llama: Q -> C, K -> B, V -> x, O ->
/// out. Key/value heads are repeated for the query heads that share them; z and dt keep their own
/// start. For tokens without rotary embedding, the linearised attention and the new mixer then
/// project to the same tensors.
///
/// @pre the student has a head for each query head, its own B and C per head (groups = heads), and
///      head_dim = state = the attention's head_dim; the attention has no biases
/// @throws shape_error  other sizes. @throws value_error  biases.
/// @source Wang et al. 2024, arXiv:2408.15237, section 3.1 and algorithm 1.
template <Floating T, Backend B>
void transfer_attention(const attention<T, B>& teacher, const mamba2<T, B>& student) {
  const auto& a = teacher.options();
  const auto& m = student.options();
  const char* name = "transfer_attention to Mamba-2";
  detail::require_no_bias(name, a);
  detail::require_equal(name, "head count", m.heads, a.heads);
  detail::require_equal(name, "group count", m.groups, a.heads);
  detail::require_equal(name, "head_dim", m.head_dim, a.head_dim);
  detail::require_equal(name, "state size", m.state, a.head_dim);
  detail::require_equal(name, "width", m.width, a.width);
  const index_t inner = student.inner();  // = groups * state
  const auto rows = [&](index_t part) {   // in_proj makes [z, x, B, C, dt]
    return student.in_proj.weight.slice(0, part * inner, (part + 1) * inner);
  };
  detail::copy_head_rows(rows(1), m.heads, teacher.v_proj.weight, a.kv_heads, a.head_dim);
  detail::copy_head_rows(rows(2), m.heads, teacher.k_proj.weight, a.kv_heads, a.head_dim);
  detail::copy_head_rows(rows(3), m.heads, teacher.q_proj.weight, a.heads, a.head_dim);
  student.out_proj.weight.copy_from(teacher.o_proj.weight);
}

/// The same for the discrete Mamba-2, whose in_proj makes [x, B, C, z, a].
/// @pre qk_heads = heads = the attention's heads; head_dim = state = its head_dim; no biases
/// @throws shape_error  other sizes. @throws value_error  biases.
template <Floating T, Backend B>
void transfer_attention(const attention<T, B>& teacher, const discrete_mamba2<T, B>& student) {
  const auto& a = teacher.options();
  const auto& m = student.options();
  const char* name = "transfer_attention to the discrete Mamba-2";
  detail::require_no_bias(name, a);
  detail::require_equal(name, "head count", m.heads, a.heads);
  detail::require_equal(name, "qk_head count", m.qk_heads, a.heads);
  detail::require_equal(name, "head_dim", m.head_dim, a.head_dim);
  detail::require_equal(name, "state size", m.state, a.head_dim);
  detail::require_equal(name, "width", m.width, a.width);
  const index_t inner = student.inner();
  const auto rows = [&](index_t part) {
    return student.in_proj.weight.slice(0, part * inner, (part + 1) * inner);
  };
  detail::copy_head_rows(rows(0), m.heads, teacher.v_proj.weight, a.kv_heads, a.head_dim);
  detail::copy_head_rows(rows(1), m.heads, teacher.k_proj.weight, a.kv_heads, a.head_dim);
  detail::copy_head_rows(rows(2), m.heads, teacher.q_proj.weight, a.heads, a.head_dim);
  student.out_proj.weight.copy_from(teacher.o_proj.weight);
}

/// The four projections of linear attention are attention's own.
/// @pre the same heads, kv_heads and head_dim; the attention has no biases
/// @throws shape_error  other sizes. @throws value_error  biases.
template <Floating T, FeatureMap Phi, Backend B>
void transfer_attention(const attention<T, B>& teacher,
                        const linear_attention<T, Phi, B>& student) {
  const auto& a = teacher.options();
  const auto& l = student.options();
  const char* name = "transfer_attention to linear attention";
  detail::require_no_bias(name, a);
  detail::require_equal(name, "head count", l.heads, a.heads);
  detail::require_equal(name, "kv_head count", l.kv_heads, a.kv_heads);
  detail::require_equal(name, "head_dim", l.head_dim, a.head_dim);
  detail::require_equal(name, "width", l.width, a.width);
  student.q_proj.weight.copy_from(teacher.q_proj.weight);
  student.k_proj.weight.copy_from(teacher.k_proj.weight);
  student.v_proj.weight.copy_from(teacher.v_proj.weight);
  student.o_proj.weight.copy_from(teacher.o_proj.weight);
}

/// Starts every mixer of the student that replaces attention from the attention it replaces, where
/// a transfer_attention() for the pair exists. @return the layers that were started so
template <Floating T, Backend B>
std::vector<index_t> transfer_mixers(const language_model<T, B>& teacher,
                                     const language_model<T, B>& student) {
  std::vector<index_t> layers;
  for (index_t i = 0; i < std::min(teacher.layers(), student.layers()); ++i) {
    const auto* from = teacher.block(i).template mixer_as<attention<T, B>>();
    if (from == nullptr) continue;
    const auto start = [&](const auto* to) {
      if (to == nullptr) return false;
      transfer_attention(*from, *to);
      layers.push_back(i);
      return true;
    };
    const any_block<T, B>& b = student.block(i);
    start(b.template mixer_as<mamba2<T, B>>()) ||
        start(b.template mixer_as<discrete_mamba2<T, B>>()) ||
        start(b.template mixer_as<linear_attention<T, feature::elu_plus_one, B>>());
  }
  return layers;
}

}  // namespace ssm

#ifndef SSMLIB_COMPILED
#include <ssmlib/distill/weight_transfer_impl.hpp>
#endif
