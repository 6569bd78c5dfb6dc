// Trains a small Transformer on real text, distils it into Mamba-2 students with MOHAWK, and
// decodes it speculatively. See README.md and `distill --help`.
//
// tiny-run: --budget 0.01 --max-bytes 150000 --held-out-bytes 2048 --new-tokens 33 --out tiny
// tiny-run-cuda: --device cuda --budget 0.002 --max-bytes 150000 --held-out-bytes 2048 --out tiny

#include "error.hpp"
#include "interrupt.hpp"
#include "run.hpp"
#include "version.hpp"

#include <CLI/CLI.hpp>

#include <charconv>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <system_error>
#include <type_traits>

namespace {

// Numbers out of their range are refused before the run, NaN too, in a message that fits on a line.
template <class T>
CLI::Validator in_range(T low, T high) {
  std::ostringstream range;
  range << low << " to " << high;
  const auto check = [=, wanted = range.str()](const std::string& text) -> std::string {
    T value{};
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error == std::errc() && stop == end && value >= low && value <= high) return {};
    return "wanted a number from " + wanted + ", not '" + text + "'";
  };
  return CLI::Validator(check, range.str());
}

}  // namespace

int main(int argc, char** argv) {
  demo::settings s;
  const demo::settings on_cuda = demo::cuda_settings();
  ssm::index_t held_out_bytes = 65536, new_tokens = 401;
  CLI::App app{
      "Trains a small Transformer on text (as bytes), distils it with MOHAWK into a pure Mamba-2\n"
      "and a hybrid student, compares with distillation by fewer stages, decodes it\n"
      "speculatively, and writes a report. Layer patterns: * attention, M Mamba-2,\n"
      "D discrete Mamba-2, m Mamba-1, L linear attention, R retention, G Gated DeltaNet, - MLP.\n"
      "Ctrl-C stops after the current step; --resume goes on."};
  app.footer(
      "Exit codes: 0 all done; 1 done, but the run's own check failed; 2 an option, file or\n"
      "folder cannot be used; 130 stopped by Ctrl-C.");
  app.set_version_flag(
      "--version", "ssmlib " + demo::library_version() + " (commit " + demo::source_commit() + ")");
  const auto number = [&app](const char* name, auto& value, auto low, auto high, const char* help) {
    using T = std::remove_reference_t<decltype(value)>;
    app.add_option(name, value, help)
        ->check(in_range<T>(static_cast<T>(low), static_cast<T>(high)))
        ->capture_default_str();
  };
  app.option_defaults()->take_last();
  app.add_option("--device", s.device, "Where models train and decode; cuda has larger defaults")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--text", s.text, "Text files; default: the C++ headers installed here")
      ->take_all();
  app.add_option("--out", s.out, "Folder for the report, the models and the state of the run")
      ->capture_default_str();
  app.add_flag("--resume", s.resume, "Go on with the run in the output folder");
  number("--budget", s.budget, 0.001, 1000, "Multiplies the training steps of every stage");
  number("--stage3-rate", s.stage3_rate, 1e-5, 0.1, "Learning rate of stage 3, in every variant");
  app.add_option("--teacher", s.teacher, "Layer pattern of the teacher")->capture_default_str();
  app.add_option("--student", s.student, "Layer pattern of the pure student")
      ->capture_default_str();
  app.add_option("--hybrid", s.hybrid, "Layer pattern of the hybrid student")
      ->capture_default_str();
  app.add_option("--draft", s.draft, "Layer pattern of the draft model")->capture_default_str();
  number("--width", s.width, 8, 4096, "Model width; on cuda 256");
  number("--heads", s.heads, 1, 256, "Attention heads");
  number("--max-bytes", s.max_bytes, 65536, 1'000'000'000,
         "Text beyond this is left out; on cuda 24000000");
  number("--held-out-bytes", held_out_bytes, 256, 1'000'000'000, "Bytes of held-out text to score");
  number("--new-tokens", new_tokens, 1, 1'000'000, "Bytes to generate");
  number("--seed", s.seed, 0, 1'000'000'000, "Seed of weights and data order");
  number("--threads", s.threads, 0, 1024, "CPU threads; 0: all");
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& e) {
    std::cerr << "distill: " << e.what() << "; see --help\n";
    return 2;
  }
  if (s.device == "cuda") {
    s.tokens_per_step = on_cuda.tokens_per_step;
    s.steps_at_budget_1 = on_cuda.steps_at_budget_1;
    if (app.count("--width") == 0) s.width = on_cuda.width;
    if (app.count("--max-bytes") == 0) s.max_bytes = on_cuda.max_bytes;
  }
  try {
    demo::install_signal_handler();
    return demo::distill(s, held_out_bytes, new_tokens);
  } catch (const demo::interrupted&) {
    std::cerr << "\nstopped; everything so far is in " << s.out.string()
              << ", and --resume goes on\n";
    return 130;
  } catch (const std::exception& e) {
    std::cerr << "distill: " << e.what() << "\n";
    return 2;
  }
}
