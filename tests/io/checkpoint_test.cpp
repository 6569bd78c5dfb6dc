#include "../train/bigram_model.hpp"
#include <ssmlib/io.hpp>
#include <ssmlib/train/selection.hpp>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <support/catch.hpp>
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>

namespace {

using namespace ssm;
using ssm_test::bigram_model;
using ssm_test::contains;
using ssm_test::training_bits;
namespace fs = std::filesystem;

struct temporary_folder {
  temporary_folder() {
    std::string name = (fs::temp_directory_path() / "ssmlib-checkpoint-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw io_error("no temporary folder");
    path = name;
  }
  ~temporary_folder() { fs::remove_all(path); }
  [[nodiscard]] index_t file_count() const {
    return std::distance(fs::directory_iterator(path), fs::directory_iterator());
  }
  fs::path path;
};

std::string content_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

constexpr index_t run_steps = 40;
constexpr index_t vocabulary = 150;  // the table is more than one task of AdamW

/// A run that saves after every step: a frozen bias, a trained table, and a loss that masks tokens
/// at random.
class saving_run {
 public:
  /// Goes on from the file where there is one.
  explicit saving_run(const fs::path& file)
      : file_(file),
        // What is not restored shows: a resumed model starts from other numbers.
        model_(vocabulary, fs::exists(file) ? 1000 : 1),
        all_(parameters_of<float>(model_)),
        tokens_(ssm_test::chain_tokens(900, vocabulary, 5)),
        loader_(ssm_test::one_shard(tokens_), {.sequence_length = 10, .seed = ~std::uint64_t{2}}),
        optimizer_(select_parameters(all_, any_of_patterns{{"table"}}).trained),
        noise_(7) {
    if (!fs::exists(file)) return;
    const run_state state = load_checkpoint(file, all_, optimizer_);
    loader_.restore(state.loader);
    noise_ = philox(state.generators.at("noise"));
  }

  void train_to(index_t steps, int threads) {
    const cpu::context ctx(threads);
    const auto loss = [this](const pass<float>& p, const token_batch& b) {
      for (index_t i = 0; i < b.targets.size(); ++i) {
        if (noise_.uniform() < 0.2) b.targets.data()[i] = 0;
      }
      return model_.loss(p, b);
    };
    ssm::train(optimizer_, loader_, loss,
               {.steps = steps,
                .tokens_per_step = 70,
                .learning_rate = 0.05,
                .schedule = cosine_schedule{.steps = run_steps, .warmup = 4},
                .micro_batch = 3},
               {.on_step = [this](const step_info&) { save(); }}, ctx);
  }
  void save() const {
    save_checkpoint(file_, all_, optimizer_,
                    {loader_.state(), {{"noise", noise_.where()}}, {{"stage", "1"}}});
  }
  [[nodiscard]] std::string bits() const { return training_bits(optimizer_); }
  [[nodiscard]] index_t steps() const { return optimizer_.steps(); }

 private:
  fs::path file_;
  bigram_model<float> model_;
  std::vector<parameter<float>> all_;
  std::vector<std::int32_t> tokens_;
  data_loader<token_spans<std::int32_t>> loader_;
  adamw<float> optimizer_;
  philox noise_;
};

/// The file of a run that nobody has disturbed.
std::string undisturbed(int threads) {
  const temporary_folder folder;
  saving_run run(folder.path / "a");
  run.train_to(run_steps, threads);
  return content_of(folder.path / "a");
}

/// The file's step, read as a user would: a whole checkpoint or an exception.
index_t saved_steps(const fs::path& file) {
  const saving_run run(file);
  return run.steps();
}

/// A process of its own that runs the hidden test case below.
class child {
 public:
  child(const fs::path& file, int threads, index_t largest_file = -1) {
    const std::string thread_text = std::to_string(threads);
    const std::string limit_text = std::to_string(largest_file);
    id_ = ::fork();
    if (id_ != 0) return;
    ::setenv("SSMLIB_CHILD_FILE", file.c_str(), 1);
    ::setenv("SSMLIB_CHILD_THREADS", thread_text.c_str(), 1);
    ::setenv("SSMLIB_CHILD_LIMIT", limit_text.c_str(), 1);
    (void)!std::freopen("/dev/null", "w", stdout);
    ::execl("/proc/self/exe", "child", "[checkpoint_child]", nullptr);
    ::_exit(99);
  }
  void kill() const { ::kill(id_, SIGKILL); }
  /// The status of waitpid.
  [[nodiscard]] int wait() const {
    int status = 0;
    while (::waitpid(id_, &status, 0) < 0 && errno == EINTR) {
    }
    return status;
  }

