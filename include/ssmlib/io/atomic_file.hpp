#pragma once

#include <ssmlib/base/error.hpp>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace ssm {

namespace detail {

/// A file descriptor that closes itself.
class descriptor {
 public:
  explicit descriptor(int fd) : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  [[nodiscard]] int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

/// "ssm: writing 'a/b': no space left on device", from errno.
[[noreturn]] inline void throw_file_error(const char* operation,
                                          const std::filesystem::path& path) {
  const std::string reason = std::strerror(errno);
  throw io_error("ssm: " + std::string(operation) + " '" + path.string() + "': " + reason);
}

/// Between a destination's name and the id of the process that writes it.
inline constexpr char part_suffix[] = ".part.";

}  // namespace detail

/// A file that appears under its name whole or not at all: bytes go to a new file in the same
/// folder, and commit() syncs it and renames it into place. Whoever reads the name sees the old
/// content or the new one, also after a crash or a kill. Without commit() nothing changes and the
/// new file is removed.
class atomic_file {
 public:
  /// @throws io_error  the folder takes no new file.
  explicit atomic_file(std::filesystem::path destination)
      : destination_(std::move(destination)),
        temporary_(unused_name(destination_)),
        file_(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    if (!file_) detail::throw_file_error("writing", destination_);
  }
  atomic_file(const atomic_file&) = delete;
  atomic_file& operator=(const atomic_file&) = delete;
  ~atomic_file() {
    if (!committed_) ::unlink(temporary_.c_str());
  }

  /// Appends. @throws io_error  the disk is full, a limit is reached, or the device failed.
  void write(const void* data, std::size_t bytes) {
    const char* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t n = ::write(file_.get(), next, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) detail::throw_file_error("writing", destination_);
      next += n;
      bytes -= static_cast<std::size_t>(n);
    }
  }
  void write(std::string_view text) { write(text.data(), text.size()); }

  /// Makes the bytes durable, then visible under the destination's name. Call once, last.
  /// @throws io_error  the system could not; the destination is as it was.
  void commit() {
    struct stat old {};
    if (::stat(destination_.c_str(), &old) == 0) {
      // A file system without permissions refuses; the content matters more.
      (void)!::fchmod(file_.get(), old.st_mode & 07777);
    }
    if (::fsync(file_.get()) != 0) detail::throw_file_error("writing", destination_);
    if (std::rename(temporary_.c_str(), destination_.c_str()) != 0) {
      detail::throw_file_error("writing", destination_);
    }
    committed_ = true;
    const auto folder = destination_.has_parent_path() ? destination_.parent_path() : ".";
    const detail::descriptor opened(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    // Some file systems cannot sync a folder; the file's own bytes are safe either way.
    if (opened) (void)!::fsync(opened.get());
  }

 private:
  static std::filesystem::path unused_name(const std::filesystem::path& destination) {
    static std::atomic<unsigned> count{0};
    std::filesystem::path name = destination;
    name += detail::part_suffix + std::to_string(::getpid()) + "." + std::to_string(count++);
    // A process of the same id may have been killed here before.
    ::unlink(name.c_str());
    return name;
  }

  std::filesystem::path destination_, temporary_;
  detail::descriptor file_;
  bool committed_ = false;
};

/// Removes what processes that were killed while writing `destination` have left next to it, so
/// that kills do not fill the disk. Processes are those of this machine: others must not write the
/// same destination. What cannot be removed stays.
inline void remove_abandoned_parts(const std::filesystem::path& destination) {
  const auto folder = destination.has_parent_path() ? destination.parent_path() : ".";
  const std::string prefix = destination.filename().string() + detail::part_suffix;
  std::error_code ignored;
  for (std::filesystem::directory_iterator it(folder, ignored), end; it != end;
       it.increment(ignored)) {
    const std::string name = it->path().filename().string();
    if (!name.starts_with(prefix)) continue;
    const long writer = std::strtol(name.c_str() + prefix.size(), nullptr, 10);
    const bool gone = writer > 0 && ::kill(static_cast<pid_t>(writer), 0) != 0 && errno == ESRCH;
    if (gone) ::unlink(it->path().c_str());
  }
}

/// Writes a whole file or nothing. @throws io_error  one sentence with the system's reason.
inline void write_atomically(const std::filesystem::path& path, std::string_view bytes) {
  atomic_file file(path);
  file.write(bytes);
  file.commit();
}

}  // namespace ssm
