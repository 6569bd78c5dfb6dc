#pragma once

/// @file
/// The JSON header of a safetensors file: the one part of reading and writing it that needs the
/// JSON library. Included by safetensors.hpp.

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/io/safetensors_header.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>
#include <tuple>

namespace ssm::detail {

/// A count from JSON. @throws io_error  negative, fractional, or no number.
SSMLIB_INLINE std::uint64_t json_count(const nlohmann::json& value, const std::string& where) {
  if (!value.is_number_unsigned()) {
    throw io_error(where + " has " + value.dump() + " where a count is wanted");
  }
  return value.get<std::uint64_t>();
}

SSMLIB_INLINE safetensors_entry parse_entry(const std::string& name, const nlohmann::json& value,
                                            const std::string& file) {
  const std::string where = file + ": tensor '" + name + "'";
  if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string() ||
      !value.contains("shape") || !value["shape"].is_array() || !value.contains("data_offsets") ||
      !value["data_offsets"].is_array() || value["data_offsets"].size() != 2) {
    throw io_error(where + " is described by " + value.dump() +
                   "; wanted dtype, shape and two data_offsets");
  }
  safetensors_entry entry;
  entry.name = name;
  const auto type_name = value["dtype"].get<std::string>();
  const auto* info = std::find_if(std::begin(dtype_table), std::end(dtype_table),
                                  [&](const dtype_info& d) { return d.name == type_name; });
  if (info == std::end(dtype_table)) {
    throw io_error(where + " is of the type " + type_name +
                   ", which is not supported; convert the file");
  }
  entry.type = info->type;
  std::uint64_t bytes = info->bytes;
  for (const auto& extent : value["shape"]) {
    const std::uint64_t n = json_count(extent, where);
    if (n > largest_extent || __builtin_mul_overflow(bytes, n, &bytes)) {
      throw io_error(where + " has the shape " + value["shape"].dump() +
                     ", which no file can hold");
    }
    entry.extents.push_back(static_cast<index_t>(n));
  }
  entry.begin = json_count(value["data_offsets"][0], where);
  entry.end = json_count(value["data_offsets"][1], where);
  if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
    throw io_error(where + " is " + type_name + " " + to_string(entry.extents) + ", which is " +
                   std::to_string(bytes) + " bytes, but its offsets are " +
                   std::to_string(entry.begin) + " to " + std::to_string(entry.end));
  }
  return entry;
}

/// Every tensor's bytes follow the last one's, from the first byte of the data to the last.
SSMLIB_INLINE void check_coverage(const std::vector<safetensors_entry>& entries,
                                  std::uint64_t data_bytes, const std::string& file) {
  std::uint64_t end = 0;
  for (const safetensors_entry& entry : entries) {
    if (entry.end > data_bytes) {
      throw io_error(file + ": tensor '" + entry.name + "' ends at byte " +
                     std::to_string(entry.end) + " of " + std::to_string(data_bytes) +
                     " bytes of data; the file is truncated");
    }
    if (entry.begin != end) {
      throw io_error(file + ": tensor '" + entry.name + "' begins at byte " +
                     std::to_string(entry.begin) + ", but the one before it ends at byte " +
                     std::to_string(end) + "; tensors must neither overlap nor leave holes");
    }
    end = entry.end;
  }
  if (end != data_bytes) {
    throw io_error(file + ": the tensors end at byte " + std::to_string(end) + " of " +
                   std::to_string(data_bytes) + " bytes of data; the rest belongs to none");
  }
}

SSMLIB_INLINE safetensors_header parse_safetensors_header(std::string_view text,
                                                          std::uint64_t data_bytes,
                                                          const std::string& file) {
  std::vector<std::set<std::string>> keys;  // per level: JSON itself lets the last duplicate win
  std::string duplicate;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using event_t = nlohmann::json::parse_event_t;
    const auto level = static_cast<std::size_t>(depth);
    if (event == event_t::object_start) {
      keys.resize(std::max(keys.size(), level + 2));
      keys[level + 1].clear();
    } else if (event == event_t::key) {
      const auto name = parsed.get<std::string>();
      if (!keys[level].insert(name).second) duplicate = name;
    }
    return true;
  };
  nlohmann::json parsed;
  try {
    parsed = nlohmann::json::parse(text, watch);
  } catch (const nlohmann::json::exception&) {
    throw io_error(file + ": the header of " + std::to_string(text.size()) +
                   " bytes is not JSON; the file is damaged or no safetensors file");
  }
  if (!parsed.is_object()) throw io_error(file + ": the header is not a JSON object");
  if (!duplicate.empty()) {
    throw io_error(file + ": the header has the name '" + duplicate + "' twice");
  }
  safetensors_header header;
  for (const auto& [name, value] : parsed.items()) {
    if (name != "__metadata__") {
      header.entries.push_back(parse_entry(name, value, file));
      continue;
    }
    if (!value.is_object()) throw io_error(file + ": __metadata__ is not a JSON object");
    for (const auto& [key, content] : value.items()) {
      if (!content.is_string()) {
        throw io_error(file + ": __metadata__ '" + key + "' is not a string");
      }
      header.metadata[key] = content.get<std::string>();
    }
  }
  std::sort(header.entries.begin(), header.entries.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_coverage(header.entries, data_bytes, file);
  return header;
}

/// The header's text, padded with spaces so that the data begins at a multiple of 8 bytes.
SSMLIB_INLINE std::string format_safetensors_header(const safetensors_header& header) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!header.metadata.empty()) json["__metadata__"] = header.metadata;
  for (const safetensors_entry& entry : header.entries) {
    json[entry.name] = {{"dtype", info_of(entry.type).name},
                        {"shape", entry.extents},
                        {"data_offsets", {entry.begin, entry.end}}};
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::json::exception&) {
    throw value_error("ssm: safetensors: a tensor's name or a metadata text is not UTF-8");
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace ssm::detail
