#pragma once

#include "error.hpp"
#include "near_copies.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

// The build may name the folder that holds Eigen/Core where it is not one of the usual ones.
#ifndef DEMO_EIGEN_INCLUDE_DIR
#define DEMO_EIGEN_INCLUDE_DIR "/usr/include/eigen3"
#endif

namespace demo {

/// Where the default text is looked for.
struct default_text_folders {
  std::filesystem::path standard_library = "/usr/include/c++";  // one folder per version inside
  std::vector<std::filesystem::path> eigen = {DEMO_EIGEN_INCLUDE_DIR, "/usr/include/eigen3",
                                              "/usr/local/include/eigen3"};
};

struct corpus_options {
  double held_out_fraction = 0.1;          // share of the bytes, in (0, 0.5]
  std::uint64_t seed = 1;                  // of the split and of the documents' order
  std::size_t max_bytes = 32 << 20;        // text beyond it is left out, whole files first
  std::size_t min_bytes = 64 << 10;        // less text than this is refused
  double near_duplicate_threshold = 0.5;   // see without_near_copies
  default_text_folders default_folders{};  // used when no file is named
};

/// Training and held-out text: documents in a seeded order, joined by one separator byte.
struct corpus {
  static constexpr std::uint8_t separator = 0;
  std::vector<std::uint8_t> train;
  std::vector<std::uint8_t> held_out;
  std::vector<std::string> train_names;
  std::vector<std::string> held_out_names;
  std::vector<removed_document> removed;
  std::size_t files_read = 0;
  std::size_t files_left_out = 0;  // beyond max_bytes, or not text among the default files
  bool split_by_blocks = false;    // too few files for a split by file: blocks of lines instead
};

namespace detail {

inline void add_header_files(const std::filesystem::path& folder,
                             std::vector<std::filesystem::path>& files) {
  namespace fs = std::filesystem;
  constexpr auto options = fs::directory_options::skip_permission_denied;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, options, error), end; !error && it != end;
       it.increment(error)) {
    const auto extension = it->path().extension();
    const bool is_header =
        extension.empty() || extension == ".h" || extension == ".hpp" || extension == ".tcc";
    std::error_code ignored;
    if (is_header && it->is_regular_file(ignored)) files.push_back(it->path());
  }
}

// The newest version's folder; versions beside each other would be near copies of each other.
inline std::filesystem::path newest_version(const std::filesystem::path& folder) {
  std::filesystem::path newest;
  long newest_number = -1;
  std::error_code error;
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    const long number = std::strtol(it->path().filename().c_str(), nullptr, 10);
    if (number > newest_number) {
      newest_number = number;
      newest = it->path();
    }
  }
  return newest;
}

}  // namespace detail

/// The headers of the newest C++ standard library and of Eigen on this machine, sorted by path.
[[nodiscard]] inline std::vector<std::filesystem::path> find_default_text(
    const default_text_folders& folders = {}) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  if (const auto newest = detail::newest_version(folders.standard_library); !newest.empty()) {
    detail::add_header_files(newest, files);
  }
  for (const auto& folder : folders.eigen) {
    std::error_code ignored;
    if (!fs::exists(folder / "Eigen" / "Core", ignored)) continue;
    // Not the folder itself: with a plain install it may be the system's whole include folder.
    detail::add_header_files(folder / "Eigen", files);
    detail::add_header_files(folder / "unsupported" / "Eigen", files);
    break;
  }
  std::sort(files.begin(), files.end());
  return files;
}

