#include "../../examples/distill/ngram.hpp"

#include "../../examples/distill/png.hpp"
#include "../support/catch.hpp"
#include "demo_temporary_folder.hpp"

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace {

using demo::witten_bell_model;
using ssm_test::approx;

std::vector<std::uint8_t> bytes(const std::string& text) {
  return {text.begin(), text.end()};
}

}  // namespace

TEST_CASE("examples/ngram: the probabilities of the 256 bytes sum to 1", "[examples][ngram]") {
  const auto text = bytes(demo_test::random_prose(20000, 1));
  const witten_bell_model model(text);
  const auto seen = static_cast<std::size_t>(GENERATE(0, 1, 2, 5, 77, 5000, 19999));
  const auto unseen = bytes(demo_test::random_bytes(8, seen));
  for (const auto context : {std::span(text).first(seen), std::span<const std::uint8_t>(unseen)}) {
    double sum = 0;
    for (int c = 0; c < 256; ++c)
      sum += model.probability(context, static_cast<std::uint8_t>(c));
    CHECK(sum == approx(1.0).epsilon(1e-12));
  }
}

TEST_CASE("examples/ngram: a tiny text gives the probabilities worked out by hand",
          "[examples][ngram]") {
  // "abab": a and b twice each, so order 0 gives (2 + 2/256) / 6 = 257/768 for both.
  const witten_bell_model model(bytes("abab"), 1);
  CHECK(model.probability(bytes(""), 'a') == approx(257.0 / 768.0).epsilon(1e-12));
  CHECK(model.probability(bytes(""), 'z') == approx((2.0 / 256.0) / 6.0).epsilon(1e-12));
  // After a came b twice: (2 + 257/768) / 3. After b came a once: (1 + 257/768) / 2.
  CHECK(model.probability(bytes("a"), 'b') == approx((2 + 257.0 / 768.0) / 3).epsilon(1e-12));
  CHECK(model.probability(bytes("b"), 'a') == approx((1 + 257.0 / 768.0) / 2).epsilon(1e-12));
  CHECK(model.probability(bytes("b"), 'b') == approx((257.0 / 768.0) / 2).epsilon(1e-12));
  // After z came nothing: order 0 stays.
  CHECK(model.probability(bytes("z"), 'b') == approx(257.0 / 768.0).epsilon(1e-12));
}

TEST_CASE("examples/ngram: bits per byte are the mean of the single costs", "[examples][ngram]") {
  const witten_bell_model model(bytes("abab"), 1);
  const double expected = -(std::log2(257.0 / 768.0) + std::log2((2 + 257.0 / 768.0) / 3)) / 2;
  CHECK(model.bits_per_byte(bytes("ab")) == approx(expected).epsilon(1e-12));
}

TEST_CASE("examples/ngram: a longer order looks further back", "[examples][ngram]") {
  // After "x" alone both successors are equally frequent; the byte before decides.
  std::string text;
  for (int i = 0; i < 100; ++i)
    text += i % 2 == 0 ? "axb" : "cxd";
  const witten_bell_model one(bytes(text), 1);
  const witten_bell_model two(bytes(text), 2);
  CHECK(one.probability(bytes("ax"), 'b') == approx(0.5).margin(0.02));
  CHECK(two.probability(bytes("ax"), 'b') > 0.98);
}

TEST_CASE("examples/ngram: an untrained model is uniform", "[examples][ngram]") {
  const witten_bell_model model(std::vector<std::uint8_t>{});
  CHECK(model.bits_per_byte(bytes("anything")) == approx(8.0));
}

TEST_CASE("examples/ngram: random bytes in base64 cost at least 5.9 bits", "[examples][ngram]") {
  const auto text = bytes(demo::base64(demo_test::random_bytes(400000, 3)));
  const std::span<const std::uint8_t> all(text);
  CHECK(witten_bell_model(all.first(480000)).bits_per_byte(all.subspan(480000)) >= 5.9);
}

TEST_CASE("examples/ngram: repetitive text costs next to nothing", "[examples][ngram]") {
  std::string text;
  while (text.size() < 100000)
    text += "abcdefghij";
  CHECK(witten_bell_model(bytes(text)).bits_per_byte(bytes(text.substr(0, 10000))) < 0.01);
}

TEST_CASE("examples/ngram: every byte value may be part of a context", "[examples][ngram]") {
  std::string text;
  for (int i = 0; i < 50; ++i)
    text += std::string("\0\xFF\0\0\x80", 5);
  const witten_bell_model model(bytes(text));
  CHECK(model.probability(bytes(std::string("\0\xFF\0\0", 4)), 0x80) > 0.9);
  CHECK(model.probability(bytes(std::string("\x80\0\xFF\0", 4)), 0x00) > 0.9);
}

TEST_CASE("examples/ngram: an order out of range and an empty text are refused",
          "[examples][ngram][error]") {
  CHECK_THROWS_WITH(witten_bell_model(bytes("a"), 8), ssm_test::contains("wanted 0 to 7"));
  CHECK_THROWS_WITH(witten_bell_model(bytes("a")).bits_per_byte({}),
                    ssm_test::contains("the text is empty"));
}
