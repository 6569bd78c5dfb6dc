#include "run.hpp"

#include "corpus.hpp"
#include "error.hpp"
#include "evaluate.hpp"
#include "ngram.hpp"
#include "output_folder.hpp"
#include "report.hpp"
#include "stages.hpp"
#include <ssmlib/io.hpp>
#include <ssmlib/ssmlib.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <map>
#include <numbers>
#include <sstream>
#include <string>
#include <vector>

namespace {

using demo::curve;
using demo::model;
using demo::settings;
using ssm::index_t;
using ssm::mohawk_stage;

// Steps at budget 1. Students of one kind see the same number of bytes, whichever stages they take:
// stage 3 alone gets the steps of all three.
struct plan {
  index_t teacher = 270, stage1 = 20, stage2 = 45, stage3 = 75, draft = 60;
  double teacher_rate = 3e-3, stage1_rate = 3e-3, stage2_rate = 3e-3, stage3_rate = 2e-3;
};

struct pictures {
  std::vector<demo::matrix_picture> teacher, before, after;
};

class run {
 public:
  run(const settings& s, const plan& p, index_t held_out_bytes, index_t new_tokens,
      demo::corpus text)
      : settings_(s),
        plan_(p),
        new_tokens_(new_tokens),
        text_(std::move(text)),
        ctx_(s.threads > 0 ? ssm::cpu::context(s.threads) : ssm::cpu::context()),
        stages_(settings_, s.out / "stages", text_.train, ctx_) {
    text_.held_out.resize(
        std::min(text_.held_out.size(), static_cast<std::size_t>(held_out_bytes)));
  }

  void train_all() {
    teacher_ = model(config_of(settings_, settings_.teacher), settings_.seed);
    curves_["teacher"] = stages_.run({"teacher, next-byte prediction",
                                      "teacher",
                                      "bits per byte",
                                      1 / std::numbers::ln2,
                                      settings_.steps(plan_.teacher),
                                      plan_.teacher_rate,
                                      {"*"},
                                      [this](const ssm::pass<float>& p, const ssm::token_batch& b) {
                                        return ssm::next_token_loss(teacher_, p, b);
                                      }},
                                     teacher_);
    const std::vector<mohawk_stage> all = {mohawk_stage::matrix_orientation,
                                           mohawk_stage::hidden_state_alignment,
                                           mohawk_stage::distillation};
    distil("student", settings_.student, all);
    distil("hybrid", settings_.hybrid, all);
    distil("student-stages-2-3", settings_.student, {all[1], all[2]});
    distil("student-stage-3", settings_.student, {all[2]});
    distil("hybrid-stage-3", settings_.hybrid, {all[2]});
    train_draft();
  }

  void measure() {
    std::cerr << "\n== scoring " << text_.held_out.size() << " held-out bytes\n";
    const demo::witten_bell_model ngram(text_.train);
    results_["ngram_bpb"] = ngram.bits_per_byte(text_.held_out);
    bits("teacher_bpb", teacher_);
    bits("student_bpb", students_.at("student"));
    bits("student_bpb_stages_2_3", students_.at("student-stages-2-3"));
    bits("student_bpb_stage3_only", students_.at("student-stage-3"));
    bits("hybrid_bpb", students_.at("hybrid"));
    bits("hybrid_bpb_stage3_only", students_.at("hybrid-stage-3"));
    bits("draft_bpb", draft_);
    results_["teacher_parameters"] = ssm::parameter_count(teacher_.parameters());
    results_["student_parameters"] = ssm::parameter_count(students_.at("student").parameters());
    results_["hybrid_parameters"] = ssm::parameter_count(students_.at("hybrid").parameters());
    results_["draft_parameters"] = ssm::parameter_count(draft_.parameters());
    generate();
    speculate();
  }

  void write(double seconds) {
    results_["seconds"] = seconds;
    results_["threads"] = ctx_.threads();
    results_["train_bytes"] = text_.train.size();
    results_["held_out_bytes"] = text_.held_out.size();
    results_["near_duplicate_files_removed"] = text_.removed.size();
    results_["device"] = "cpu";
    const auto models = settings_.out / "models";
    std::filesystem::create_directories(models);
    ssm::save_parameters(models / "teacher.safetensors", teacher_.parameters(),
                         {{"pattern", settings_.teacher}});
    for (const auto& [name, m] : students_) {
      ssm::save_parameters(models / (name + ".safetensors"), m.parameters(),
                           {{"pattern", m.config().pattern}});
    }
    ssm::save_parameters(models / "draft.safetensors", draft_.parameters(),
                         {{"pattern", settings_.draft}});
    ssm::write_atomically(settings_.out / "report.html", page());
    ssm::write_atomically(settings_.out / "summary.json", results_.dump(2) + "\n");
  }