namespace detail {

inline void require_text_file(const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const auto status = fs::status(path, error);
  if (!fs::exists(status)) {
    throw usage_error("the text file '" + path.string() + "' " +
                      (status.type() == fs::file_type::not_found
                           ? "does not exist"
                           : "cannot be reached: " + error.message()));
  }
  if (fs::is_directory(status)) {
    throw usage_error("'" + path.string() + "' is a folder, not a text file; name the files in it");
  }
  if (!fs::is_regular_file(status) && !fs::is_fifo(status)) {
    throw usage_error("'" + path.string() + "' is not a regular file; name a text file");
  }
}

inline std::vector<std::uint8_t> read_bytes(const std::filesystem::path& path, std::size_t limit) {
  const auto close = [](std::FILE* f) { std::fclose(f); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
  const auto fail = [&] {
    throw usage_error("cannot read the text file '" + path.string() + "': " + std::strerror(errno));
  };
  if (!file) fail();
  std::vector<std::uint8_t> bytes;
  std::array<std::uint8_t, 1 << 16> buffer;
  while (bytes.size() < limit) {
    const auto want = std::min(limit - bytes.size(), buffer.size());
    const auto got = std::fread(buffer.data(), 1, want, file.get());
    bytes.insert(bytes.end(), buffer.data(), buffer.data() + got);
    if (got < want) break;
  }
  if (std::ferror(file.get())) fail();
  return bytes;
}

// The length of the UTF-8 sequence that starts at `i`, 0 where none does.
inline std::size_t utf8_length(std::span<const std::uint8_t> text, std::size_t i) {
  const auto lead = text[i];
  const std::size_t length = lead < 0x80                   ? 1
                             : lead >= 0xC2 && lead < 0xE0 ? 2
                             : lead >= 0xE0 && lead < 0xF0 ? 3
                             : lead >= 0xF0 && lead < 0xF5 ? 4
                                                           : 0;
  if (length == 0 || i + length > text.size()) return 0;
  for (std::size_t j = 1; j < length; ++j) {
    if ((text[i + j] & 0xC0) != 0x80) return 0;
  }
  return length;
}

// Why these bytes are not text; empty if they are. Latin-1 passes: its letters are few bytes in a
// hundred, where compressed or compiled data have every third byte outside UTF-8.
inline std::string why_not_text(std::span<const std::uint8_t> bytes) {
  std::size_t control = 0;
  std::size_t malformed = 0;
  for (std::size_t i = 0; i < bytes.size();) {
    const auto c = bytes[i];
    if (c == 0) return "byte " + std::to_string(i) + " is zero";
    const bool layout = (c >= 8 && c <= 13) || c == 27;  // tabs, line ends, terminal colours
    if ((c < 32 && !layout) || c == 127) ++control;
    const auto length = utf8_length(bytes, i);
    if (length == 0) ++malformed;
    i += std::max<std::size_t>(length, 1);
  }
  const auto percent = [&](std::size_t n) {
    return 100 * n / std::max<std::size_t>(bytes.size(), 1);
  };
  if (percent(control) >= 2) return std::to_string(percent(control)) + " % are control bytes";
  if (percent(malformed) >= 30) return std::to_string(percent(malformed)) + " % are not UTF-8";
  return {};
}

// A seeded order that does not depend on the standard library's distributions.
template <class T>
void shuffle(std::vector<T>& items, std::uint64_t seed) {
  std::uint64_t state = mix_bits(seed + 0x9e3779b97f4a7c15ULL);
  for (auto n = items.size(); n > 1; --n) {
    state += 0x9e3779b97f4a7c15ULL;
    std::swap(items[n - 1], items[mix_bits(state) % n]);
  }
}

inline std::size_t total_bytes(const std::vector<document>& documents) {
  std::size_t total = 0;
  for (const auto& d : documents)
    total += d.bytes.size();
  return total;
}

// Cuts at the last line end inside each block, and inside a line only where one fills a block.
inline std::vector<document> cut_into_blocks(const std::vector<document>& files,
                                             std::size_t block_bytes) {
  std::vector<document> blocks;
  for (const auto& file : files) {
    const auto& bytes = file.bytes;
    for (std::size_t begin = 0, part = 1; begin < bytes.size(); ++part) {
      auto end = std::min(begin + block_bytes, bytes.size());
      if (end < bytes.size()) {
        auto line_end = end;
        while (line_end > begin && bytes[line_end - 1] != '\n')
          --line_end;
        if (line_end > begin) end = line_end;
      }
      const auto at = [&](std::size_t i) { return bytes.begin() + static_cast<std::ptrdiff_t>(i); };
      blocks.push_back({file.name + " (block " + std::to_string(part) + ")", {at(begin), at(end)}});
      begin = end;
    }
  }
  return blocks;
}

// Chooses the held-out documents in their (already shuffled) order, none that would overshoot.
// Leaves `held_out` empty where the sizes of the documents allow no split near the wanted one.
inline std::vector<bool> choose_held_out(const std::vector<document>& documents, double fraction) {
  const auto wanted = static_cast<double>(total_bytes(documents)) * fraction;
  std::vector<bool> held_out(documents.size(), false);
  double chosen = 0;
  for (std::size_t i = 0; i < documents.size() && chosen < 0.9 * wanted; ++i) {
    const auto size = static_cast<double>(documents[i].bytes.size());
    if (chosen + size > 1.25 * wanted) continue;
    held_out[i] = true;
    chosen += size;
  }
  if (chosen < 0.5 * wanted) held_out.clear();
  return held_out;
}

inline void append(std::vector<std::uint8_t>& text, const std::vector<std::uint8_t>& bytes) {
  if (!text.empty()) text.push_back(corpus::separator);
  text.insert(text.end(), bytes.begin(), bytes.end());
}

// Reads files in the given order until `max_bytes` is reached; every file is checked first.
inline std::vector<document> read_files(const std::vector<std::filesystem::path>& files,
                                        bool skip_others, std::size_t max_bytes, corpus& result) {
  if (!skip_others) std::for_each(files.begin(), files.end(), require_text_file);
  std::vector<document> documents;
  std::size_t total = 0;
  for (const auto& path : files) {
    if (total >= max_bytes) {
      ++result.files_left_out;
      continue;
    }
    auto bytes = read_bytes(path, max_bytes - total);
    if (const auto reason = why_not_text(bytes); !reason.empty()) {
      if (!skip_others) {
        throw usage_error("'" + path.string() + "' is not plain text (" + reason +
                          "); name UTF-8 or ASCII files");
      }
      ++result.files_left_out;
      continue;
    }
    total += bytes.size();
    documents.push_back({path.string(), std::move(bytes)});
    ++result.files_read;
  }
  return documents;
}

inline void require_enough_text(std::size_t bytes, std::size_t wanted, bool copies_removed) {
  if (bytes >= wanted) return;
  throw usage_error("the text is " + std::to_string(bytes) + " bytes" +
                    (copies_removed ? " after near copies were removed" : "") + ", at least " +
                    std::to_string(wanted) + " are needed; name more or longer files");
}

}  // namespace detail

/// Reads text, removes near copies, and splits it by file into training and held-out text.
///
/// Where the files are too few or too uneven for a split by file, they are cut into blocks of lines
/// that are treated as files. The result depends on the set of files, not on their order.
/// @param files  the user's files; none stands for find_default_text(options.default_folders).
/// @throws usage_error  a file is missing, a folder, unreadable or not text, or the text is shorter
///                      than options.min_bytes.
/// @cost O(bytes) time; about ten times the text in memory while it runs.
[[nodiscard]] inline corpus load_corpus(std::vector<std::filesystem::path> files = {},
                                        const corpus_options& options = {}) {
  if (!(options.held_out_fraction > 0.0 && options.held_out_fraction <= 0.5)) {
    throw usage_error("the held-out share of the text is " +
                      std::to_string(options.held_out_fraction) +
                      ", wanted more than 0, at most 0.5");
  }
  const bool use_default = files.empty();
  if (use_default) files = find_default_text(options.default_folders);
  if (files.empty()) {
    throw usage_error("no C++ standard library headers in '" +
                      options.default_folders.standard_library.string() +
                      "' and no Eigen headers were found; name text files instead");
  }
  std::sort(files.begin(), files.end());
  files.erase(std::unique(files.begin(), files.end()), files.end());
  detail::shuffle(files, options.seed);

  corpus result;
  auto documents = detail::read_files(files, use_default, options.max_bytes, result);
  detail::require_enough_text(detail::total_bytes(documents), options.min_bytes, false);
  documents =
      without_near_copies(std::move(documents), options.near_duplicate_threshold, result.removed);
  auto held_out = detail::choose_held_out(documents, options.held_out_fraction);
  if (held_out.empty()) {
    result.split_by_blocks = true;
    const auto total = detail::total_bytes(documents);
    const auto share = static_cast<double>(total) * options.held_out_fraction / 8;
    const auto block = std::clamp<std::size_t>(static_cast<std::size_t>(share), 256, 32 << 10);
    documents = detail::cut_into_blocks(documents, block);
    documents =
        without_near_copies(std::move(documents), options.near_duplicate_threshold, result.removed);
    detail::shuffle(documents, options.seed);
    held_out = detail::choose_held_out(documents, options.held_out_fraction);
  }
  detail::require_enough_text(detail::total_bytes(documents), options.min_bytes,
                              !result.removed.empty());
  if (held_out.empty()) {
    throw usage_error("the text is only " + std::to_string(documents.size()) +
                      " blocks of lines, too few to hold some out; name more or longer files");
  }
  for (std::size_t i = 0; i < documents.size(); ++i) {
    detail::append(held_out[i] ? result.held_out : result.train, documents[i].bytes);
    (held_out[i] ? result.held_out_names : result.train_names).push_back(documents[i].name);
  }
  return result;
}

}  // namespace demo
