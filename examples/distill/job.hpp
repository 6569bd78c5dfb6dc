#pragma once

#include "corpus.hpp"
#include "device.hpp"
#include "evaluate.hpp"
#include "findings.hpp"
#include "interrupt.hpp"
#include "ngram.hpp"
#include "run.hpp"
#include "saved_model.hpp"
#include "stages.hpp"
#include "version.hpp"
#include <ssmlib/io.hpp>
#include <ssmlib/ssmlib.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <map>
#include <numbers>
#include <numeric>
#include <string>
#include <vector>

namespace demo {

// Steps at budget 1 and learning rates. Students of one kind see the same bytes in the same order,
// whichever stages they take: stage 3 alone gets the steps of all three.
//
// The rates were set by hand, by one rule for all variants: a stage has one rate, whichever student
// it trains and whatever came before it. Stage 3's, on which the variants that skip stages depend
// most, is the option --stage3-rate.
struct plan {
  ssm::index_t teacher = 360, stage1 = 20, stage2 = 45, stage3 = 75, draft = 60;
  double teacher_rate = 3e-3, stage1_rate = 3e-3, stage2_rate = 3e-3;
};

/// A run on one device.
template <class B>
class job {
 public:
  using T = typename device<B>::value_type;
  using model = ssm::language_model<T, B>;

  job(const settings& s, const plan& p, ssm::index_t held_out_bytes, ssm::index_t new_tokens,
      corpus text)
      : settings_(s),
        plan_(p),
        new_tokens_(new_tokens),
        text_(std::move(text)),
        ctx_(device<B>::make_context(s)),
        scope_(ctx_),
        stages_(settings_, s.out / "stages", text_.train, ctx_) {
    text_.held_out.resize(
        std::min(text_.held_out.size(), static_cast<std::size_t>(held_out_bytes)));
  }

  void train_all() {
    teacher_ = model(config_of(settings_, settings_.teacher), settings_.seed);
    found_.curves["teacher"] =
        stages_.run({"teacher, next-byte prediction",
                     "teacher",
                     "bits per byte",
                     1 / std::numbers::ln2,
                     settings_.steps(plan_.teacher),
                     plan_.teacher_rate,
                     {"*"},
                     [this](const ssm::pass<T, B>& p, const ssm::token_batch& b) {
                       return ssm::next_token_loss(teacher_, p, b);
                     }},
                    teacher_);
    const std::vector<ssm::mohawk_stage> all = {ssm::mohawk_stage::matrix_orientation,
                                                ssm::mohawk_stage::hidden_state_alignment,
                                                ssm::mohawk_stage::distillation};
    distil("student", settings_.student, all);
    distil("hybrid", settings_.hybrid, all);
    distil("student-stages-2-3", settings_.student, {all[1], all[2]});
    distil("student-stage-3", settings_.student, {all[2]});
    distil("hybrid-stage-3", settings_.hybrid, {all[2]});
    train_draft();
  }

