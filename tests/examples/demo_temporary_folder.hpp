#pragma once

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdlib.h>
#include <string>
#include <system_error>
#include <vector>

namespace demo_test {

// A folder of its own for a test, removed with all that is in it.
class temporary_folder {
 public:
  temporary_folder() {
    std::string name = (std::filesystem::temp_directory_path() / "ssmlib_demo_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::system_error(errno, std::generic_category());
    path_ = name;
  }
  temporary_folder(const temporary_folder&) = delete;
  temporary_folder& operator=(const temporary_folder&) = delete;
  ~temporary_folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  std::filesystem::path add(const std::string& name, const std::string& text) const {
    const auto file = path_ / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << text;
    return file;
  }

  [[nodiscard]] std::size_t entries() const {
    std::size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path_))
      count += entry.exists();
    return count;
  }

 private:
  std::filesystem::path path_;
};

inline std::string random_bytes(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::string bytes(size, '\0');
  for (auto& b : bytes)
    b = static_cast<char>(engine() & 255);
  return bytes;
}

// Sentences of random words of 2 to 9 letters: two seeds share next to no eight words in a row.
inline std::string random_prose(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::string text;
  for (int word = 1; text.size() < size; ++word) {
    for (auto n = 2 + engine() % 8; n > 0; --n)
      text += static_cast<char>('a' + engine() % 26);
    text += word % 12 == 0 ? ".\n" : " ";
  }
  text.resize(size);
  return text;
}

}  // namespace demo_test
