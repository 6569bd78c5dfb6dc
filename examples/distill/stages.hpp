#pragma once

#include "chart.hpp"
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
#include <sstream>
#include <string>
#include <vector>

namespace demo {

/// A curve that is saved in a checkpoint's notes.
struct curve {
  std::vector<double> bytes, loss;

  [[nodiscard]] std::string text() const {
    std::ostringstream out;
    out.precision(9);
    for (std::size_t i = 0; i < bytes.size(); ++i)
      out << bytes[i] << ' ' << loss[i] << '\n';
    return out.str();
  }
  static curve from_text(const std::string& text) {
    curve c;
    std::istringstream in(text);
    for (double b, l; in >> b >> l;) {
      c.bytes.push_back(b);
      c.loss.push_back(l);
    }
    return c;
  }
};

/// One thing to train: a model, which of its parameters, with which loss.
struct stage {
  std::string name;   ///< "student, stage 1", for people
  std::string file;   ///< "student-1", for the files of the run
  std::string unit;   ///< of the loss
  double loss_scale;  ///< from the loss to that unit
  ssm::index_t steps;
  double learning_rate;
  std::vector<std::string> trained;  ///< patterns of parameter names
  std::function<ssm::loss_sum<float>(const ssm::pass<float>&, const ssm::token_batch&)> loss;
};

/// Runs stages one after another, each from a checkpoint if there is one. Files in `folder`:
/// NAME.checkpoint while a stage runs, NAME.done when it has ended.
class stage_runner {
 public:
  stage_runner(const settings& s, std::filesystem::path folder,
               const std::vector<std::uint8_t>& text, const ssm::cpu::context& ctx)
      : settings_(s), folder_(std::move(folder)), text_(text), ctx_(ctx) {}

  /// Trains `m` in place. @throws interrupted  Ctrl-C; what was done is saved.
  curve run(const stage& st, const model& m) const {
    const auto done = folder_ / (st.file + ".done"), partial = folder_ / (st.file + ".checkpoint");
    const auto parameters = m.parameters();
    if (settings_.resume && std::filesystem::exists(done)) {
      const auto notes = ssm::load_parameters(done, parameters);
      return curve::from_text(notes.at("curve"));
    }
    const auto selection = ssm::select_parameters(parameters, ssm::any_of_patterns{st.trained});
    std::cerr << "\n== " << st.name << ": " << st.steps << " steps of " << settings_.tokens_per_step
              << " bytes\n"
              << ssm::to_string(selection);
    ssm::adamw<float> optimizer(selection.trained, {.weight_decay = 0.1});
    const ssm::token_spans source{std::span<const std::uint8_t>(text_)};
    ssm::data_loader loader(source,
                            {.sequence_length = settings_.sequence_length, .seed = settings_.seed});
    curve c;
    if (settings_.resume && std::filesystem::exists(partial)) {
      const ssm::run_state state = ssm::load_checkpoint(partial, parameters, optimizer);
      loader.restore(state.loader);
      c = curve::from_text(state.notes.at("curve"));
      std::cerr << "goes on after step " << optimizer.steps() << "\n";
    }
    const auto save = [&] {
      ssm::save_checkpoint(partial, parameters, optimizer,
                           {loader.state(), {}, {{"curve", c.text()}}});
    };
    progress bar(st.name, st.steps * settings_.tokens_per_step,
                 {.unit = "bytes", .first = optimizer.steps() * settings_.tokens_per_step});
    auto saved = std::chrono::steady_clock::now();
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
                      const auto now = std::chrono::steady_clock::now();
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
    ssm::save_parameters(done, parameters, {{"curve", c.text()}});
    std::filesystem::remove(partial);
    return c;
  }

 private:
  const settings& settings_;
  std::filesystem::path folder_;
  const std::vector<std::uint8_t>& text_;
  const ssm::cpu::context& ctx_;
};

}  // namespace demo
