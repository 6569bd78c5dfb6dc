#include "../../examples/distill/corpus.hpp"

#include "../../examples/distill/png.hpp"
#include "../support/catch.hpp"
#include "demo_temporary_folder.hpp"

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

namespace {

using demo::corpus_options;
using demo::load_corpus;
using demo_test::random_bytes;
using demo_test::random_prose;
using demo_test::temporary_folder;
using ssm_test::contains;
using paths = std::vector<std::filesystem::path>;

paths add_prose_files(const temporary_folder& folder, int count, std::size_t size) {
  paths files;
  for (int i = 0; i < count; ++i) {
    files.push_back(folder.add("prose" + std::to_string(i) + ".txt",
                               random_prose(size, static_cast<std::uint64_t>(i) + 1)));
  }
  return files;
}

std::string as_string(const std::vector<std::uint8_t>& bytes) {
  return {bytes.begin(), bytes.end()};
}

}  // namespace

TEST_CASE("examples/corpus: a split by file puts every file whole on one side",
          "[examples][corpus]") {
  const temporary_folder folder;
  const auto files = add_prose_files(folder, 40, 5000);
  const auto c = load_corpus(files);
  CHECK_FALSE(c.split_by_blocks);
  CHECK(c.held_out_names.size() == 4);
  CHECK(c.train_names.size() == 36);
  std::set<std::string> names(c.train_names.begin(), c.train_names.end());
  names.insert(c.held_out_names.begin(), c.held_out_names.end());
  CHECK(names.size() == 40);
  for (std::size_t i = 0; i < files.size(); ++i) {
    const auto text = random_prose(5000, i + 1);
    const auto on_held_out_side =
        std::count(c.held_out_names.begin(), c.held_out_names.end(), files[i].string()) == 1;
    const auto side = as_string(on_held_out_side ? c.held_out : c.train);
    CHECK(side.find(text) != std::string::npos);
  }
}

TEST_CASE("examples/corpus: documents are joined by one zero byte", "[examples][corpus]") {
  const temporary_folder folder;
  const auto c = load_corpus(add_prose_files(folder, 40, 5000));
  CHECK(std::count(c.train.begin(), c.train.end(), 0) == 35);
  CHECK(c.train.size() == 36 * 5000 + 35);
  CHECK(std::count(c.held_out.begin(), c.held_out.end(), 0) == 3);
}

TEST_CASE("examples/corpus: the split depends on the seed and not on the order of the files",
          "[examples][corpus]") {
  const temporary_folder folder;
  auto files = add_prose_files(folder, 40, 5000);
  const auto first = load_corpus(files);
  std::reverse(files.begin(), files.end());
  files.push_back(files.front());
  const auto again = load_corpus(files);
  CHECK(first.train == again.train);
  CHECK(first.held_out == again.held_out);
  corpus_options other;
  other.seed = 2;
  CHECK(load_corpus(files, other).held_out_names != first.held_out_names);
}

TEST_CASE("examples/corpus: of a file and its copy with a changed comment one is dropped",
          "[examples][corpus]") {
  const temporary_folder folder;
  auto files = add_prose_files(folder, 40, 5000);
  auto copy = "// A new comment, by somebody else.\n" + random_prose(5000, 7);
  copy.replace(2500, 30, "and another change in the text");
  files.push_back(folder.add("a_copy.txt", copy));
  const auto c = load_corpus(files);
  REQUIRE(c.removed.size() == 1);
  CHECK(c.removed[0].name == files[6].string());
  CHECK(c.removed[0].like == files.back().string());
  CHECK(c.removed[0].overlap > 0.9);
  CHECK(c.train_names.size() + c.held_out_names.size() == 40);
}

TEST_CASE("examples/corpus: a part of a longer file is dropped", "[examples][corpus]") {
  const temporary_folder folder;
  auto files = add_prose_files(folder, 40, 5000);
  files.push_back(folder.add("part.txt", random_prose(5000, 9).substr(1000, 800)));
  const auto c = load_corpus(files);
  REQUIRE(c.removed.size() == 1);
  CHECK(c.removed[0].name == files.back().string());
  CHECK(c.removed[0].like == files[8].string());
}