 private:
  pid_t id_ = -1;
};

}  // namespace

TEST_CASE("io/checkpoint: child process", "[.][checkpoint_child]") {
  const char* file = std::getenv("SSMLIB_CHILD_FILE");
  if (file == nullptr) return;
  const auto number = [](const char* name) { return std::atoll(std::getenv(name)); };
  saving_run run(file);
  if (number("SSMLIB_CHILD_LIMIT") >= 0) {
    // At the limit the system kills the process, in the middle of a write.
    const rlimit none{0, 0};
    ::setrlimit(RLIMIT_CORE, &none);
    const auto bytes = static_cast<rlim_t>(number("SSMLIB_CHILD_LIMIT"));
    const rlimit limited{bytes, bytes};
    ::setrlimit(RLIMIT_FSIZE, &limited);
  }
  run.train_to(run_steps, static_cast<int>(number("SSMLIB_CHILD_THREADS")));
  CHECK(run.steps() == run_steps);
}

TEST_CASE("io/checkpoint: 1 and 2 threads end in the same file", "[io][checkpoint][threads]") {
  const std::string expected = undisturbed(1);
  CHECK(expected.size() > 3 * vocabulary * vocabulary * sizeof(float));
  CHECK(undisturbed(2) == expected);
}

TEST_CASE("io/checkpoint: a run resumed at every step ends in the same file", "[io][checkpoint]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  for (index_t step = 1; step <= run_steps; ++step) {
    saving_run run(file);
    run.train_to(step, 1);
  }
  CHECK(content_of(file) == undisturbed(1));
}

TEST_CASE("io/checkpoint: a run killed at random points ends in the same file",
          "[io][checkpoint][threads]") {
  const std::string expected = undisturbed(1);
  for (const int variant : {1, 2, 3}) {  // 1 thread, 2 threads, by turns
    const temporary_folder folder;
    const fs::path file = folder.path / "a";
    philox random(static_cast<std::uint64_t>(variant));
    index_t kills = 0, last = 0;
    double patience = 0.005;  // seconds; grows where a child does not get anywhere
    bool finished = false;
    for (index_t turn = 0; turn < 1000 && !finished; ++turn) {
      const child process(file, variant < 3 ? variant : 1 + static_cast<int>(turn % 2));
      std::this_thread::sleep_for(std::chrono::duration<double>(random.uniform(0, patience)));
      process.kill();
      const int status = process.wait();
      finished = WIFEXITED(status);
      if (finished) REQUIRE(WEXITSTATUS(status) == 0);
      kills += finished ? 0 : 1;
      if (!fs::exists(file)) {
        patience *= 1.2;
        continue;
      }
      const index_t now = saved_steps(file);
      REQUIRE(now >= last);
      if (now == last) patience *= 1.2;
      last = now;
    }
    INFO("kills: " << kills);
    REQUIRE(finished);
    CHECK(kills >= 3);
    CHECK(content_of(file) == expected);
  }
}

TEST_CASE("io/checkpoint: a process that dies while saving leaves the file of the save before",
          "[io][checkpoint]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  const std::string expected = undisturbed(1);
  {
    saving_run run(file);
    run.train_to(15, 1);
  }
  const std::string before = content_of(file);
  const auto size = static_cast<index_t>(before.size());
  for (const index_t limit : {index_t{0}, index_t{5}, index_t{700}, size / 2, size - 1}) {
    const child process(file, 1, limit);
    const int status = process.wait();
    REQUIRE(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGXFSZ);
    CHECK(content_of(file) == before);
    CHECK(folder.file_count() == 2);  // its own and what this process left; older ones are gone
  }
  const child process(file, 2);
  CHECK(process.wait() == 0);
  CHECK(content_of(file) == expected);
  CHECK(folder.file_count() == 1);
}

TEST_CASE("io/checkpoint: a full disk is an error and leaves the old file", "[io][checkpoint]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  saving_run run(file);
  run.train_to(3, 1);
  const std::string before = content_of(file);

  std::signal(SIGXFSZ, SIG_IGN);  // a write at the limit then fails like one to a full disk
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  const rlimit limited{before.size() / 2, old.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limited);
  std::string message;
  try {
    run.train_to(6, 1);
  } catch (const io_error& e) {
    message = e.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, SIG_DFL);

  CHECK(message.find("writing '" + file.string() + "'") != std::string::npos);
  CHECK(content_of(file) == before);
  CHECK(folder.file_count() == 1);
  run.train_to(run_steps, 1);  // the run itself has lost nothing
  CHECK(content_of(file) == undisturbed(1));
}

