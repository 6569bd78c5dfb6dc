// Trains a small Transformer on real text, distils it into Mamba-2 students with MOHAWK, and
// decodes it speculatively. See README.md and `distill --help`.
//
// tiny-run: --budget 0.01 --max-bytes 150000 --held-out-bytes 2048 --new-tokens 33 --out tiny

#include "error.hpp"
#include "interrupt.hpp"
#include "run.hpp"

#include <CLI/CLI.hpp>

#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  demo::settings s;
  ssm::index_t held_out_bytes = 65536, new_tokens = 401;
  CLI::App app{
      "Trains a small Transformer on text (as bytes), distils it with MOHAWK into a pure Mamba-2 "
      "and\n"
      "a hybrid student, compares with distillation by fewer stages, decodes it speculatively, "
      "and\n"
      "writes a report. Layer patterns: * attention, M Mamba-2, D discrete Mamba-2, m Mamba-1,\n"
      "L linear attention, R retention, G Gated DeltaNet, - MLP.\n"
      "Ctrl-C stops after the current step; --resume goes on."};
  app.add_option("--text", s.text, "Text files; default: the C++ headers installed here");
  app.add_option("--out", s.out, "Folder for the report, the models and the state of the run")
      ->capture_default_str();
  app.add_flag("--resume", s.resume, "Go on with the run in the output folder");
  app.add_option("--budget", s.budget, "Multiplies the training steps of every stage")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--teacher", s.teacher, "Layer pattern of the teacher")->capture_default_str();
  app.add_option("--student", s.student, "Layer pattern of the pure student")
      ->capture_default_str();
  app.add_option("--hybrid", s.hybrid, "Layer pattern of the hybrid student")
      ->capture_default_str();
  app.add_option("--draft", s.draft, "Layer pattern of the draft model")->capture_default_str();
  app.add_option("--width", s.width, "Model width")->capture_default_str();
  app.add_option("--heads", s.heads, "Attention heads")->capture_default_str();
  app.add_option("--max-bytes", s.max_bytes, "Text beyond this is left out")->capture_default_str();
  app.add_option("--held-out-bytes", held_out_bytes, "Bytes of held-out text to score")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--new-tokens", new_tokens, "Bytes to generate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--seed", s.seed, "Seed of weights and data order")->capture_default_str();
  app.add_option("--threads", s.threads, "CPU threads; 0: all")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
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