TEST_CASE("examples/corpus: equal files leave exactly one", "[examples][corpus]") {
  const temporary_folder folder;
  auto files = add_prose_files(folder, 20, 5000);
  for (int i = 0; i < 9; ++i) {
    files.push_back(folder.add("same" + std::to_string(i), random_prose(4000, 99)));
  }
  const auto c = load_corpus(files);
  CHECK(c.removed.size() == 8);
  CHECK(c.train_names.size() + c.held_out_names.size() == 21);
}

TEST_CASE("examples/corpus: re-indenting a copy does not hide it", "[examples][corpus]") {
  const std::string text = "int main() {\n  return f(a, b) + g(c, d);\n}\n";
  std::string indented;
  for (const char c : text)
    indented += c == ' ' ? "\t  " : std::string(1, c);
  std::vector<demo::removed_document> removed;
  const auto kept = demo::without_near_copies(
      {{"a", {text.begin(), text.end()}}, {"b", {indented.begin(), indented.end()}}}, 0.5, removed);
  REQUIRE(kept.size() == 1);
  CHECK(kept[0].name == "b");
}

TEST_CASE("examples/corpus: different texts are all kept", "[examples][corpus]") {
  const temporary_folder folder;
  CHECK(load_corpus(add_prose_files(folder, 30, 5000)).removed.empty());
}

TEST_CASE("examples/corpus: a single file is split by blocks of lines", "[examples][corpus]") {
  const temporary_folder folder;
  const auto text = random_prose(200000, 3);
  const auto c = load_corpus({folder.add("one.txt", text)});
  CHECK(c.split_by_blocks);
  const auto share = static_cast<double>(c.held_out.size()) / static_cast<double>(text.size());
  CHECK(share > 0.05);
  CHECK(share < 0.15);
  const auto separators = std::count(c.train.begin(), c.train.end(), 0) +
                          std::count(c.held_out.begin(), c.held_out.end(), 0);
  CHECK(c.train.size() + c.held_out.size() == text.size() + static_cast<std::size_t>(separators));
  auto end_of_block = std::find(c.train.begin(), c.train.end(), 0);
  REQUIRE(end_of_block != c.train.end());
  CHECK(*(end_of_block - 1) == '\n');
}

TEST_CASE("examples/corpus: files too uneven for a split by file are split by blocks",
          "[examples][corpus]") {
  const temporary_folder folder;
  const auto c = load_corpus({folder.add("long.txt", random_prose(300000, 3)),
                              folder.add("tiny.txt", random_prose(500, 4))});
  CHECK(c.split_by_blocks);
  CHECK(c.held_out.size() > 15000);
}

TEST_CASE("examples/corpus: random bytes in base64 are text, with and without line breaks",
          "[examples][corpus]") {
  const temporary_folder folder;
  auto text = demo::base64(random_bytes(150000, 5));
  if (GENERATE(false, true)) {
    for (std::size_t i = 76; i < text.size(); i += 77)
      text.insert(i, 1, '\n');
  }
  const auto c = load_corpus({folder.add("random.b64", text)});
  CHECK(c.removed.empty());
  CHECK(c.held_out.size() > 10000);
}

TEST_CASE("examples/corpus: repetitive text has nothing left to hold out", "[examples][corpus]") {
  const temporary_folder folder;
  std::string text;
  while (text.size() < 200000)
    text += "the same line of words again and again and again\n";
  CHECK_THROWS_WITH(load_corpus({folder.add("log.txt", text)}),
                    contains("after near copies were removed, at least 65536 are needed"));
}

TEST_CASE("examples/corpus: text beyond max_bytes is left out", "[examples][corpus]") {
  const temporary_folder folder;
  corpus_options options;
  options.max_bytes = 100000;
  const auto c = load_corpus(add_prose_files(folder, 40, 5000), options);
  CHECK(c.files_read == 20);
  CHECK(c.files_left_out == 20);
}

TEST_CASE("examples/corpus: a missing file is named", "[examples][corpus][error]") {
  CHECK_THROWS_AS(load_corpus({"/no/such/file.txt"}), demo::usage_error);
  CHECK_THROWS_WITH(load_corpus({"/no/such/file.txt"}),
                    "the text file '/no/such/file.txt' does not exist");
}

