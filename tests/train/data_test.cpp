#include "bigram_model.hpp"
#include <ssmlib/train/data.hpp>

#include <map>
#include <numeric>
#include <set>
#include <support/catch.hpp>

namespace {

using namespace ssm;
using ssm_test::contains;

/// Shards whose tokens say where they are: token j of shard i is 1000 i + j.
struct numbered_shards {
  explicit numbered_shards(const std::vector<index_t>& sizes) {
    for (const index_t n : sizes) {
      tokens.emplace_back(static_cast<std::size_t>(n));
      std::iota(tokens.back().begin(), tokens.back().end(),
                static_cast<std::int32_t>(1000 * (tokens.size() - 1)));
    }
  }
  [[nodiscard]] token_spans<std::int32_t> source() const {
    return token_spans<std::int32_t>({tokens.begin(), tokens.end()});
  }
  std::vector<std::vector<std::int32_t>> tokens;
};

const std::vector<index_t> sizes{50, 3, 0, 8, 9, 133, 1, 17};
constexpr index_t length = 8;

template <class L>
std::vector<std::int32_t> stream_of(L& loader, index_t sequences, index_t at_once) {
  std::vector<std::int32_t> all;
  while (sequences > 0) {
    const index_t n = std::min(sequences, at_once);
    const token_batch b = loader.next(n);
    for (index_t i = 0; i < n; ++i) {
      all.insert(all.end(), &b.inputs(i, 0), &b.inputs(i, 0) + length);
      all.push_back(b.targets(i, length - 1));
    }
    sequences -= n;
  }
  return all;
}

}  // namespace

TEST_CASE("train/shuffle: a permutation takes every place once", "[train][shuffle]") {
  for (const index_t n : {1, 2, 3, 4, 5, 16, 17, 100, 1000}) {
    for (const std::uint64_t seed : {0u, 1u, 77u}) {
      const random_permutation order(n, seed, 5);
      std::vector<int> seen(static_cast<std::size_t>(n));
      for (index_t i = 0; i < n; ++i)
        ++seen.at(static_cast<std::size_t>(order(i)));
      CHECK(std::count(seen.begin(), seen.end(), 1) == n);
    }
  }
}

TEST_CASE("train/shuffle: every number is at every place equally often", "[train][shuffle]") {
  constexpr index_t n = 7, draws = 14000;
  std::vector<index_t> counts(n * n);
  for (index_t s = 0; s < draws; ++s) {
    // Half of the orders are seeds, half are epochs.
    const random_permutation order(n, static_cast<std::uint64_t>(s < draws / 2 ? s : 3),
                                   static_cast<std::uint64_t>(s < draws / 2 ? 0 : s));
    for (index_t i = 0; i < n; ++i)
      ++counts[static_cast<std::size_t>(i * n + order(i))];
  }
  // Each count is binomial, its deviation sqrt(draws * 1/7 * 6/7) = 41.4.
  for (const index_t c : counts)
    CHECK(std::abs(c - draws / n) < 5 * 42);
}

TEST_CASE("train/shuffle: seeds and epochs give different orders", "[train][shuffle]") {
  const index_t n = 1000;
  const random_permutation order(n, 1, 1), seed(n, 2, 1), epoch(n, 1, 2);
  index_t same_seed = 0, same_epoch = 0;
  for (index_t i = 0; i < n; ++i) {
    same_seed += order(i) == seed(i) ? 1 : 0;
    same_epoch += order(i) == epoch(i) ? 1 : 0;
  }
  CHECK(same_seed < 10);  // 1 expected
  CHECK(same_epoch < 10);
}

TEST_CASE("train/data: an epoch holds every sequence exactly once", "[train][data]") {
  const numbered_shards shards(sizes);
  data_loader loader(shards.source(), {.sequence_length = length, .seed = 3});
  const index_t expected = 6 + 0 + 0 + 0 + 1 + 16 + 0 + 2;
  REQUIRE(loader.sequences_per_epoch() == expected);
  for (int epoch = 0; epoch < 4; ++epoch) {
    REQUIRE(loader.state().epoch == epoch);
    REQUIRE(loader.state().position == 0);
    std::map<index_t, std::set<index_t>> firsts;  // of each shard
    std::set<std::int32_t> targets;
    for (index_t i = 0; i < expected; ++i) {
      const token_batch b = loader.next(1);
      const std::int32_t first = b.inputs(0, 0);
      for (index_t t = 0; t < length; ++t) {
        REQUIRE(b.inputs(0, t) == first + t);  // neighbours in one shard
        REQUIRE(b.targets(0, t) == first + t + 1);
        CHECK(targets.insert(b.targets(0, t)).second);
      }
      firsts[first / 1000].insert(first % 1000);
    }
    for (const auto& [shard, places] : firsts) {
      const index_t n = sizes[static_cast<std::size_t>(shard)];
      CHECK(static_cast<index_t>(places.size()) == (n - 1) / length);
      CHECK(*places.rbegin() - *places.begin() ==
            (static_cast<index_t>(places.size()) - 1) * length);
      CHECK(*places.rbegin() + length < n);
    }
  }
}