  [[nodiscard]] std::string table() const {
    std::ostringstream out;
    out << std::fixed << std::setprecision(3);
    for (const auto& [label, key] : rows()) {
      out << std::left << std::setw(44) << label << std::right << std::setw(8)
          << results_.at(key).get<double>() << " bits per byte\n";
    }
    out << "speculative decoding: " << results_.at("tokens_per_step").get<double>()
        << " tokens a step, acceptance " << results_.at("acceptance").get<double>() << ", speed-up "
        << results_.at("speculative_speedup").get<double>() << ", greedy text equal to plain: "
        << (results_.at("greedy_speculative_equals_plain").get<bool>() ? "yes" : "NO") << "\n";
    return out.str();
  }

 private:
  void distil(const std::string& name, const std::string& pattern,
              const std::vector<mohawk_stage>& list) {
    model student(config_of(settings_, pattern), settings_.seed + 1);
    ssm::transfer_weights(teacher_, student);
    const bool first_run = list.size() == 3;
    if (first_run) take_pictures(name, student, /*before=*/true);
    for (const mohawk_stage st : list) {
      const int number = static_cast<int>(st);
      index_t steps = number == 1 ? plan_.stage1 : number == 2 ? plan_.stage2 : plan_.stage3;
      if (list.size() == 1) steps = plan_.stage1 + plan_.stage2 + plan_.stage3;
      if (list.size() == 2 && number == 2) steps = plan_.stage1 + plan_.stage2;
      const bool in_bits = st == mohawk_stage::distillation;
      curves_[name + ", " + to_string(st)] =
          stages_.run({name + ", " + to_string(st), name + "-" + std::to_string(number),
                       in_bits ? "bits per byte" : "distance",
                       in_bits ? 1 / std::numbers::ln2 : 1.0, settings_.steps(steps),
                       number == 1   ? plan_.stage1_rate
                       : number == 2 ? plan_.stage2_rate
                                     : plan_.stage3_rate,
                       mohawk_trained(st, teacher_, student),
                       [&](const ssm::pass<float>& p, const ssm::token_batch& b) {
                         return ssm::mohawk_loss(st, teacher_, student, p, b.inputs);
                       }},
                      student);
      if (first_run && number == 1) take_pictures(name, student, /*before=*/false);
    }
    students_[name] = student;
  }

  // The draft is distilled from the teacher's predictions too, but has layers of its own.
  void train_draft() {
    draft_ = model(config_of(settings_, settings_.draft), settings_.seed + 2);
    curves_["draft"] = stages_.run({"draft, distillation",
                                    "draft",
                                    "bits per byte",
                                    1 / std::numbers::ln2,
                                    settings_.steps(plan_.draft),
                                    plan_.teacher_rate,
                                    {"*"},
                                    [this](const ssm::pass<float>& p, const ssm::token_batch& b) {
                                      const auto kl = ssm::lm_kl_divergence(
                                          p, draft_.hidden(p, b.inputs), draft_.head(),
                                          teacher_.hidden({ctx_, nullptr, false}, b.inputs),
                                          teacher_.head(), {}, {.divide_by = 1.0});
                                      return ssm::loss_sum<float>{kl.loss, kl.tokens};
                                    }},
                                   draft_);
  }

  void take_pictures(const std::string& name, const model& student, bool before) {
    const index_t n = std::min<index_t>(96, static_cast<index_t>(text_.held_out.size()));
    const std::span<const std::uint8_t> snippet(text_.held_out.data(), static_cast<std::size_t>(n));
    const auto side = static_cast<std::size_t>(n);
    auto& all = pictures_[name];
    const auto layers = ssm::replaced_layers(teacher_, student);
    const std::vector<index_t> shown = {layers.front(), layers.back()};
    for (const index_t layer : shown) {
      const auto x = demo::layer_input(teacher_, layer, snippet, ctx_);
      for (const index_t head : {index_t{0}, settings_.heads - 1}) {
        const std::string caption =
            "layer " + std::to_string(layer) + ", head " + std::to_string(head);
        if (before) {
          all.teacher.push_back(
              {caption, side, side, demo::mixer_matrix(teacher_, layer, head, x, ctx_)});
        }
        (before ? all.before : all.after)
            .push_back({caption, side, side, demo::mixer_matrix(student, layer, head, x, ctx_)});
      }
    }
  }

  void bits(const char* key, const model& m) {
    results_[key] = demo::bits_per_byte(m, text_.held_out, settings_.sequence_length, ctx_);
    std::cerr << key << " " << results_[key] << "\n";
  }

  [[nodiscard]] std::vector<std::int32_t> prompt() const {
    const std::size_t n = std::min<std::size_t>(64, text_.held_out.size());
    return {text_.held_out.begin(), text_.held_out.begin() + static_cast<std::ptrdiff_t>(n)};
  }

