#include <ssmlib/io.hpp>
#include <ssmlib/tensor/random.hpp>

#include <csignal>
#include <fstream>
#include <iterator>
#include <support/catch.hpp>
#include <sys/resource.h>

namespace {

using namespace ssm;
using ssm_test::contains;
namespace fs = std::filesystem;

/// A folder that exists as long as this does.
struct temporary_folder {
  temporary_folder() {
    std::string name = (fs::temp_directory_path() / "ssmlib-io-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw io_error("no temporary folder");
    path = name;
  }
  ~temporary_folder() { fs::remove_all(path); }
  [[nodiscard]] index_t file_count() const {
    return std::distance(fs::directory_iterator(path), fs::directory_iterator());
  }
  fs::path path;
};

std::string content_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A file with this header text and that many zero bytes of data.
fs::path file_with(const temporary_folder& folder, std::string_view header, std::size_t data) {
  const fs::path path = folder.path / "hand.safetensors";
  std::ofstream out(path, std::ios::binary);
  const std::uint64_t length = header.size();
  out.write(reinterpret_cast<const char*>(&length), 8);
  out << header << std::string(data, '\0');
  return path;
}

/// Limits the size of files that this process can write: the disk that is full.
struct full_disk {
  explicit full_disk(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &old);
    const rlimit limited{bytes, old.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limited);
  }
  ~full_disk() {
    ::setrlimit(RLIMIT_FSIZE, &old);
    std::signal(SIGXFSZ, SIG_DFL);
  }
  rlimit old{};
};

template <class T, int R>
void check_same(const tensor<T, R>& a, const tensor<T, R>& b) {
  REQUIRE(a.extents() == b.extents());
  index_t different = 0;
  a.zip_with(b, [&](const T& x, const T& y) { different += x == y ? 0 : 1; });
  CHECK(different == 0);
}

TEST_CASE("io/safetensors: every element type comes back to the bit", "[io][safetensors]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  const auto f32 = normal<float, 3>({2, 3, 5}, 1.0, 1);
  const auto f64 = normal<double, 2>({3, 7}, 1.0, 2);
  const auto half = cast<bf16>(normal<float, 1>({9}, 1.0, 3));
  const auto i32 = tensor<std::int32_t, 1>::full({4}, -7);
  const auto i64 = tensor<std::int64_t, 4>::full({1, 2, 1, 2}, index_t{1} << 40);
  const auto empty = tensor<float, 2>::zeros(0, 3);
  safetensors_writer writer;
  writer.add("half", half);
  writer.add("f32", f32);
  writer.add("f64", f64);
  writer.add("i32", i32);
  writer.add("i64", i64);
  writer.add("empty", empty);
  writer.write(path);

  const safetensors_reader reader(path);
  CHECK(reader.entries().size() == 6);
  check_same(reader.load<bf16, 1>("half"), half);
  check_same(reader.load<float, 3>("f32"), f32);
  check_same(reader.load<double, 2>("f64"), f64);
  check_same(reader.load<std::int32_t, 1>("i32"), i32);
  check_same(reader.load<std::int64_t, 4>("i64"), i64);
  check_same(reader.load<float, 2>("empty"), empty);
}

TEST_CASE("io/safetensors: metadata and names with any text come back", "[io][safetensors]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  safetensors_writer writer;
  writer.add("quote \" and \\ and \xc3\xa9", tensor<float, 1>::full({1}, 3.0f));
  writer.set_metadata("format", "pt");
  writer.set_metadata("json", R"({"a": [1, 2], "b": "\n"})");
  writer.write(path);
  const safetensors_reader reader(path);
  CHECK(reader.metadata().at("format") == "pt");
  CHECK(reader.metadata().at("json") == R"({"a": [1, 2], "b": "\n"})");
  CHECK(reader.load_scalar("quote \" and \\ and \xc3\xa9") == 3.0);
}

TEST_CASE("io/safetensors: a strided tensor is written as its elements", "[io][safetensors]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  const auto whole = normal<float, 2>({5, 8}, 1.0, 4);
  const auto part = whole.slice(1, 2, 5);
  safetensors_writer writer;
  writer.add("part", part);
  writer.write(path);
  const safetensors_reader reader(path);
  check_same(reader.load<float, 2>("part"), part);
  const auto target = tensor<float, 2>::zeros(5, 8);
  reader.load_into("part", target.slice(1, 2, 5));
  check_same(target.slice(1, 2, 5), part);
}

TEST_CASE("io/safetensors: the data of every tensor is aligned to its elements",
          "[io][safetensors]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  safetensors_writer writer;
  writer.add("half", tensor<bf16, 1>::full({3}, bf16(1.0f)));
  writer.add("wide", tensor<double, 1>::full({2}, 1.0));
  writer.write(path);
  const std::string bytes = content_of(path);
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  CHECK(length % 8 == 0);
  const safetensors_reader reader(path);
  CHECK(reader.entry("wide").begin % 8 == 0);
}

TEST_CASE("io/safetensors: numbers convert where the wanted type holds them", "[io][safetensors]") {
  const temporary_folder folder;
  const std::string header = R"({"h":{"dtype":"F16","shape":[6],"data_offsets":[0,12]},)"
                             R"("u":{"dtype":"U8","shape":[2],"data_offsets":[12,14]},)"
                             R"("b":{"dtype":"BOOL","shape":[2],"data_offsets":[14,16]},)"
                             R"("i":{"dtype":"I64","shape":[],"data_offsets":[16,24]}})";
  const fs::path path = file_with(folder, header, 0);
  {
    std::ofstream out(path, std::ios::binary | std::ios::app);
    // 1, -2, the largest half, the smallest subnormal, infinity, -0
    const std::uint16_t halves[] = {0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00, 0x8000};
    const unsigned char bytes[] = {200, 7, 1, 0};
    const std::int64_t number = (std::int64_t{1} << 40) + 1;
    out.write(reinterpret_cast<const char*>(halves), 12);
    out.write(reinterpret_cast<const char*>(bytes), 4);
    out.write(reinterpret_cast<const char*>(&number), 8);
  }
  const safetensors_reader reader(path);
  const auto h = reader.load<double, 1>("h");
  CHECK(h(0) == 1.0);
  CHECK(h(1) == -2.0);
  CHECK(h(2) == 65504.0);
  CHECK(h(3) == 0x1p-24);
  CHECK(h(4) == std::numeric_limits<double>::infinity());
  CHECK((h(5) == 0.0 && std::signbit(h(5))));
  CHECK(reader.load<float, 1>("u")(0) == 200.0f);
  CHECK(reader.load<std::int32_t, 1>("b")(0) == 1);
  CHECK(reader.load<double, 1>("i")(0) == 0x1p40 + 1);
  CHECK_THROWS_WITH((reader.load<std::int32_t, 1>("i")),
                    contains("is I64 and does not fit in I32"));
  CHECK_THROWS_WITH((reader.load<std::int32_t, 1>("h")),
                    contains("is F16 and does not fit in I32"));
}

TEST_CASE("io/safetensors: another name, rank or shape is refused by what is there",
          "[io][safetensors][error]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  safetensors_writer writer;
  writer.add("w", tensor<float, 2>::zeros(2, 3));
  CHECK_THROWS_AS(writer.add("w", tensor<float, 2>::zeros(2, 3)), value_error);
  CHECK_THROWS_AS(writer.add("__metadata__", tensor<float, 2>::zeros(2, 3)), value_error);
  writer.write(path);
  const safetensors_reader reader(path);
  CHECK_THROWS_WITH((reader.load<float, 2>("v")), contains("it has no tensor 'v'"));
  CHECK_THROWS_WITH((reader.load<float, 3>("w")), contains("'w' is (2 x 3), wanted one of rank 3"));
  CHECK_THROWS_WITH(reader.load_into("w", tensor<float, 2>::zeros(3, 2)),
                    contains("'w' is (2 x 3), wanted (3 x 2)"));
  CHECK_THROWS_WITH(reader.load_scalar("w"), contains("(2 x 3), wanted one element"));
}

TEST_CASE("io/safetensors: a damaged file is refused with a sentence", "[io][safetensors][error]") {
  const temporary_folder folder;
  struct damage {
    const char *header, *sentence;
    std::size_t data;
  };
  const damage one = GENERATE(
      damage{"{", "is not JSON", 0}, damage{"[1]", "is not a JSON object", 0},
      damage{R"({"a":1})", "is described by 1; wanted dtype, shape and two data_offsets", 0},
      damage{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "the file is truncated",
             3},
      damage{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "belongs to none", 5},
      damage{R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "which is 8 bytes", 4},
      damage{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", "its offsets are 4 to 0",
             4},
      damage{R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "where a count is", 4},
      damage{R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", "where a count is", 4},
      damage{R"({"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}})", "Q4, which is not", 4},
      damage{R"({"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],)"
             R"("data_offsets":[0,0]}})",
             "which no file can hold", 0},
      damage{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
             R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
             "neither overlap nor leave holes", 6},
      damage{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
             R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
             "neither overlap nor leave holes", 12},
      damage{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
             R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
             "the name 'a' twice", 4},
      damage{R"({"__metadata__":{"k":1}})", "__metadata__ 'k' is not a string", 0});
  CAPTURE(one.header);
  const fs::path path = file_with(folder, one.header, one.data);
  CHECK_THROWS_AS(safetensors_reader(path), io_error);
  CHECK_THROWS_WITH(safetensors_reader(path), contains(one.sentence));
}

