#include "run.hpp"

#include "checksum.hpp"
#include "corpus.hpp"
#include "error.hpp"
#include "findings.hpp"
#include "job.hpp"
#include "output_folder.hpp"
#include "run_on_cuda.hpp"

#include <nlohmann/json.hpp>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

namespace {

using demo::model;
using demo::settings;
using ssm::index_t;

void check_settings(const settings& s) {
  for (const std::string& pattern : {s.teacher, s.student, s.hybrid, s.draft}) {
    ssm::check_pattern(pattern);
  }
  if (s.width < 8 || s.heads < 1 || s.width % (2 * s.heads) != 0) {
    throw demo::usage_error("the width " + std::to_string(s.width) +
                            " does not fit the heads: give a multiple of 2 x " +
                            std::to_string(s.heads));
  }
  if (s.tokens_per_step % s.sequence_length != 0) {
    throw demo::usage_error("a step of " + std::to_string(s.tokens_per_step) +
                            " bytes is not a multiple of the sequence length " +
                            std::to_string(s.sequence_length));
  }
  // Fails here, and not after the teacher has been trained, if the patterns do not fit.
  const model teacher(config_of(s, s.teacher), 0);
  for (const std::string& pattern : {s.student, s.hybrid}) {
    const model student(config_of(s, pattern), 0);
    if (ssm::replaced_layers(teacher, student).empty()) {
      throw demo::usage_error("the student \"" + pattern +
                              "\" replaces no mixer of the teacher \"" + s.teacher +
                              "\"; give another letter for at least one");
    }
  }
}

// What a resumed run must have in common with the one it goes on with.
std::string fingerprint(const settings& s, const demo::corpus& text) {
  nlohmann::json j = {{"device", s.device},
                      {"teacher", s.teacher},
                      {"student", s.student},
                      {"hybrid", s.hybrid},
                      {"draft", s.draft},
                      {"width", s.width},
                      {"heads", s.heads},
                      {"sequence_length", s.sequence_length},
                      {"tokens_per_step", s.tokens_per_step},
                      {"budget", s.budget},
                      {"stage3_rate", s.stage3_rate},
                      {"seed", s.seed},
                      {"train_bytes", text.train.size()},
                      {"train_checksum", demo::checksum(text.train)},
                      {"held_out_bytes", text.held_out.size()},
                      {"held_out_checksum", demo::checksum(text.held_out)}};
  return j.dump(2) + "\n";
}

}  // namespace

int demo::distill(const settings& s, index_t held_out_bytes, index_t new_tokens) {
  const auto start = std::chrono::steady_clock::now();
  check_settings(s);
  if (s.device == "cuda") require_cuda_device();
  demo::require_writable_folder(s.out);
  std::filesystem::create_directories(s.out / "stages");
  std::vector<std::filesystem::path> files(s.text.begin(), s.text.end());
  demo::corpus text = demo::load_corpus(files, {.max_bytes = s.max_bytes});
  const auto record = s.out / "stages" / "settings.json";
  const std::string mine = fingerprint(s, text);
  if (s.resume && std::filesystem::exists(record)) {
    std::ifstream in(record);
    const std::string theirs{std::istreambuf_iterator<char>(in), {}};
    if (mine != theirs) {
      throw demo::usage_error("--resume: " + record.string() +
                              " is of a run with other text or options; repeat those, or start "
                              "without --resume");
    }
  } else {
    for (const auto& entry : std::filesystem::directory_iterator(s.out / "stages")) {
      std::filesystem::remove(entry.path());
    }
    ssm::write_atomically(record, mine);
  }
  std::cerr << "text: " << text.train.size() << " bytes to train on, " << text.held_out.size()
            << " held out by file, " << text.removed.size() << " near copies removed\n";
  const auto results =
      (s.device == "cuda" ? run_on_cuda : run_on<ssm::cpu>)(s, held_out_bytes, new_tokens,
                                                            std::move(text), start);
  std::cout << demo::result_table(results) << "written to " << (s.out / "report.html").string()
            << " after " << static_cast<int>(results.at("seconds").get<double>()) << " s on "
            << results.at("device_name").get<std::string>() << "\n";
  return demo::verdict(results, std::cerr);
}
