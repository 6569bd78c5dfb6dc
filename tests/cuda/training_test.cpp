#include "support/catch.hpp"
#include "support/gradient_check.hpp"
#include <ssmlib/cuda.hpp>
#include <ssmlib/io.hpp>
#include <ssmlib/ssmlib.hpp>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using namespace ssm;

constexpr index_t vocabulary = 61;

model_config small_config(const std::string& pattern) {
  model_config c{.vocabulary = vocabulary, .width = 48, .pattern = pattern};
  c.attention.heads = 4;
  c.attention.kv_heads = 2;
  c.attention.rope = rope_options{};
  c.mamba2.heads = 4;
  c.mamba2.head_dim = 24;
  c.mamba2.state = 16;
  c.mamba2.groups = 2;
  return c;
}

/// These models are too small for threads.
const cpu::context& one_thread() {
  static const cpu::context ctx(1);
  return ctx;
}

/// Tokens that depend on the one before them.
std::vector<std::int32_t> some_tokens(index_t n) {
  philox random(3);
  std::vector<std::int32_t> tokens{1};
  while (static_cast<index_t>(tokens.size()) < n) {
    tokens.push_back(static_cast<std::int32_t>((3 * tokens.back() + random.below(4)) % vocabulary));
  }
  return tokens;
}

/// A model with its optimiser and data, on any backend.
template <class T, class B>
struct small_run {
  explicit small_run(std::uint64_t seed) : model(small_config("M*-"), seed) {}

  void train_to(index_t steps, std::function<void(const step_info&)> on_step,
                const typename B::context& ctx = default_context<B>()) {
    train(
        optimizer, loader,
        [&](const pass<T, B>& p, const token_batch& b) { return next_token_loss(model, p, b); },
        {.steps = steps,
         .tokens_per_step = 8 * 33,
         .learning_rate = 3e-3,
         .schedule = cosine_schedule{.steps = 12, .warmup = 2},
         .micro_batch = 3},
        {.on_step = std::move(on_step)}, ctx);
  }
  /// The parameters and moments, on the host.
  [[nodiscard]] std::vector<tensor<accum_t<T>, 1>> numbers() const {
    std::vector<tensor<accum_t<T>, 1>> all;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      all.push_back(ssm::detail::on_host(parameters[i].value));
      all.push_back(ssm::detail::on_host(optimizer.first_moments()[i]));
      all.push_back(ssm::detail::on_host(optimizer.second_moments()[i]));
    }
    return all;
  }

  language_model<T, B> model;
  std::vector<std::int32_t> tokens = some_tokens(4000);
  token_spans<std::int32_t> spans{std::span<const std::int32_t>(tokens)};
  data_loader<token_spans<std::int32_t>> loader{spans, {.sequence_length = 33, .seed = 2}};
  std::vector<parameter<T, B>> parameters = model.parameters();
  adamw<T, B> optimizer{parameters};
};

template <class T, class B>
std::vector<step_info> steps_of_training(index_t steps, const typename B::context& ctx) {
  small_run<T, B> run(1);
  std::vector<step_info> all;
  run.train_to(
      steps, [&](const step_info& i) { all.push_back(i); }, ctx);
  return all;
}

/// The largest relative difference of the losses and of the gradients' norms.
std::pair<double, double> differences(const std::vector<step_info>& a,
                                      const std::vector<step_info>& wanted) {
  std::pair<double, double> worst{a.size() == wanted.size() ? 0.0 : 1e300, 0.0};
  for (std::size_t i = 0; i < a.size() && i < wanted.size(); ++i) {
    worst.first = std::max(worst.first, std::abs(a[i].loss / wanted[i].loss - 1));
    worst.second =
        std::max(worst.second, std::abs(a[i].gradient_norm / wanted[i].gradient_norm - 1));
  }
  return worst;
}

token_batch batch_of(std::vector<index_t> lengths, index_t first) {
  const auto tokens = some_tokens(1000);
  std::vector<std::vector<std::int32_t>> documents;
  for (const index_t n : lengths) {
    documents.emplace_back(tokens.begin() + first, tokens.begin() + first + n);
    first += n;
  }
  return pack_documents(documents);
}