  void measure() {
    std::cerr << "\n== scoring " << text_.held_out.size() << " held-out bytes\n";
    const witten_bell_model ngram(text_.train);
    stop_if_requested();
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

  /// @param seconds  since the program was started
  void write(double seconds) {
    results_["seconds"] = seconds + stages_.earlier_seconds();
    results_["train_bytes"] = text_.train.size();
    results_["held_out_bytes"] = text_.held_out.size();
    results_["near_duplicate_files_removed"] = text_.removed.size();
    results_["device"] = B::name;
    results_["device_name"] = device<B>::name(ctx_);
    if constexpr (requires { ctx_.threads(); }) results_["threads"] = ctx_.threads();
    results_["version"] = library_version();
    results_["commit"] = source_commit();
    results_["date"] = utc_time();
    results_["learning_rates"] = {{"teacher", plan_.teacher_rate},
                                  {"stage_1", plan_.stage1_rate},
                                  {"stage_2", plan_.stage2_rate},
                                  {"stage_3", settings_.stage3_rate},
                                  {"draft", plan_.teacher_rate}};
    const auto models = settings_.out / "models";
    std::filesystem::create_directories(models);
    save_model(models / "teacher.safetensors", teacher_);
    for (const auto& [name, m] : students_)
      save_model(models / (name + ".safetensors"), m);
    save_model(models / "draft.safetensors", draft_);
    ssm::write_atomically(settings_.out / "report.html", report_page(found_));
    ssm::write_atomically(settings_.out / "summary.json", results_.dump(2) + "\n");
  }

  [[nodiscard]] const nlohmann::json& results() const { return results_; }

 private:
  void distil(const std::string& name, const std::string& pattern,
              const std::vector<ssm::mohawk_stage>& list) {
    model student(config_of(settings_, pattern), settings_.seed + 1);
    ssm::transfer_weights(teacher_, student);
    const bool all_stages = list.size() == 3;
    if (all_stages) take_pictures(name, student, /*before=*/true);
    ssm::index_t first_step = 0;
    for (const ssm::mohawk_stage st : list) {
      const bool in_bits = st == ssm::mohawk_stage::distillation;
      const ssm::index_t steps = steps_of(st, list);
      found_.curves[name + ", " + ssm::to_string(st)] = stages_.run(
          {name + ", " + ssm::to_string(st), name + "-" + std::to_string(static_cast<int>(st)),
           in_bits ? "bits per byte" : "distance", in_bits ? 1 / std::numbers::ln2 : 1.0, steps,
           rate_of(st), mohawk_trained(st, teacher_, student),
           [&](const ssm::pass<T, B>& p, const ssm::token_batch& b) {
             return ssm::mohawk_loss(st, teacher_, student, p, b.inputs);
           },
           first_step},
          student);
      first_step += steps;
      if (st == ssm::mohawk_stage::matrix_orientation)
        take_pictures(name, student, /*before=*/false);
    }
    students_[name] = student;
  }

  // The first stage of a shorter list takes over the steps of those that are left out.
  [[nodiscard]] ssm::index_t steps_of(ssm::mohawk_stage st,
                                      const std::vector<ssm::mohawk_stage>& list) const {
    const std::array<ssm::index_t, 3> steps = {settings_.steps(plan_.stage1),
                                               settings_.steps(plan_.stage2),
                                               settings_.steps(plan_.stage3)};
    const auto end = static_cast<std::size_t>(st);
    const std::size_t begin = st == list.front() ? 0 : end - 1;
    return std::accumulate(steps.begin() + begin, steps.begin() + end, ssm::index_t{0});
  }

  [[nodiscard]] double rate_of(ssm::mohawk_stage st) const {
    return st == ssm::mohawk_stage::matrix_orientation       ? plan_.stage1_rate
           : st == ssm::mohawk_stage::hidden_state_alignment ? plan_.stage2_rate
                                                             : settings_.stage3_rate;
  }

  // The draft is distilled from the teacher's predictions too, but has layers of its own.
  void train_draft() {
    draft_ = model(config_of(settings_, settings_.draft), settings_.seed + 2);
    found_.curves["draft"] = stages_.run(
        {"draft, distillation",
         "draft",
         "bits per byte",
         1 / std::numbers::ln2,
         settings_.steps(plan_.draft),
         plan_.teacher_rate,
         {"*"},
         [this](const ssm::pass<T, B>& p, const ssm::token_batch& b) {
           const auto kl = ssm::lm_kl_divergence(p, draft_.hidden(p, b.inputs), draft_.head(),
                                                 teacher_.hidden(silent(), b.inputs),
                                                 teacher_.head(), {}, {.divide_by = 1.0});
           return ssm::loss_sum<T, B>{kl.loss, kl.tokens};
         }},
        draft_);
  }

  void take_pictures(const std::string& name, const model& student, bool before) {
    const ssm::index_t n =
        std::min<ssm::index_t>(96, static_cast<ssm::index_t>(text_.held_out.size()));
    const std::span<const std::uint8_t> snippet(text_.held_out.data(), static_cast<std::size_t>(n));
    const auto side = static_cast<std::size_t>(n);
    auto& all = found_.pictures[name];
    const auto layers = ssm::replaced_layers(teacher_, student);
    const std::vector<ssm::index_t> shown = {layers.front(), layers.back()};
    for (const ssm::index_t layer : shown) {
      const auto x = layer_input(teacher_, layer, snippet, ctx_);
      for (const ssm::index_t head : {ssm::index_t{0}, settings_.heads - 1}) {
        const std::string caption =
            "layer " + std::to_string(layer) + ", head " + std::to_string(head);
        if (before) {
          all.teacher.push_back(
              {caption, side, side, mixer_matrix(teacher_, layer, head, x, ctx_)});
        }
        (before ? all.before : all.after)
            .push_back({caption, side, side, mixer_matrix(student, layer, head, x, ctx_)});
      }
    }
  }

  [[nodiscard]] ssm::pass<T, B> silent() const { return {ctx_, nullptr, false}; }

  void bits(const char* key, const model& m) {
    results_[key] = bits_per_byte(m, text_.held_out, settings_.sequence_length, ctx_);
    std::cerr << key << " " << results_[key] << "\n";
  }

  [[nodiscard]] std::vector<std::int32_t> prompt() const {
    const std::size_t n = std::min<std::size_t>(64, text_.held_out.size());
    return {text_.held_out.begin(), text_.held_out.begin() + static_cast<std::ptrdiff_t>(n)};
  }

  static void stop_between_tokens(ssm::index_t, std::int32_t) { stop_if_requested(); }

  void generate() {
    const ssm::generate_options options{
        .max_new_tokens = new_tokens_,
        .sampling = {.temperature = 0.7, .top_p = 0.95, .seed = settings_.seed},
        .on_token = stop_between_tokens};
    const auto continue_with = [&](const char* name, const model& m) {
      found_.samples.push_back(
          {name, text_of(prompt()) + text_of(ssm::generate(m, {prompt()}, options, ctx_)[0])});
    };
    continue_with("teacher", teacher_);
    continue_with("student", students_.at("student"));
    continue_with("hybrid", students_.at("hybrid"));
  }

  void speculate() {
    using clock = std::chrono::steady_clock;
    const ssm::generate_options greedy{.max_new_tokens = new_tokens_,
                                       .on_token = stop_between_tokens};
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
    found_.samples.push_back({"teacher, greedy, decoded speculatively",
                              text_of(prompts[0]) + text_of(speculative.tokens[0])});
  }

  const settings& settings_;
  plan plan_;
  ssm::index_t new_tokens_;
  corpus text_;
  typename B::context ctx_;
  [[no_unique_address]] typename B::scope scope_;  // what is made outside of a pass is on ctx_ too
  basic_stage_runner<T, B> stages_;
  model teacher_, draft_;
  std::map<std::string, model> students_;
  findings found_;
  nlohmann::json& results_ = found_.results;
};

/// Trains, measures and writes. @param start  of the program
template <class B>
[[nodiscard]] nlohmann::json run_on(const settings& s, ssm::index_t held_out_bytes,
                                    ssm::index_t new_tokens, corpus text,
                                    std::chrono::steady_clock::time_point start) {
  job<B> j(s, {}, held_out_bytes, new_tokens, std::move(text));
  j.train_all();
  j.measure();
  j.write(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return j.results();
}

}  // namespace demo
