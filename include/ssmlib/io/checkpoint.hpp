#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/io/safetensors.hpp>
#include <ssmlib/train/adamw.hpp>
#include <ssmlib/train/data.hpp>

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace ssm {

/// What a training run consists of besides its parameters and its optimizer.
struct run_state {
  loader_state loader;
  std::map<std::string, philox::position> generators;  ///< random numbers that the loss draws
  std::map<std::string, std::string> notes;            ///< the user's own: options, a stage's name
};

/// Saves all that a run needs to go on to the same bits: parameters (frozen ones too), moments, the
/// step, which is the schedule's position, the loader's state, random generators. Call it where
/// they fit together, in training_callbacks::on_step.
///
/// One safetensors file: "model.NAME", "adamw.first.NAME", "adamw.second.NAME", "adamw.steps",
/// "loader", "generator.NAME". It appears whole or not at all: a kill or a full disk leaves the
/// previous file as it was. What killed processes have left behind is removed.
///
/// @throws io_error     the file cannot be written.
/// @throws value_error  two parameters have one name.
/// @cost one write of 3 values a trained parameter, 1 a frozen one; no copy in memory, from CUDA
/// one
///       on the host, which waits for the current context's work.
template <Floating T, Backend B>
void save_checkpoint(const std::filesystem::path& path, const std::vector<parameter<T, B>>& model,
                     const adamw<T, B>& optimizer, const run_state& state);

/// Restores what save_checkpoint saved into a model and an optimizer of the same shapes. Everything
/// is checked before the first value changes.
/// @return the rest: restore the loader with it (`loader.restore(state.loader)`)
/// @throws io_error  the file cannot be read, is no checkpoint, or is one of another run: a tensor
///                   is missing, is too much, or has another type or shape.
template <Floating T, Backend B>
[[nodiscard]] run_state load_checkpoint(const std::filesystem::path& path,
                                        const std::vector<parameter<T, B>>& model,
                                        adamw<T, B>& optimizer);

namespace detail {

inline constexpr char checkpoint_format[] = "ssmlib checkpoint 1";
inline constexpr char note_prefix[] = "note.", generator_prefix[] = "generator.";

/// f(name in the file, values, extents) for every tensor of values.
template <Floating T, Backend B, class F>
void for_each_saved(const std::vector<parameter<T, B>>& model, const adamw<T, B>& optimizer,
                    F&& f) {
  for (const parameter<T, B>& p : model)
    f("model." + p.name, p.value, p.extents);
  for (std::size_t i = 0; i < optimizer.parameters().size(); ++i) {
    const parameter<T, B>& p = optimizer.parameters()[i];
    f("adamw.first." + p.name, optimizer.first_moments()[i], p.extents);
    f("adamw.second." + p.name, optimizer.second_moments()[i], p.extents);
  }
}

/// f(values under their extents), a tensor of their rank.
template <Element T, Backend B, class F>
void with_extents(const tensor<T, 1, B>& values, const std::vector<index_t>& extents, F&& f) {
  const auto as = [&]<int R>(std::integral_constant<int, R>) {
    shape<R> target;
    std::copy_n(extents.begin(), R, target.begin());
    f(values.template reshape<R>(target));
  };
  switch (extents.size()) {
    case 1:
      return as(std::integral_constant<int, 1>{});
    case 2:
      return as(std::integral_constant<int, 2>{});
    case 3:
      return as(std::integral_constant<int, 3>{});
    case 4:
      return as(std::integral_constant<int, 4>{});
    default:
      throw shape_error("ssm: checkpoint: a parameter has the rank " +
                        std::to_string(extents.size()) + "; wanted 1 to 4");
  }
}

inline void add_numbers(safetensors_writer& writer, const std::string& name,
                        const std::vector<index_t>& numbers) {
  tensor<index_t, 1> t(static_cast<index_t>(numbers.size()));
  std::copy(numbers.begin(), numbers.end(), t.data());
  writer.add(name, t);
}

/// @throws io_error  the tensor is not `type` with these extents.
inline void require_tensor(const safetensors_reader& file, const std::string& name, dtype type,
                           const std::vector<index_t>& extents) {
  const std::string where = "ssm: loading the checkpoint '" + file.path().string() + "': ";
  if (!file.contains(name)) {
    throw io_error(where + "it has no tensor '" + name +
                   "', which this run has; load it into the model and selection that it is of");
  }
  const safetensors_entry& entry = file.entry(name);
  if (entry.type != type || entry.extents != extents) {
    throw io_error(where + "tensor '" + name + "' is " + std::string(info_of(entry.type).name) +
                   " " + to_string(entry.extents) + ", this run's is " +
                   std::string(info_of(type).name) + " " + to_string(extents) +
                   "; load it into the model that it is of");
  }
}

inline std::vector<index_t> load_numbers(const safetensors_reader& file, const std::string& name,
                                         index_t count) {
  require_tensor(file, name, dtype::i64, {count});
  const auto t = file.load<index_t, 1>(name);
  return {t.data(), t.data() + count};
}

/// Loads a tensor into one of the same shape, on the CPU without a copy in between.
template <Element T, int R, Backend B>
void load_values(const safetensors_reader& file, const std::string& name,
                 const tensor<T, R, B>& to) {
  if constexpr (std::same_as<B, cpu>) {
    file.load_into(name, to);
  } else {
    to.copy_from(on_backend<B>(file.load<T, R>(name)));
  }
}

/// All but the values. @throws io_error  see load_checkpoint.
template <Floating T, Backend B>
void check_checkpoint(const safetensors_reader& file, const std::vector<parameter<T, B>>& model,
                      const adamw<T, B>& optimizer) {
  const std::string where = "ssm: loading the checkpoint '" + file.path().string() + "': ";
  const auto format = file.metadata().find("format");
  const std::string found = format == file.metadata().end() ? "none" : format->second;
  if (found != checkpoint_format) {
    throw io_error(where + "its format is '" + found + "', wanted '" + checkpoint_format +
                   "'; it is no checkpoint of this version");
  }
  std::set<std::string> known{"adamw.steps", "loader"};
  for_each_saved(model, optimizer,
                 [&](const std::string& name, const auto&, const std::vector<index_t>& extents) {
                   require_tensor(file, name, dtype_of<accum_t<T>>, extents);
                   known.insert(name);
                 });
  for (const safetensors_entry& entry : file.entries()) {
    const bool generator = entry.name.starts_with(generator_prefix);
    if (!generator && !known.contains(entry.name)) {
      throw io_error(where + "it has the tensor '" + entry.name +
                     "', which this run has not; load it into the model and selection that it is "
                     "of");
    }
  }
}

}  // namespace detail

template <Floating T, Backend B>
void save_checkpoint(const std::filesystem::path& path, const std::vector<parameter<T, B>>& model,
                     const adamw<T, B>& optimizer, const run_state& state) {
  safetensors_writer writer;
  detail::for_each_saved(
      model, optimizer,
      [&](const std::string& name, const auto& values, const std::vector<index_t>& extents) {
        detail::with_extents(detail::on_host(values), extents,
                             [&](const auto& t) { writer.add(name, t); });
      });
  detail::add_numbers(writer, "adamw.steps", {optimizer.steps()});
  const loader_state& l = state.loader;
  detail::add_numbers(
      writer, "loader",
      {l.epoch, l.position, std::bit_cast<index_t>(l.seed), l.sequence_length, l.sequences});
  for (const auto& [name, p] : state.generators) {
    detail::add_numbers(writer, detail::generator_prefix + name,
                        {std::bit_cast<index_t>(p.seed), std::bit_cast<index_t>(p.stream),
                         std::bit_cast<index_t>(p.drawn)});
  }
  writer.set_metadata("format", detail::checkpoint_format);
  for (const auto& [key, text] : state.notes)
    writer.set_metadata(detail::note_prefix + key, text);
  remove_abandoned_parts(path);
  writer.write(path);
}

template <Floating T, Backend B>
run_state load_checkpoint(const std::filesystem::path& path,
                          const std::vector<parameter<T, B>>& model, adamw<T, B>& optimizer) {
  const safetensors_reader file(path);
  detail::check_checkpoint(file, model, optimizer);
  run_state state;
  const auto loader = detail::load_numbers(file, "loader", 5);
  state.loader = {loader[0], loader[1], std::bit_cast<std::uint64_t>(loader[2]), loader[3],
                  loader[4]};
  for (const safetensors_entry& entry : file.entries()) {
    constexpr std::string_view prefix = detail::generator_prefix;
    if (!entry.name.starts_with(prefix)) continue;
    const auto n = detail::load_numbers(file, entry.name, 3);
    state.generators[entry.name.substr(prefix.size())] = {std::bit_cast<std::uint64_t>(n[0]),
                                                          std::bit_cast<std::uint64_t>(n[1]),
                                                          std::bit_cast<std::uint64_t>(n[2])};
  }
  for (const auto& [key, text] : file.metadata()) {
    constexpr std::string_view prefix = detail::note_prefix;
    if (key.starts_with(prefix)) state.notes[key.substr(prefix.size())] = text;
  }
  const index_t steps = detail::load_numbers(file, "adamw.steps", 1)[0];
  if (steps < 0) {
    throw io_error("ssm: loading the checkpoint '" + path.string() + "': it is at step " +
                   std::to_string(steps) + "; the file is damaged");
  }
  detail::for_each_saved(
      model, optimizer,
      [&](const std::string& name, const auto& values, const std::vector<index_t>& extents) {
        detail::with_extents(values, extents,
                             [&](const auto& t) { detail::load_values(file, name, t); });
      });
  optimizer.set_steps(steps);
  return state;
}

#define SSMLIB_DETAIL_LIST(T)                                                                  \
  SSMLIB_INSTANTIATE(checkpoints, void save_checkpoint<T>(const std::filesystem::path&,        \
                                                          const std::vector<parameter<T>>&,    \
                                                          const adamw<T>&, const run_state&)); \
  SSMLIB_INSTANTIATE(checkpoints,                                                              \
                     run_state load_checkpoint<T>(const std::filesystem::path&,                \
                                                  const std::vector<parameter<T>>&, adamw<T>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