TEST_CASE("io/checkpoint: notes, generators and the loader's state come back", "[io][checkpoint]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  const bigram_model<double> model(6);
  const auto all = parameters_of<double>(model);
  adamw<double> optimizer(all);
  philox noise(~std::uint64_t{0}, 3);
  for (int i = 0; i < 7; ++i)
    (void)noise.bits();
  const run_state saved{{2, 5, ~std::uint64_t{1}, 8, 11},
                        {{"noise", noise.where()}, {"b", {1, 2, 3}}},
                        {{"stage", "2 \"x\"\n"}}};
  save_checkpoint(file, all, optimizer, saved);
  const run_state loaded = load_checkpoint(file, all, optimizer);
  CHECK(loaded.loader == saved.loader);
  CHECK(loaded.generators == saved.generators);
  CHECK(loaded.notes == saved.notes);
  philox resumed(loaded.generators.at("noise"));
  for (int i = 0; i < 9; ++i)
    CHECK(resumed.bits() == noise.bits());
}

TEST_CASE("io/checkpoint: a file of another run is refused and changes nothing",
          "[io][checkpoint][error]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  const bigram_model<float> model(6), wider(7);
  const bigram_model<double> doubles(6);
  const auto all = parameters_of<float>(model);
  adamw<float> whole(all);
  save_checkpoint(file, all, whole, {});

  const auto other = parameters_of<float>(wider);
  adamw<float> other_optimizer(other);
  const std::string bits = training_bits(other_optimizer);
  CHECK_THROWS_WITH(load_checkpoint(file, other, other_optimizer),
                    contains("tensor 'model.table' is F32 (6 x 6), this run's is F32 (7 x 7)"));
  CHECK(training_bits(other_optimizer) == bits);

  adamw<double> double_optimizer(parameters_of<double>(doubles));
  CHECK_THROWS_WITH(load_checkpoint(file, parameters_of<double>(doubles), double_optimizer),
                    contains("is F32 (6 x 6), this run's is F64 (6 x 6)"));

  adamw<float> table_only({all[0]});
  CHECK_THROWS_WITH(
      load_checkpoint(file, all, table_only),
      contains("it has the tensor 'adamw.first.bias'") && contains("which this run has not"));
  save_checkpoint(file, all, table_only, {});
  CHECK_THROWS_WITH(load_checkpoint(file, all, whole),
                    contains("it has no tensor 'adamw.first.bias'"));
}

TEST_CASE("io/checkpoint: what is no checkpoint is refused", "[io][checkpoint][error]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  const bigram_model<float> model(6);
  const auto all = parameters_of<float>(model);
  adamw<float> optimizer(all);
  CHECK_THROWS_AS(load_checkpoint(file, all, optimizer), io_error);  // there is none
  safetensors_writer writer;
  writer.add("model.table", model.table);
  writer.write(file);
  CHECK_THROWS_WITH(load_checkpoint(file, all, optimizer), contains("its format is 'none'"));
  save_checkpoint(file, all, optimizer, {});
  fs::resize_file(file, fs::file_size(file) - 1);
  CHECK_THROWS_AS(load_checkpoint(file, all, optimizer), io_error);
}

TEST_CASE("io/checkpoint: saving removes what dead processes left and nothing else",
          "[io][checkpoint]") {
  const temporary_folder folder;
  const fs::path file = folder.path / "a";
  const child gone(folder.path / "b", 1, 0);
  (void)gone.wait();  // "b" is never written, its part stays
  REQUIRE(folder.file_count() == 1);
  const fs::path part = fs::directory_iterator(folder.path)->path();
  const std::string id_and_count = part.filename().string().substr(std::string("b.part.").size());
  const fs::path abandoned = folder.path / ("a.part." + id_and_count);
  const fs::path alive = folder.path / ("a.part." + std::to_string(::getpid()) + ".999");
  std::ofstream(abandoned) << "x";
  std::ofstream(alive) << "x";
  std::ofstream(folder.path / "a.part.txt") << "x";
  remove_abandoned_parts(file);
  CHECK_FALSE(fs::exists(abandoned));
  CHECK(fs::exists(alive));
  CHECK(fs::exists(folder.path / "a.part.txt"));
  CHECK(fs::exists(part));
}
