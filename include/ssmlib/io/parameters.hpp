#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/io/checkpoint.hpp>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace ssm {

/// Saves a model's parameters by name in one safetensors file, with text of the user's own.
/// The file appears whole or not at all.
/// @throws io_error  the file cannot be written.
template <Floating T, Backend B>
void save_parameters(const std::filesystem::path& path, const std::vector<parameter<T, B>>& model,
                     const std::map<std::string, std::string>& metadata = {}) {
  safetensors_writer writer;
  for (const parameter<T, B>& p : model) {
    detail::with_extents(detail::on_host(p.value), p.extents,
                         [&](const auto& t) { writer.add(p.name, t); });
  }
  for (const auto& [key, value] : metadata)
    writer.set_metadata(key, value);
  writer.write(path);
}

/// Loads what save_parameters saved into a model of the same shapes. Everything is checked before
/// the first value changes. @return the metadata
/// @throws io_error  the file cannot be read, or a parameter is missing or of another shape.
template <Floating T, Backend B>
std::map<std::string, std::string> load_parameters(const std::filesystem::path& path,
                                                   const std::vector<parameter<T, B>>& model) {
  const safetensors_reader file(path);
  for (const parameter<T, B>& p : model) {
    detail::require_tensor(file, p.name, detail::dtype_of<accum_t<T>>, p.extents);
  }
  for (const parameter<T, B>& p : model) {
    detail::with_extents(p.value, p.extents,
                         [&](const auto& t) { detail::load_values(file, p.name, t); });
  }
  return {file.metadata().begin(), file.metadata().end()};
}

#define SSMLIB_DETAIL_LIST(T)                                                                 \
  SSMLIB_INSTANTIATE(                                                                         \
      checkpoints,                                                                            \
      void save_parameters<T>(const std::filesystem::path&, const std::vector<parameter<T>>&, \
                              const std::map<std::string, std::string>&));                    \
  SSMLIB_INSTANTIATE(checkpoints,                                                             \
                     std::map<std::string, std::string> load_parameters<T>(                   \
                         const std::filesystem::path&, const std::vector<parameter<T>>&))
SSMLIB_DETAIL_LIST(float);
SSMLIB_DETAIL_LIST(double);
#undef SSMLIB_DETAIL_LIST

}  // namespace ssm
