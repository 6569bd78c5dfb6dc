#include "support/catch.hpp"
#include <ssmlib/backend/unwritten_memory.hpp>
#include <ssmlib/tensor/random.hpp>

#include <set>
#include <vector>

using namespace ssm;
using ssm::detail::memory_rows;
using ssm::detail::rows_of;
using ssm::detail::unwritten_memory;

namespace {

std::set<index_t> bytes_of(const memory_rows& r) {
  std::set<index_t> all;
  for (index_t i = 0; i < r.rows; ++i) {
    for (index_t j = 0; j < r.length; ++j)
      all.insert(r.begin + i * r.step + j);
  }
  return all;
}

/// Columns, rows, or both, of 6 rows of 8 bytes.
memory_rows random_part(philox& random) {
  const auto from = static_cast<index_t>(random.below(8));
  const index_t length =
      1 + static_cast<index_t>(random.below(static_cast<std::uint32_t>(8 - from)));
  const auto row = static_cast<index_t>(random.below(6));
  const index_t rows = 1 + static_cast<index_t>(random.below(static_cast<std::uint32_t>(6 - row)));
  if (rows == 1) return {8 * row + from, length};
  if (length == 8) return {8 * row, 8 * rows};
  return {8 * row + from, length, rows, 8};
}

}  // namespace

TEST_CASE("backend/unwritten_memory: what it claims of a part holds for every byte",
          "[backend][unwritten_memory][cpu]") {
  philox random(1);
  int unwritten = 0, written = 0, complete = 0;
  for (int repeat = 0; repeat < 3000; ++repeat) {
    unwritten_memory memory(48);
    std::set<index_t> bytes;
    for (int i = 0; i < 12; ++i) {
      const memory_rows part = random_part(random);
      const std::set<index_t> mine = bytes_of(part);
      bool any = false, all = true;
      for (const index_t b : mine) {
        any = any || bytes.contains(b);
        all = all && bytes.contains(b);
      }
      if (memory.is_written(part)) {
        REQUIRE(all);
        ++written;
      }
      // Of such parts it knows exactly whether none of them has been written.
      REQUIRE(memory.is_unwritten(part) == !any);
      if (any) continue;
      memory.write(part);
      ++unwritten;
      bytes.insert(mine.begin(), mine.end());
      REQUIRE(memory.is_written(part));
      REQUIRE(memory.is_complete() == (bytes.size() == 48));
      complete += memory.is_complete();
    }
  }
  CHECK(unwritten > 1000);
  CHECK(written > 1000);
  CHECK(complete > 0);
}

TEST_CASE("backend/unwritten_memory: strided parts are rows, or are not known",
          "[backend][unwritten_memory][cpu]") {
  const auto same = [](const std::optional<memory_rows>& a, const memory_rows& b) {
    return a && a->begin == b.begin && a->length == b.length && a->rows == b.rows &&
           a->step == b.step;
  };
  CHECK(same(rows_of(0, {2, 3, 4, 5}, {60, 20, 5, 1}, 2), {0, 240}));
  CHECK(same(rows_of(6, {2, 3, 4, 5}, {240, 80, 5, 1}, 2), {6, 40, 6, 160}));  // features
  CHECK(same(rows_of(0, {1, 3, 1, 5}, {99, 7, 99, 1}, 4), {0, 20, 3, 28}));
  CHECK(same(rows_of(8, {1, 1, 1, 7}, {0, 0, 0, 3}, 4), {8, 4, 7, 12}));  // one column
  CHECK_FALSE(rows_of(0, {1, 1, 5, 4}, {0, 0, 1, 5}, 4));                 // transposed
  CHECK_FALSE(rows_of(0, {1, 1, 5, 4}, {0, 0, 0, 1}, 4));                 // repeated
  CHECK_FALSE(rows_of(0, {1, 3, 4, 5}, {0, 100, 10, 1}, 4));              // two steps
}