TEST_CASE("io/safetensors: a file cut anywhere is refused", "[io][safetensors][error]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  safetensors_writer writer;
  writer.add("w", normal<float, 2>({2, 3}, 1.0, 5));
  writer.write(path);
  const auto size = static_cast<index_t>(fs::file_size(path));
  for (index_t cut = size - 1; cut >= 0; --cut) {
    fs::resize_file(path, static_cast<std::uintmax_t>(cut));
    CAPTURE(cut);
    CHECK_THROWS_AS(safetensors_reader(path), io_error);
  }
}

TEST_CASE("io/safetensors: a missing file and a folder are refused by name",
          "[io][safetensors][error]") {
  const temporary_folder folder;
  CHECK_THROWS_WITH(safetensors_reader(folder.path / "none"), contains("No such file"));
  CHECK_THROWS_WITH(safetensors_reader(folder.path), contains("it is not a file"));
}

TEST_CASE("io/safetensors: a full disk leaves the old file and nothing else",
          "[io][safetensors][error]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.safetensors";
  safetensors_writer small;
  small.add("w", tensor<float, 1>::full({8}, 1.0f));
  small.write(path);
  const std::string before = content_of(path);
  safetensors_writer large;
  large.add("w", tensor<float, 1>::full({100000}, 2.0f));
  {
    const full_disk limit(4096);
    CHECK_THROWS_WITH(large.write(path), contains("File too large"));
  }
  CHECK(content_of(path) == before);
  CHECK(folder.file_count() == 1);
  large.write(path);
  CHECK(safetensors_reader(path).entry("w").size() == 100000);
}