TEST_CASE("examples/corpus: a folder is refused", "[examples][corpus][error]") {
  const temporary_folder folder;
  CHECK_THROWS_AS(load_corpus({folder.path()}), demo::usage_error);
  CHECK_THROWS_WITH(load_corpus({folder.path()}), contains("is a folder, not a text file"));
}

TEST_CASE("examples/corpus: a device is refused", "[examples][corpus][error]") {
  CHECK_THROWS_WITH(load_corpus({"/dev/zero"}), contains("is not a regular file"));
}

TEST_CASE("examples/corpus: a binary file is refused with the reason",
          "[examples][corpus][error]") {
  const temporary_folder folder;
  const auto prose = random_prose(100000, 1);
  CHECK_THROWS_WITH(load_corpus({folder.add("zero", prose + std::string(1, '\0') + prose)}),
                    contains("is not plain text (byte 100000 is zero)"));
  auto noise = random_bytes(100000, 1);
  std::replace(noise.begin(), noise.end(), '\0', 'x');
  CHECK_THROWS_WITH(load_corpus({folder.add("noise", noise)}), contains("are control bytes"));
  for (auto& b : noise)
    b = static_cast<char>(b | 0x20);
  CHECK_THROWS_WITH(load_corpus({folder.add("high", noise)}), contains("are not UTF-8"));
}

TEST_CASE("examples/corpus: UTF-8 and Latin-1 are text", "[examples][corpus]") {
  const std::string utf8 = "\xC3\xA4\xE6\x97\xA5\xF0\x9F\x98\x80";
  CHECK(demo::detail::why_not_text(std::vector<std::uint8_t>(utf8.begin(), utf8.end())).empty());
  const std::string latin =
      "gr\xFC\xDF"
      "e aus der schweiz\r\n";
  CHECK(demo::detail::why_not_text(std::vector<std::uint8_t>(latin.begin(), latin.end())).empty());
}

TEST_CASE("examples/corpus: too little text is refused with the size that is needed",
          "[examples][corpus][error]") {
  const temporary_folder folder;
  CHECK_THROWS_WITH(load_corpus({folder.add("small.txt", "hello\n")}),
                    "the text is 6 bytes, at least 65536 are needed; name more or longer files");
  CHECK_THROWS_WITH(load_corpus({folder.add("empty.txt", "")}), contains("the text is 0 bytes"));
  corpus_options no_minimum;
  no_minimum.min_bytes = 0;
  CHECK_THROWS_AS(load_corpus({folder.add("small.txt", "hello\n")}, no_minimum), demo::usage_error);
}

TEST_CASE("examples/corpus: the default text is the newest standard library and Eigen",
          "[examples][corpus]") {
  const temporary_folder folder;
  for (const char* name :
       {"c++/9/vector", "c++/12/vector", "c++/12/bits/stl_vector.h", "c++/12/bits/list.tcc",
        "c++/12/bits/stdc++.h.gch", "eigen/Eigen/Core", "eigen/Eigen/src/Core/Map.h",
        "eigen/unsupported/Eigen/FFT", "eigen/other.h"}) {
    folder.add(name, "text");
  }
  std::vector<std::string> found;
  for (const auto& file : demo::find_default_text({.standard_library = folder.path() / "c++",
                          .eigen = {folder.path() / "none", folder.path() / "eigen"}})) {
    found.push_back(file.lexically_relative(folder.path()).string());
  }
  CHECK(found == std::vector<std::string>{"c++/12/bits/list.tcc", "c++/12/bits/stl_vector.h",
                                          "c++/12/vector", "eigen/Eigen/Core",
                                          "eigen/Eigen/src/Core/Map.h",
                                          "eigen/unsupported/Eigen/FFT"});
}

TEST_CASE("examples/corpus: without default text the user is asked for files",
          "[examples][corpus][error]") {
  corpus_options options;
  options.default_folders = {.standard_library = "/no/such", .eigen = {}};
  CHECK_THROWS_WITH(load_corpus({}, options), contains("name text files instead"));
}
