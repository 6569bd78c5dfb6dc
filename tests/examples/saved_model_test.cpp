#include "../../examples/distill/saved_model.hpp"

#include "../../examples/distill/settings.hpp"
#include "../support/catch.hpp"
#include "demo_temporary_folder.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace {

using demo_test::random_prose;
using demo_test::temporary_folder;
using ssm_test::contains;

std::vector<std::uint8_t> small_text() {
  const std::string prose = random_prose(600, 3);
  return {prose.begin(), prose.end()};
}

demo::settings small_settings() {
  demo::settings s;
  s.width = 24;
  s.heads = 3;
  return s;
}

}  // namespace

TEST_CASE("examples/saved_model: a loaded model scores a text as the saved one did",
          "[examples][saved_model]") {
  const temporary_folder folder;
  const std::string pattern = GENERATE("*-*-", "M-M-", "M-*-", "DmLRG-");
  CAPTURE(pattern);
  const ssm::cpu::context ctx(1);
  const demo::model m(demo::config_of(small_settings(), pattern), 5);
  demo::save_model(folder.path() / "m.safetensors", m);
  const demo::model loaded = demo::load_model(folder.path() / "m.safetensors");
  CHECK(demo::bits_per_byte(loaded, small_text(), 64, ctx) ==
        demo::bits_per_byte(m, small_text(), 64, ctx));
}

TEST_CASE("examples/saved_model: a configuration comes back with every field that it lists",
          "[examples][saved_model]") {
  // Values that are no default, each its own.
  ssm::model_config config;
  config.attention.rope = ssm::rope_options{};
  ssm::index_t next = 1000;
  const auto differ = [&](const char*, auto& member) {
    using type = std::remove_reference_t<decltype(member)>;
    if constexpr (std::is_same_v<type, bool>) {
      member = !member;
    } else if constexpr (std::is_same_v<type, std::string>) {
      member = "M*";
    } else {
      member = static_cast<type>(next++);
    }
  };
  demo::detail::for_each_field(config, differ);
  const auto json = demo::to_json(config);
  CHECK(json.at("mamba2").at("state") == config.mamba2.state);
  CHECK(demo::to_json(demo::config_from_json(json)) == json);
}

TEST_CASE("examples/saved_model: a file without a configuration is refused",
          "[examples][saved_model][error]") {
  const temporary_folder folder;
  const demo::model m(demo::config_of(small_settings(), "M-"), 5);
  const auto path = folder.path() / "m.safetensors";
  ssm::save_parameters(path, m.parameters());
  CHECK_THROWS_AS(demo::load_model(path), ssm::io_error);
  CHECK_THROWS_WITH(demo::load_model(path), contains("its metadata has no \"config\""));
  ssm::save_parameters(path, m.parameters(), {{"config", "{\"width\": 24}"}});
  CHECK_THROWS_WITH(demo::load_model(path), contains("its configuration cannot be read"));
}