/// A loss of two models, and the gradient of the second's parameters.
template <class T, class B, class F>
std::vector<tensor<double, 1>> loss_and_gradients(F loss, const typename B::context& ctx) {
  const language_model<T, B> fixed(small_config("*-"), 1), trained(small_config("M-"), 2);
  tape<T, B> t;
  const auto parameters = trained.parameters();
  for (const auto& p : parameters)
    t.watch(p.value);
  const auto l = loss(fixed, trained, pass<T, B>{ctx, &t, false});
  t.gradient(l.sum).fill(accum_t<T>(1));
  t.backward();
  std::vector<tensor<double, 1>> all{cast<double>(ssm::detail::on_host(l.sum))};
  for (const auto& p : parameters)
    all.push_back(cast<double>(ssm::detail::on_host(t.gradient(p.value))));
  return all;
}

template <class T, class F>
double largest_error(F loss) {
  const auto got = loss_and_gradients<T, cuda>(loss, default_context<cuda>()),
             wanted = loss_and_gradients<double, cpu>(loss, one_thread());
  double worst = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i)
    worst = std::max(worst, ssm_test::relative_error(got[i], wanted[i]));
  return worst;
}

}  // namespace

// The models start alike, then rounding grows with every step: AdamW divides by small moments.
TEST_CASE("cuda/training: a hybrid's training takes the CPU's course", "[cuda][training]") {
  const auto& gpu = default_context<cuda>();
  const auto wanted = steps_of_training<float, cpu>(8, one_thread());
  CHECK(wanted.back().loss < wanted.front().loss - 0.2);
  const auto [loss, norm] = differences(steps_of_training<float, cuda>(8, gpu), wanted);
  CHECK(loss < 1e-4);
  CHECK(norm < 1e-3);
  const auto [loss16, norm16] = differences(steps_of_training<bf16, cuda>(8, gpu), wanted);
  CHECK(loss16 < 1e-2);
  CHECK(norm16 < 5e-2);
}

TEST_CASE("cuda/training: a run that is resumed from a checkpoint goes on to the same bits",
          "[cuda][training]") {
  const auto path = std::filesystem::temp_directory_path() /
                    ("ssmlib_cuda_checkpoint_" + std::to_string(::getpid()) + ".safetensors");
  small_run<bf16, cuda> whole(1);
  std::vector<double> losses;
  whole.train_to(8, [&](const step_info& i) {
    losses.push_back(i.loss);
    if (i.step == 3) {
      save_checkpoint(path, whole.parameters, whole.optimizer, {whole.loader.state(), {}, {}});
    }
  });
  small_run<bf16, cuda> resumed(99);
  resumed.loader.restore(load_checkpoint(path, resumed.parameters, resumed.optimizer).loader);
  CHECK(resumed.optimizer.steps() == 4);
  resumed.train_to(
      8, [&](const step_info& i) { CHECK(i.loss == losses[static_cast<std::size_t>(i.step)]); });
  const auto a = resumed.numbers(), b = whole.numbers();
  for (std::size_t i = 0; i < a.size(); ++i)
    CHECK(ssm_test::same_bits(a[i], b[i]));
  std::filesystem::remove(path);
}

TEST_CASE("cuda/training: parameters go from a GPU's model through a file to a CPU's and back",
          "[cuda][training]") {
  const auto path = std::filesystem::temp_directory_path() /
                    ("ssmlib_cuda_parameters_" + std::to_string(::getpid()) + ".safetensors");
  const small_run<bf16, cuda> first(1);
  save_parameters(path, first.parameters);
  const small_run<float, cpu> second(2);
  (void)load_parameters(path, second.parameters);
  save_parameters(path, second.parameters);
  const small_run<float, cuda> third(3);
  (void)load_parameters(path, third.parameters);
  const auto a = first.numbers(), b = third.numbers();
  for (std::size_t i = 0; i < a.size(); ++i)
    CHECK(ssm_test::same_bits(a[i], b[i]));
  std::filesystem::remove(path);
}

TEST_CASE("cuda/training: distillation and preference losses of models are the CPU's",
          "[cuda][training]") {
  const auto batch = batch_of({17, 2, 61}, 0), chosen = batch_of({9, 30}, 100),
             rejected = batch_of({31, 5}, 200);
  const auto distil = [&](const auto& fixed, const auto& trained, const auto& p) {
    return distillation_loss(fixed, trained, p, batch, {.temperature = 2.0});
  };
  const auto prefer = [&](const auto& fixed, const auto& trained, const auto& p) {
    // The reference is another model of the same kind as the policy.
    return dpo_loss(trained, fixed, p, chosen, rejected, 0.05);
  };
  // Gradients of A_log and dt_bias are sums that cancel.
  CHECK(largest_error<float>(distil) < 1e-4);
  CHECK(largest_error<float>(prefer) < 1e-4);
  CHECK(largest_error<double>(distil) < 1e-10);
  CHECK(largest_error<double>(prefer) < 1e-10);
}
