#pragma once

#include "error.hpp"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>

namespace demo {
namespace detail {

// A file next to its destination that is removed again unless it was renamed into place.
class temporary_file {
 public:
  explicit temporary_file(const std::filesystem::path& destination)
      : path_(destination.string() + ".part.XXXXXX"), descriptor_(::mkstemp(path_.data())) {}
  temporary_file(const temporary_file&) = delete;
  temporary_file& operator=(const temporary_file&) = delete;
  ~temporary_file() {
    if (descriptor_ < 0) return;
    ::close(descriptor_);
    if (!renamed_) ::unlink(path_.c_str());
  }

  [[nodiscard]] bool is_open() const { return descriptor_ >= 0; }

  [[nodiscard]] bool write(std::string_view bytes) {
    while (!bytes.empty()) {
      const auto n = ::write(descriptor_, bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }

  // mkstemp creates with mode 0600; a report is meant to be read by others.
  [[nodiscard]] bool settle() {
    return ::fchmod(descriptor_, 0644) == 0 && ::fsync(descriptor_) == 0;
  }

  [[nodiscard]] bool rename_to(const std::filesystem::path& destination) {
    renamed_ = std::rename(path_.c_str(), destination.c_str()) == 0;
    return renamed_;
  }

 private:
  std::string path_;
  int descriptor_;
  bool renamed_ = false;
};

inline std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

inline void sync_folder(const std::filesystem::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  // Some file systems cannot sync a folder; the file itself is already safe.
  (void)::fsync(descriptor);
  ::close(descriptor);
}

}  // namespace detail

/// Writes a whole file or nothing: readers and crashes see the old content or the new, never a mix.
///
/// The bytes go to a temporary file in the same folder, are synced and renamed over `path`.
/// @throws file_error  one sentence with the system's reason; no temporary file stays behind.
inline void write_atomically(const std::filesystem::path& path, std::string_view bytes) {
  const auto fail = [&](const char* step) {
    const std::string reason = std::strerror(errno);
    throw file_error("cannot write '" + path.string() + "': " + step + ": " + reason);
  };
  detail::temporary_file file(path);
  if (!file.is_open()) fail("the folder takes no new file");
  if (!file.write(bytes)) fail("writing failed");
  if (!file.settle()) fail("flushing to the disk failed");
  if (!file.rename_to(path)) fail("renaming into place failed");
  detail::sync_folder(detail::folder_of(path));
}

/// Creates an output folder if needed and proves by trying that files can be written there.
///
/// @throws usage_error  the folder cannot be created or written.
inline void require_writable_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (!std::filesystem::is_directory(folder)) {
    throw usage_error("the output folder '" + folder.string() + "' cannot be created" +
                      (error ? ": " + error.message() : std::string()) + "; name another one");
  }
  detail::temporary_file probe(folder / "probe");
  if (!probe.is_open()) {
    throw usage_error("the output folder '" + folder.string() +
                      "' cannot be written: " + std::strerror(errno) + "; name another one");
  }
}

}  // namespace demo
