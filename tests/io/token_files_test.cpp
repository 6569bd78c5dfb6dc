#include <ssmlib/io/token_files.hpp>

#include <fstream>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::contains;
namespace fs = std::filesystem;

/// Shards in memory, and the same in files as long as this exists.
template <TokenId Id>
struct both {
  explicit both(const std::vector<std::size_t>& sizes) {
    std::string name = (fs::temp_directory_path() / "ssmlib-tokens-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw io_error("no temporary folder");
    folder = name;
    philox random(4);
    for (const std::size_t n : sizes) {
      shards.emplace_back(n);
      for (Id& id : shards.back())
        id = static_cast<Id>(random.bits() >> 1);
      paths.push_back(folder / std::to_string(paths.size()));
      std::ofstream(paths.back(), std::ios::binary)
          .write(reinterpret_cast<const char*>(shards.back().data()),
                 static_cast<std::streamsize>(n * sizeof(Id)));
    }
  }
  ~both() { fs::remove_all(folder); }
  fs::path folder;
  std::vector<std::vector<Id>> shards;
  std::vector<fs::path> paths;
};

}  // namespace

TEMPLATE_TEST_CASE("io/token_files: files give the sequences that memory gives",
                   "[io][token_files]", char, unsigned char, std::uint16_t, std::int32_t) {
  const both<TestType> data({100, 0, 7, 1000});
  const token_spans<TestType> memory({data.shards.begin(), data.shards.end()});
  const token_files<TestType> files(data.paths);
  const loader_options options{.sequence_length = 12, .seed = 5};
  data_loader expected(memory, options);
  data_loader actual(files, options);
  REQUIRE(actual.sequences_per_epoch() == expected.sequences_per_epoch());
  for (int i = 0; i < 40; ++i) {
    const token_batch a = actual.next(3), b = expected.next(3);
    const auto bytes = static_cast<std::size_t>(a.inputs.size()) * sizeof(std::int32_t);
    CHECK(std::memcmp(a.inputs.data(), b.inputs.data(), bytes) == 0);
    CHECK(std::memcmp(a.targets.data(), b.targets.data(), bytes) == 0);
  }
}

TEST_CASE("io/token_files: a missing, odd or shortened file is an error",
          "[io][token_files][error]") {
  const both<std::uint16_t> data({100});
  CHECK_THROWS_WITH(token_files<char>({data.folder / "none"}), contains("none': No such file"));
  CHECK_THROWS_WITH(token_files<std::int32_t>({data.paths[0], data.folder}), contains("ssm: "));
  const token_files<std::uint16_t> source(data.paths);
  data_loader loader(source, {.sequence_length = 99});
  fs::resize_file(data.paths[0], 199);
  CHECK_THROWS_WITH(token_files<std::uint16_t>(data.paths), contains("199 bytes, no multiple of"));
  const loader_state before = loader.state();
  CHECK_THROWS_WITH(loader.next(1), contains("it ended before token 100"));
  CHECK(loader.state() == before);
}
