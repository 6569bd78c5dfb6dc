#pragma once

/// @file
/// What of reading and writing safetensors files is no template: the JSON header, the only place
/// that needs the JSON library, and the access to the files. Included by safetensors.hpp.

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>
#include <string_view>
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

namespace ssm {

SSMLIB_INLINE safetensors_reader::safetensors_reader(std::filesystem::path path)
    : path_(std::move(path)), file_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
  struct stat status {};
  if (!file_ || ::fstat(file_.get(), &status) != 0) detail::throw_file_error("reading", path_);
  if (!S_ISREG(status.st_mode)) throw io_error(where() + ": it is not a file");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  std::uint64_t length = 0;
  if (size < sizeof(length)) {
    throw io_error(where() + ": it has " + std::to_string(size) +
                   " bytes; a safetensors file has at least 8");
  }
  read(0, &length, sizeof(length));
  if (length > size - sizeof(length)) {
    throw io_error(where() + ": it has " + std::to_string(size) + " bytes, but its header has " +
                   std::to_string(length) + "; it is truncated or no safetensors file");
  }
  std::string text(length, '\0');
  read(sizeof(length), text.data(), text.size());
  data_begin_ = sizeof(length) + length;
  header_ = detail::parse_safetensors_header(text, size - data_begin_, where());
  for (std::size_t i = 0; i < header_.entries.size(); ++i)
    index_[header_.entries[i].name] = i;
}

SSMLIB_INLINE const safetensors_entry& safetensors_reader::entry(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) throw io_error(where() + ": it has no tensor '" + name + "'");
  return header_.entries[found->second];
}

SSMLIB_INLINE void safetensors_reader::read(std::uint64_t begin, void* to,
                                            std::size_t bytes) const {
  char* next = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t n = ::pread(file_.get(), next, bytes, static_cast<off_t>(begin));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) detail::throw_file_error("reading", path_);
    if (n == 0) throw io_error(where() + ": it ended early; it was cut while it was open");
    next += n;
    begin += static_cast<std::uint64_t>(n);
    bytes -= static_cast<std::size_t>(n);
  }
}

SSMLIB_INLINE double safetensors_reader::load_scalar(const std::string& name) const {
  const safetensors_entry& from = entry(name);
  if (from.size() != 1) {
    throw io_error(where() + ": tensor '" + name + "' is " + to_string(from.extents) +
                   ", wanted one element");
  }
  double value = 0;
  read_dense(from, &value);
  return value;
}

SSMLIB_INLINE void safetensors_writer::write(const std::filesystem::path& path) const {
  std::vector<const item*> order;
  for (const item& i : items_)
    order.push_back(&i);
  // Wide elements first: then all are aligned for readers that map the file.
  std::stable_sort(order.begin(), order.end(), [](const item* a, const item* b) {
    return detail::info_of(a->entry.type).bytes > detail::info_of(b->entry.type).bytes;
  });
  safetensors_header header{{}, metadata_};
  std::uint64_t end = 0;
  for (const item* i : order) {
    header.entries.push_back(i->entry);
    header.entries.back().begin = end;
    end += i->entry.end;
    header.entries.back().end = end;
  }
  const std::string text = detail::format_safetensors_header(header);
  const std::uint64_t length = text.size();
  atomic_file file(path);
  file.write(&length, sizeof(length));
  file.write(text);
  for (const item* i : order)
    file.write(i->data, static_cast<std::size_t>(i->entry.end));
  file.commit();
}

}  // namespace ssm
