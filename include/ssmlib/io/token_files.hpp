#pragma once

#include <ssmlib/io/atomic_file.hpp>
#include <ssmlib/train/data.hpp>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace ssm {

/// Tokens in files, a shard each: raw little-endian ids without a header, such as text as bytes.
/// Only their sizes are read at first; then what is asked for, when it is asked for.
template <TokenId Id>
class token_files {
 public:
  /// @throws io_error  a file is missing, or its size is no multiple of an id's.
  explicit token_files(std::vector<std::filesystem::path> files) : files_(std::move(files)) {
    for (const auto& file : files_) {
      std::error_code failed;
      const std::uintmax_t bytes = std::filesystem::file_size(file, failed);
      if (failed) {
        throw io_error("ssm: token_files: '" + file.string() + "': " + failed.message());
      }
      if (bytes % sizeof(Id) != 0) {
        throw io_error("ssm: token_files: '" + file.string() + "' has " + std::to_string(bytes) +
                       " bytes, no multiple of the " + std::to_string(sizeof(Id)) +
                       " bytes of an id; it is cut or of another type");
      }
      sizes_.push_back(static_cast<index_t>(bytes / sizeof(Id)));
    }
  }

  [[nodiscard]] index_t shards() const { return static_cast<index_t>(files_.size()); }
  [[nodiscard]] index_t shard_size(index_t shard) const {
    return sizes_[static_cast<std::size_t>(shard)];
  }
  /// @throws io_error  the file cannot be read or has become shorter.
  /// @cost opens the file; no file stays open, so that there may be many.
  void read(index_t shard, index_t begin, std::span<std::int32_t> to) const {
    const std::filesystem::path& path = files_[static_cast<std::size_t>(shard)];
    const detail::descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!file) detail::throw_file_error("reading", path);
    // The ids are read into the end of their destination and widened from the front: the place
    // that is written never overtakes the one that is read.
    char* const all = reinterpret_cast<char*>(to.data());
    char* const ids = all + to.size() * (sizeof(std::int32_t) - sizeof(Id));
    const std::size_t bytes = to.size() * sizeof(Id);
    for (std::size_t done = 0; done < bytes;) {
      const auto at = static_cast<off_t>(static_cast<std::size_t>(begin) * sizeof(Id) + done);
      const ssize_t n = ::pread(file.get(), ids + done, bytes - done, at);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) detail::throw_file_error("reading", path);
      if (n == 0) {
        throw io_error("ssm: reading '" + path.string() + "': it ended before token " +
                       std::to_string(begin + static_cast<index_t>(to.size())) +
                       "; it was changed after training began");
      }
      done += static_cast<std::size_t>(n);
    }
    for (std::size_t i = 0; i < to.size(); ++i) {
      Id id;
      std::memcpy(&id, ids + i * sizeof(Id), sizeof(Id));
      to[i] = detail::token_of(id);
    }
  }

 private:
  std::vector<std::filesystem::path> files_;
  std::vector<index_t> sizes_;
};

}  // namespace ssm
