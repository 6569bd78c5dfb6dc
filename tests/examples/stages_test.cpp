#include "../../examples/distill/stages.hpp"

#include "../../examples/distill/evaluate.hpp"
#include "../support/catch.hpp"
#include "demo_temporary_folder.hpp"

#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace {

using demo_test::random_prose;
using demo_test::temporary_folder;

constexpr double step_seconds = 0.02;

// A run of one small stage, as often as it is started. Every step takes at least step_seconds.
struct small_run {
  temporary_folder folder;
  demo::settings settings;
  std::vector<std::uint8_t> text;
  ssm::cpu::context ctx{1};
  demo::model m;
  std::vector<std::int32_t> first_ids;  // of each step

  small_run() {
    settings.width = 16;
    settings.heads = 2;
    settings.sequence_length = 16;
    settings.tokens_per_step = 32;
    const std::string prose = random_prose(2000, 1);
    text.assign(prose.begin(), prose.end());
    m = demo::model(demo::config_of(settings, "M-"), 1);
  }

  [[nodiscard]] demo::stage_runner start() { return {settings, folder.path(), text, ctx}; }

  // Ctrl-C comes in the step before `stop_at`.
  [[nodiscard]] demo::stage stage(ssm::index_t steps, ssm::index_t stop_at = -1) {
    demo::stage s{"small", "small", "nats", 1.0, steps, 1e-3, {"*"}, {}, 0};
    s.loss = [this, stop_at](const ssm::pass<float>& p, const ssm::token_batch& b) {
      std::this_thread::sleep_for(std::chrono::duration<double>(step_seconds));
      first_ids.push_back(b.inputs(0, 0) + 256 * b.inputs(0, 1));
      if (static_cast<ssm::index_t>(first_ids.size()) == stop_at) demo::stop_requested = 1;
      return ssm::next_token_loss(m, p, b);
    };
    return s;
  }

  ~small_run() { demo::stop_requested = 0; }
};

}  // namespace

TEST_CASE("examples/stages: the time of earlier starts is added up", "[examples][stages]") {
  small_run r;
  auto first = r.start();
  CHECK_THROWS_AS(first.run(r.stage(6, /*stop_at=*/3), r.m), demo::interrupted);
  CHECK(first.earlier_seconds() == 0);
  demo::stop_requested = 0;

  r.settings.resume = true;
  auto second = r.start();
  CHECK(second.run(r.stage(6), r.m).loss.size() == 6);
  CHECK(second.earlier_seconds() >= 3 * step_seconds);
  CHECK(r.first_ids.size() == 6);

  auto third = r.start();
  CHECK(third.run(r.stage(6), r.m).loss.size() == 6);
  CHECK(third.earlier_seconds() >= second.earlier_seconds() + 3 * step_seconds);
  CHECK(r.first_ids.size() == 6);
}

TEST_CASE("examples/stages: a stage reads on where the ones before it have stopped",
          "[examples][stages]") {
  small_run whole;
  (void)whole.start().run(whole.stage(6), whole.m);
  small_run later;
  auto stage = later.stage(2);
  stage.first_step = 4;
  (void)later.start().run(stage, later.m);
  CHECK(later.first_ids ==
        std::vector<std::int32_t>(whole.first_ids.begin() + 4, whole.first_ids.end()));
}

TEST_CASE("examples/stages: scoring stops at Ctrl-C", "[examples][stages]") {
  small_run r;
  demo::stop_requested = 1;
  CHECK_THROWS_AS(demo::bits_per_byte(r.m, r.text, 16, r.ctx), demo::interrupted);
}