  void generate() {
    const ssm::generate_options options{
        .max_new_tokens = new_tokens_,
        .sampling = {.temperature = 0.7, .top_p = 0.95, .seed = settings_.seed}};
    const auto continue_with = [&](const char* name, const model& m) {
      samples_.push_back({name, demo::text_of(prompt()) +
                                    demo::text_of(ssm::generate(m, {prompt()}, options, ctx_)[0])});
    };
    continue_with("teacher", teacher_);
    continue_with("student", students_.at("student"));
    continue_with("hybrid", students_.at("hybrid"));
  }

  void speculate() {
    using clock = std::chrono::steady_clock;
    const ssm::generate_options greedy{.max_new_tokens = new_tokens_};
    const ssm::token_rows prompts = {prompt()};
    std::vector<double> plain_seconds, speculative_seconds;
    ssm::token_rows plain;
    ssm::speculation_result speculative;
    for (int repeat = 0; repeat < 3; ++repeat) {  // interleaved; the medians count
      const auto start = clock::now();
      plain = ssm::generate(teacher_, prompts, greedy, ctx_);
      const auto middle = clock::now();
      speculative = ssm::speculate(teacher_, draft_, prompts, greedy, {.draft_tokens = 4}, ctx_);
      const auto end = clock::now();
      plain_seconds.push_back(std::chrono::duration<double>(middle - start).count());
      speculative_seconds.push_back(std::chrono::duration<double>(end - middle).count());
    }
    std::ranges::sort(plain_seconds);
    std::ranges::sort(speculative_seconds);
    results_["greedy_speculative_equals_plain"] = plain == speculative.tokens;
    results_["tokens_per_step"] = speculative.statistics.tokens_per_step();
    results_["acceptance"] = speculative.statistics.acceptance();
    results_["speculative_speedup"] = plain_seconds[1] / speculative_seconds[1];
    results_["plain_tokens_per_second"] = static_cast<double>(new_tokens_) / plain_seconds[1];
    results_["speculative_tokens_per_second"] =
        static_cast<double>(new_tokens_) / speculative_seconds[1];
    samples_.push_back({"teacher, greedy, decoded speculatively",
                        demo::text_of(prompts[0]) + demo::text_of(speculative.tokens[0])});
  }

  [[nodiscard]] static std::vector<std::pair<std::string, std::string>> rows() {
    return {{"n-gram, Witten-Bell, orders 0 to 5", "ngram_bpb"},
            {"teacher", "teacher_bpb"},
            {"pure student, stages 1-3", "student_bpb"},
            {"pure student, stages 2-3", "student_bpb_stages_2_3"},
            {"pure student, stage 3 alone", "student_bpb_stage3_only"},
            {"hybrid student, stages 1-3", "hybrid_bpb"},
            {"hybrid student, stage 3 alone", "hybrid_bpb_stage3_only"},
            {"draft, one layer", "draft_bpb"}};
  }

