#include "../../examples/distill/findings.hpp"

#include "../../examples/distill/checksum.hpp"
#include "../support/catch.hpp"

#include <cstdint>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

std::vector<std::uint8_t> bytes(std::string_view text) {
  return {text.begin(), text.end()};
}

demo::findings some_findings(bool equal) {
  demo::findings f;
  for (const char* key : {"ngram_bpb", "teacher_bpb", "student_bpb", "student_bpb_stages_2_3",
                          "student_bpb_stage3_only", "hybrid_bpb", "hybrid_bpb_stage3_only",
                          "draft_bpb", "tokens_per_step", "acceptance", "speculative_speedup",
                          "plain_tokens_per_second", "speculative_tokens_per_second", "seconds"}) {
    f.results[key] = 1.5;
  }
  for (const char* key : {"train_bytes", "held_out_bytes", "near_duplicate_files_removed"}) {
    f.results[key] = 2;
  }
  f.results["device_name"] = "a device of some name";
  f.results["version"] = "1.2.3";
  f.results["commit"] = "abcdef0";
  f.results["date"] = "2026-01-31T12:59:59Z";
  f.results["learning_rates"] = {{"stage_1", 0.25}, {"stage_2", 0.125}, {"stage_3", 0.0625}};
  f.results["greedy_speculative_equals_plain"] = equal;
  f.curves["teacher"] = f.curves["draft"] = {{1, 2}, {3, 4}};
  f.curves["student, stage 3, distillation"] = {{1, 2}, {3, 4}};
  return f;
}

}  // namespace

TEST_CASE("examples/findings: a run whose greedy texts differ fails in one sentence",
          "[examples][findings]") {
  std::ostringstream errors;
  CHECK(demo::verdict(some_findings(true).results, errors) == 0);
  CHECK(errors.str().empty());
  CHECK(demo::verdict(some_findings(false).results, errors) == 1);
  const std::string sentence = errors.str();
  CHECK(sentence.find("differs from its plain greedy text") != std::string::npos);
  CHECK(sentence.find('\n') == sentence.size() - 1);
}

TEST_CASE("examples/findings: a run that failed its check still has its table and its page",
          "[examples][findings]") {
  const auto f = some_findings(false);
  CHECK(demo::result_table(f.results).find("equal to plain: NO") != std::string::npos);
  CHECK(demo::report_page(f).find("<td>no</td>") != std::string::npos);
}

TEST_CASE("examples/findings: the page says what made it and by which rates",
          "[examples][findings]") {
  const std::string page = demo::report_page(some_findings(true));
  for (const char* part :
       {"ssmlib 1.2.3 (commit abcdef0)", "2026-01-31T12:59:59Z",
        "(stage 1: 0.25, stage 2: 0.125, stage 3: 0.0625)", "stage 3, distillation"}) {
    CAPTURE(part);
    CHECK(page.find(part) != std::string::npos);
  }
}

TEST_CASE("examples/checksum: FNV-1a equals its published values", "[examples][checksum]") {
  CHECK(demo::fnv1a({}) == 0xcbf29ce484222325u);
  CHECK(demo::fnv1a(bytes("a")) == 0xaf63dc4c8601ec8cu);
  CHECK(demo::fnv1a(bytes("foobar")) == 0x85944171f73967e8u);
  CHECK(demo::checksum(bytes("a")) == "af63dc4c8601ec8c");
}