TEST_CASE("train/data: the tokens that one epoch leaves out are in another", "[train][data]") {
  const numbered_shards shards({length * 2 + 6});
  data_loader loader(shards.source(), {.sequence_length = length, .seed = 1});
  std::set<std::int32_t> seen;
  for (int i = 0; i < 2 * 60; ++i) {
    const token_batch b = loader.next(1);
    seen.insert(&b.inputs(0, 0), &b.inputs(0, 0) + length);
    seen.insert(b.targets(0, length - 1));
  }
  CHECK(static_cast<index_t>(seen.size()) == length * 2 + 6);
}

TEST_CASE("train/data: without a shuffle the order is that of the shards", "[train][data]") {
  const numbered_shards shards({17, 4, 10});
  data_loader loader(shards.source(), {.sequence_length = length, .shuffle = false});
  const token_batch b = loader.next(4);
  CHECK(b.inputs(0, 0) == 0);
  CHECK(b.inputs(1, 0) == 8);
  CHECK(b.inputs(2, 0) == 2000);
  CHECK(b.inputs(3, 0) == 0);  // the next epoch is the same
}

TEST_CASE("train/data: the stream does not depend on the size of batches", "[train][data]") {
  const numbered_shards shards(sizes);
  const loader_options options{.sequence_length = length, .seed = 9};
  data_loader reference(shards.source(), options);
  const auto expected = stream_of(reference, 70, 1);  // nearly three epochs
  for (const index_t at_once : {2, 3, 7, 25, 70}) {
    data_loader loader(shards.source(), options);
    CHECK(stream_of(loader, 70, at_once) == expected);
    CHECK(loader.state() == reference.state());
  }
}

TEST_CASE("train/data: a loader resumes at any point", "[train][data]") {
  const numbered_shards shards(sizes);
  const loader_options options{.sequence_length = length, .seed = 9};
  for (index_t before = 0; before < 55; ++before) {
    data_loader loader(shards.source(), options);
    if (before > 0) (void)loader.next(before);
    data_loader resumed(shards.source(), options);
    resumed.restore(loader.state());
    CHECK(stream_of(resumed, 30, 4) == stream_of(loader, 30, 5));
  }
}

TEST_CASE("train/data: a state of other data is refused", "[train][data][error]") {
  const numbered_shards shards({50}), others({90});
  data_loader loader(shards.source(), {.sequence_length = length});
  data_loader other(others.source(), {.sequence_length = length});
  data_loader seeded(shards.source(), {.sequence_length = length, .seed = 1});
  CHECK_THROWS_WITH(loader.restore(other.state()),
                    contains("the state is of 11 sequences of 8 tokens with the seed 0, the loader "
                             "has 6 sequences"));
  CHECK_THROWS_AS(loader.restore(seeded.state()), value_error);
  loader_state outside = loader.state();
  outside.position = 6;
  CHECK_THROWS_AS(loader.restore(outside), value_error);
}

TEST_CASE("train/data: data without one whole sequence are refused", "[train][data][error]") {
  const numbered_shards shards({8, 8});
  CHECK_THROWS_WITH(data_loader(shards.source(), {.sequence_length = length}),
                    contains("the longest of 2 shards has 8 tokens, a sequence needs 9"));
  CHECK_THROWS_AS(data_loader(shards.source(), {.sequence_length = 0}), value_error);
}

TEST_CASE("train/data: bytes of text are tokens 0 to 255", "[train][data]") {
  const std::string text = "ab\x80\xff z";
  const token_spans source{std::string_view(text)};
  data_loader loader(source, {.sequence_length = 5, .shuffle = false});
  const token_batch b = loader.next(1);
  const std::vector<std::int32_t> inputs(b.inputs.data(), b.inputs.data() + 5);
  CHECK(inputs == std::vector<std::int32_t>{'a', 'b', 128, 255, ' '});
  CHECK(b.targets(0, 4) == 'z');
}