  [[nodiscard]] std::string page() const {
    const auto number = [](double x, int digits) {
      std::ostringstream out;
      out << std::fixed << std::setprecision(digits) << x;
      return out.str();
    };
    const std::time_t now = std::time(nullptr);
    char date[32];
    std::strftime(date, sizeof date, "%Y-%m-%d", std::localtime(&now));
    demo::report r("MOHAWK distillation of a small Transformer",
                   "ssmlib on the CPU, " + std::to_string(ctx_.threads()) + " threads, " + date);
    r.heading("Results");
    r.paragraph("Every model was scored on the same " + std::to_string(text_.held_out.size()) +
                " bytes of text that none was trained on; the n-gram and the teacher were trained "
                "on the same " +
                std::to_string(text_.train.size()) + " bytes. " +
                std::to_string(text_.removed.size()) + " near copies of files were left out.");
    const double teacher = results_.at("teacher_bpb").get<double>();
    std::vector<std::vector<std::string>> cells;
    for (const auto& [label, key] : rows()) {
      const double b = results_.at(key).get<double>();
      cells.push_back({label, number(b, 3), number(b - teacher, 3)});
    }
    r.table({"model", "bits per byte", "against the teacher"}, cells);
    r.heading("What the stages bought");
    const auto gain = [&](const char* with, const char* without) {
      return number(results_.at(without).get<double>() - results_.at(with).get<double>(), 3);
    };
    r.table(
        {"with the same bytes of training", "bits per byte saved"},
        {{"pure student: stage 1, over stages 2-3", gain("student_bpb", "student_bpb_stages_2_3")},
         {"pure student: stage 2, over stage 3 alone",
          gain("student_bpb_stages_2_3", "student_bpb_stage3_only")},
         {"pure student: stages 1 and 2, over stage 3 alone",
          gain("student_bpb", "student_bpb_stage3_only")},
         {"hybrid student: stages 1 and 2, over stage 3 alone",
          gain("hybrid_bpb", "hybrid_bpb_stage3_only")}});
    r.heading("Speculative decoding of the teacher");
    r.table({"quantity", "value"},
            {{"tokens a step", number(results_.at("tokens_per_step").get<double>(), 2)},
             {"acceptance of draft tokens", number(results_.at("acceptance").get<double>(), 3)},
             {"plain, tokens per second",
              number(results_.at("plain_tokens_per_second").get<double>(), 0)},
             {"speculative, tokens per second",
              number(results_.at("speculative_tokens_per_second").get<double>(), 0)},
             {"speed-up", number(results_.at("speculative_speedup").get<double>(), 2)},
             {"greedy text equals plain greedy text",
              results_.at("greedy_speculative_equals_plain").get<bool>() ? "yes" : "no"}});
    r.heading("Training");
    chart(r, "Teacher, next-byte prediction", "bits per byte", {"teacher"});
    chart(r, "Draft, distillation", "KL divergence, bits per byte", {"draft"});
    for (const auto stage : {mohawk_stage::matrix_orientation, mohawk_stage::hidden_state_alignment,
                             mohawk_stage::distillation}) {
      std::vector<std::string> names;
      for (const auto& [name, m] : students_) {
        if (curves_.contains(name + ", " + to_string(stage))) {
          names.push_back(name + ", " + to_string(stage));
        }
      }
      const std::string title = to_string(stage);
      chart(r, title, stage == mohawk_stage::distillation ? "KL divergence, bits per byte" : "loss",
            names);
    }
    r.heading("Matrices of the mixers");
    r.paragraph(
        "Entry (t, s) of the T x T matrix by which each mixer multiplies its values, for "
        "the first bytes of the held-out text. Students see the teacher's own inputs.");
    for (const auto& [name, p] : pictures_) {
      std::vector<std::vector<demo::matrix_picture>> rows;
      for (std::size_t i = 0; i < p.teacher.size(); ++i) {
        rows.push_back({p.teacher[i], p.before[i], p.after[i]});
      }
      r.gallery(name, {"teacher", "before stage 1", "after stage 1"}, rows);
    }
    r.heading("Text");
    for (const auto& [name, text] : samples_)
      r.code(name, text);
    return r.html();
  }

  void chart(demo::report& r, const std::string& title, const std::string& y,
             const std::vector<std::string>& names) const {
    std::vector<demo::series> lines;
    for (const std::string& name : names) {
      const curve& c = curves_.at(name);
      lines.push_back({name, c.bytes, c.loss});
    }
    r.chart(title, "bytes", y, lines);
  }

  const settings& settings_;
  const plan& plan_;
  index_t new_tokens_;
  demo::corpus text_;
  ssm::cpu::context ctx_;
  demo::stage_runner stages_;
  model teacher_, draft_;
  std::map<std::string, model> students_;
  std::map<std::string, curve> curves_;
  std::map<std::string, pictures> pictures_;
  std::vector<std::pair<std::string, std::string>> samples_;
  nlohmann::json results_;
};

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
  nlohmann::json j = {{"teacher", s.teacher},
                      {"student", s.student},
                      {"hybrid", s.hybrid},
                      {"draft", s.draft},
                      {"width", s.width},
                      {"heads", s.heads},
                      {"sequence_length", s.sequence_length},
                      {"tokens_per_step", s.tokens_per_step},
                      {"budget", s.budget},
                      {"seed", s.seed},
                      {"train_bytes", text.train.size()},
                      {"held_out_bytes", text.held_out.size()}};
  return j.dump(2) + "\n";
}

}  // namespace

int demo::distill(const settings& s, index_t held_out_bytes, index_t new_tokens) {
  const auto start = std::chrono::steady_clock::now();
  check_settings(s);
  demo::require_writable_folder(s.out);
  std::filesystem::create_directories(s.out / "stages");
  std::vector<std::filesystem::path> files(s.text.begin(), s.text.end());
  demo::corpus text = demo::load_corpus(files, {.max_bytes = s.max_bytes});
  std::cerr << "text: " << text.train.size() << " bytes to train on, " << text.held_out.size()
            << " held out by file, " << text.removed.size() << " near copies removed\n";
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
  const plan p;
  run r(s, p, held_out_bytes, new_tokens, std::move(text));
  r.train_all();
  r.measure();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  r.write(seconds);
  std::cout << r.table() << "written to " << (s.out / "report.html").string() << " after "
            << static_cast<int>(seconds) << " s\n";
  return 0;
}