TEST_CASE("io/atomic_file: nothing appears before commit, and an abandoned file leaves no trace",
          "[io][atomic_file]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.txt";
  write_atomically(path, "old");
  {
    atomic_file file(path);
    file.write("new");
    CHECK(content_of(path) == "old");
  }
  CHECK(content_of(path) == "old");
  CHECK(folder.file_count() == 1);
  atomic_file file(path);
  file.write("new");
  file.commit();
  CHECK(content_of(path) == "new");
  CHECK(folder.file_count() == 1);
}

TEST_CASE("io/atomic_file: a replaced file keeps its permissions", "[io][atomic_file]") {
  const temporary_folder folder;
  const fs::path path = folder.path / "a.txt";
  write_atomically(path, "old");
  fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write);
  write_atomically(path, "new");
  CHECK(fs::status(path).permissions() == (fs::perms::owner_read | fs::perms::owner_write));
}

TEST_CASE("io/atomic_file: a folder that is missing or in the way is refused by name",
          "[io][atomic_file][error]") {
  const temporary_folder folder;
  CHECK_THROWS_WITH(write_atomically(folder.path / "none" / "a.txt", "x"),
                    contains("none/a.txt': No such file"));
  fs::create_directory(folder.path / "taken");
  CHECK_THROWS_AS(write_atomically(folder.path / "taken", "x"), io_error);
  CHECK(folder.file_count() == 1);
}

}  // namespace
