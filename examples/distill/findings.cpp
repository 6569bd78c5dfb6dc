#include "findings.hpp"

#include <iomanip>
#include <ostream>
#include <sstream>

namespace {

std::vector<std::pair<std::string, std::string>> rows() {
  return {{"n-gram, Witten-Bell, orders 0 to 5", "ngram_bpb"},
          {"teacher", "teacher_bpb"},
          {"pure student, stages 1-3", "student_bpb"},
          {"pure student, stages 2-3", "student_bpb_stages_2_3"},
          {"pure student, stage 3 alone", "student_bpb_stage3_only"},
          {"hybrid student, stages 1-3", "hybrid_bpb"},
          {"hybrid student, stage 3 alone", "hybrid_bpb_stage3_only"},
          {"draft, one layer", "draft_bpb"}};
}

std::string number(double x, int digits) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(digits) << x;
  return out.str();
}

// The number of a result as text.
class lookup {
 public:
  explicit lookup(const nlohmann::json& results) : results_(results) {}
  [[nodiscard]] double value(const std::string& key) const {
    return results_.at(key).get<double>();
  }
  [[nodiscard]] std::string operator()(const std::string& key, int digits) const {
    return number(value(key), digits);
  }
  [[nodiscard]] std::string integer(const std::string& key) const {
    return std::to_string(results_.at(key).get<long long>());
  }
  [[nodiscard]] std::string rate(const char* stage) const {
    std::ostringstream out;
    out << results_.at("learning_rates").at(stage).get<double>();
    return out.str();
  }

 private:
  const nlohmann::json& results_;
};

void add_scores(demo::report& r, const lookup& of) {
  r.heading("Results");
  r.paragraph("Every model was scored on the same " + of.integer("held_out_bytes") +
              " bytes of text that none was trained on; the n-gram and the teacher were trained "
              "on the same " +
              of.integer("train_bytes") + " bytes. " + of.integer("near_duplicate_files_removed") +
              " near copies of files were left out.");
  std::vector<std::vector<std::string>> cells;
  for (const auto& [label, key] : rows()) {
    cells.push_back({label, of(key, 3), number(of.value(key) - of.value("teacher_bpb"), 3)});
  }
  r.table({"model", "bits per byte", "against the teacher"}, cells);
}

void add_gains(demo::report& r, const lookup& of) {
  r.heading("What the stages bought");
  const auto gain = [&](const char* with, const char* without) {
    return number(of.value(without) - of.value(with), 3);
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
  r.paragraph(
      "Learning rates were set by hand, by one rule for all variants: a stage has one rate, "
      "whichever student it trains and whichever stages come before it (stage 1: " +
      of.rate("stage_1") + ", stage 2: " + of.rate("stage_2") + ", stage 3: " + of.rate("stage_3") +
      "). Stage 3 alone takes all its steps at the rate of the full run's stage 3, with the same "
      "schedule: warm-up over a tenth of the steps, decay over the last third. No rate was "
      "searched for in this run; --stage3-rate repeats the comparison with another one.");
}

void add_speculation(demo::report& r, const lookup& of, bool equal) {
  r.heading("Speculative decoding of the teacher");
  r.table({"quantity", "value"},
          {{"tokens a step", of("tokens_per_step", 2)},
           {"acceptance of draft tokens", of("acceptance", 3)},
           {"plain, tokens per second", of("plain_tokens_per_second", 0)},
           {"speculative, tokens per second", of("speculative_tokens_per_second", 0)},
           {"speed-up", of("speculative_speedup", 2)},
           {"greedy text equals plain greedy text", equal ? "yes" : "no"}});
}

void add_chart(demo::report& r, const demo::findings& f, const std::string& title,
               const std::string& y, const std::vector<std::string>& names) {
  std::vector<demo::series> lines;
  for (const std::string& name : names) {
    const demo::curve& c = f.curves.at(name);
    lines.push_back({name, c.bytes, c.loss});
  }
  r.chart(title, "bytes", y, lines);
}

void add_curves(demo::report& r, const demo::findings& f) {
  r.heading("Training");
  add_chart(r, f, "Teacher, next-byte prediction", "bits per byte", {"teacher"});
  add_chart(r, f, "Draft, distillation", "KL divergence, bits per byte", {"draft"});
  std::map<std::string, std::vector<std::string>> stages;
  for (const auto& [name, c] : f.curves) {
    const auto comma = name.find(", ");
    if (comma != std::string::npos) stages[name.substr(comma + 2)].push_back(name);
  }
  for (const auto& [stage, names] : stages) {
    const bool in_bits = stage.ends_with("distillation");
    add_chart(r, f, stage, in_bits ? "KL divergence, bits per byte" : "loss", names);
  }
}

void add_pictures(demo::report& r, const demo::findings& f) {
  r.heading("Matrices of the mixers");
  r.paragraph(
      "Entry (t, s) of the T x T matrix by which each mixer multiplies its values, for "
      "the first bytes of the held-out text. Students see the teacher's own inputs.");
  for (const auto& [name, p] : f.pictures) {
    std::vector<std::vector<demo::matrix_picture>> lines;
    for (std::size_t i = 0; i < p.teacher.size(); ++i) {
      lines.push_back({p.teacher[i], p.before[i], p.after[i]});
    }
    r.gallery(name, {"teacher", "before stage 1", "after stage 1"}, lines);
  }
}

bool texts_are_equal(const nlohmann::json& results) {
  return results.at("greedy_speculative_equals_plain").get<bool>();
}

}  // namespace

std::string demo::result_table(const nlohmann::json& results) {
  const lookup of(results);
  std::ostringstream out;
  out << std::fixed << std::setprecision(3);
  for (const auto& [label, key] : rows()) {
    out << std::left << std::setw(44) << label << std::right << std::setw(8) << of.value(key)
        << " bits per byte\n";
  }
  out << "speculative decoding: " << of.value("tokens_per_step") << " tokens a step, acceptance "
      << of.value("acceptance") << ", speed-up " << of.value("speculative_speedup")
      << ", greedy text equal to plain: " << (texts_are_equal(results) ? "yes" : "NO") << "\n";
  return out.str();
}

std::string demo::report_page(const findings& f) {
  const lookup of(f.results);
  const auto text = [&](const char* key) { return f.results.at(key).get<std::string>(); };
  report r("MOHAWK distillation of a small Transformer",
           "ssmlib " + text("version") + " (commit " + text("commit") + ") on " +
               text("device_name") + ", " + number(of.value("seconds"), 0) + " s, " + text("date"));
  add_scores(r, of);
  add_gains(r, of);
  add_speculation(r, of, texts_are_equal(f.results));
  add_curves(r, f);
  add_pictures(r, f);
  r.heading("Text");
  for (const auto& [name, sample] : f.samples)
    r.code(name, sample);
  return r.html();
}

int demo::verdict(const nlohmann::json& results, std::ostream& errors) {
  if (texts_are_equal(results)) return 0;
  errors
      << "distill: the teacher's greedy text decoded speculatively differs from its plain greedy "
         "text, which it must equal to the byte; please report this\n";
  return 1;
}
