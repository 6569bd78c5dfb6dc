#pragma once

#include "error.hpp"
#include <ssmlib/io/atomic_file.hpp>

#include <filesystem>
#include <string>
#include <system_error>

namespace demo {

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
  try {
    const ssm::atomic_file probe(folder / "probe");  // never committed: nothing stays
  } catch (const ssm::io_error& reason) {
    throw usage_error("the output folder '" + folder.string() + "' cannot be written (" +
                      reason.what() + "); name another one");
  }
}

}  // namespace demo
