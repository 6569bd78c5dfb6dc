#pragma once

#include "curve.hpp"
#include "evaluate.hpp"
#include "interrupt.hpp"
#include "progress.hpp"
#include "settings.hpp"
#include <ssmlib/io.hpp>
#include <ssmlib/io/parameters.hpp>
#include <ssmlib/ssmlib.hpp>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <vector>

namespace demo {

/// One thing to train: a model, which of its parameters, with which loss.
template <class T, class B>
struct basic_stage {
  std::string name;   ///< "student, stage 1", for people
  std::string file;   ///< "student-1", for the files of the run
  std::string unit;   ///< of the loss
  double loss_scale;  ///< from the loss to that unit
  ssm::index_t steps;
  double learning_rate;
  std::vector<std::string> trained;  ///< patterns of parameter names
  std::function<ssm::loss_sum<T, B>(const ssm::pass<T, B>&, const ssm::token_batch&)> loss;
  ssm::index_t first_step = 0;  ///< steps of text that earlier stages have read
};

/// Runs stages one after another, each from a checkpoint if there is one. Files in `folder`:
/// NAME.checkpoint while a stage runs, NAME.done when it has ended.
template <class T, class B>
class basic_stage_runner {
 public:
  basic_stage_runner(const settings& s, std::filesystem::path folder,
                     const std::vector<std::uint8_t>& text, const typename B::context& ctx)
      : settings_(s), folder_(std::move(folder)), text_(text), ctx_(ctx) {}

  /// Seconds that stages took in earlier starts of a run that was resumed.
  [[nodiscard]] double earlier_seconds() const { return earlier_seconds_; }

  /// Trains `m` in place. @throws interrupted  Ctrl-C; what was done is saved.
  curve run(const basic_stage<T, B>& st, const ssm::language_model<T, B>& m) {
    const auto start = clock::now();
    const auto done = folder_ / (st.file + ".done"), partial = folder_ / (st.file + ".checkpoint");
    const auto parameters = m.parameters();
    if (settings_.resume && std::filesystem::exists(done)) {
      const auto notes = ssm::load_parameters(done, parameters);
      earlier_seconds_ += std::stod(notes.at("seconds"));
      return curve::from_text(notes.at("curve"));
    }
    const auto selection = ssm::select_parameters(parameters, ssm::any_of_patterns{st.trained});
    std::cerr << "\n== " << st.name << ": " << st.steps << " steps of " << settings_.tokens_per_step
              << " bytes\n"
              << ssm::to_string(selection);
    ssm::adamw<T, B> optimizer(selection.trained, {.weight_decay = 0.1});
    const ssm::token_spans source{std::span<const std::uint8_t>(text_)};
    ssm::data_loader loader(source,
                            {.sequence_length = settings_.sequence_length, .seed = settings_.seed});
    for (ssm::index_t i = 0; i < st.first_step; ++i)
      (void)loader.next(settings_.tokens_per_step / settings_.sequence_length);
    curve c;
    double before = 0;  // seconds that this stage took in earlier starts
    if (settings_.resume && std::filesystem::exists(partial)) {
      const ssm::run_state state = ssm::load_checkpoint(partial, parameters, optimizer);
      loader.restore(state.loader);
      c = curve::from_text(state.notes.at("curve"));
      before = std::stod(state.notes.at("seconds"));
      earlier_seconds_ += before;
      std::cerr << "goes on after step " << optimizer.steps() << "\n";
    }
    const auto notes = [&]() -> std::map<std::string, std::string> {
      const double seconds = std::chrono::duration<double>(clock::now() - start).count();
      return {{"curve", c.text()}, {"seconds", std::to_string(before + seconds)}};
    };
    const auto save = [&] {
      ssm::save_checkpoint(partial, parameters, optimizer, {loader.state(), {}, notes()});
    };
    progress bar(st.name, st.steps * settings_.tokens_per_step,
                 {.unit = "bytes", .first = optimizer.steps() * settings_.tokens_per_step});
    auto saved = clock::now();
    const ssm::index_t warmup = std::max<ssm::index_t>(1, st.steps / 10);
    ssm::train(optimizer, loader, st.loss,
               {.steps = st.steps,
                .tokens_per_step = settings_.tokens_per_step,
                .learning_rate = st.learning_rate,
                .schedule = ssm::wsd_schedule{.steps = st.steps,
                                              .warmup = warmup,
                                              .decay = std::min(st.steps - warmup, st.steps / 3)}},
               {.on_step =
                    [&](const ssm::step_info& info) {
                      const double loss = info.loss * st.loss_scale;
                      const auto bytes = (info.step + 1) * settings_.tokens_per_step;
                      c.bytes.push_back(static_cast<double>(bytes));
                      c.loss.push_back(loss);
                      bar.update(bytes, loss);
                      const auto now = clock::now();
                      if (now - saved > std::chrono::seconds(20)) {
                        save();
                        saved = now;
                      }
                    },
                .should_stop = [] { return stop_requested != 0; }},
               ctx_);
    bar.finish();
    if (optimizer.steps() < st.steps) {
      save();
      throw interrupted{};
    }
    ssm::save_parameters(done, parameters, notes());
    std::filesystem::remove(partial);
    return c;
  }

 private:
  using clock = std::chrono::steady_clock;

  const settings& settings_;
  std::filesystem::path folder_;
  const std::vector<std::uint8_t>& text_;
  const typename B::context& ctx_;
  double earlier_seconds_ = 0;
};

using stage = basic_stage<float, ssm::cpu>;
using stage_runner = basic_stage_runner<float, ssm::cpu>;

}  // namespace demo
