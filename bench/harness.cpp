#include "harness.hpp"

#include <ssmlib/tensor/random.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <regex>
#include <unistd.h>

namespace bench {

namespace {

/// Collects the seconds of every repetition; the tables are printed when all have run.
class collector final : public benchmark::BenchmarkReporter {
 public:
  explicit collector(std::map<std::string, std::vector<double>>& seconds) : seconds_(seconds) {}
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& r : runs) {
      if (r.run_type != Run::RT_Iteration || r.error_occurred) continue;
      seconds_[r.run_name.function_name].push_back(r.real_accumulated_time /
                                                   static_cast<double>(r.iterations));
    }
  }

 private:
  std::map<std::string, std::vector<double>>& seconds_;
};

/// Blocks beyond this many cached bytes would push other cases out of memory.
constexpr std::size_t large_cache = std::size_t{2} << 30;

void run_case(benchmark::State& state, const timed_case& c) {
  {
    const auto body = c.prepare();
    if (c.warm_up) body();
    for (auto _ : state)
      body();
  }
  if (c.clean_up) c.clean_up();
  auto& pool = ssm::cpu_memory_pool::instance();
  if (pool.stats().cached > large_cache) pool.trim();
  const char* names[] = {"", "flops", "exps", "bytes", "tokens"};
  if (c.work.unit != unit::none) {
    state.counters[names[static_cast<int>(c.work.unit)]] =
        benchmark::Counter(c.work.amount, benchmark::Counter::kIsIterationInvariantRate);
  }
}

/// One line on a terminal that says how far the run is.
class progress {
 public:
  explicit progress(std::size_t total) : total_(total), shown_(isatty(STDERR_FILENO) == 1) {}
  void show(const std::string& name) {
    ++done_;
    if (shown_) std::fprintf(stderr, "\r\033[K[%zu/%zu] %s", done_, total_, name.c_str());
  }
  void end() const {
    if (shown_) std::fprintf(stderr, "\r\033[K");
  }

 private:
  std::size_t total_, done_ = 0;
  bool shown_;
};

}  // namespace

session::session(const bench::options& o) : options_(o) {
  if (options_.threads == 0) options_.threads = ssm::cpu::context::default_threads();
  if (options_.repetitions == 0) options_.repetitions = options_.quick ? 3 : 5;
  if (options_.limit == 0) options_.limit = options_.quick ? 0.05 : 0.7;
  // Outputs of one run are reused by the next one, however large they are.
  ssm::cpu_memory_pool::instance().set_max_cached(std::size_t{8} << 30);
}

const ssm::cpu::context& session::context(int threads) {
  auto& c = contexts_[threads];
  if (!c) c = std::make_unique<ssm::cpu::context>(threads);
  return *c;
}

bool session::wants(const std::string& name) const {
  return options_.filter.empty() || std::regex_search(name, std::regex(options_.filter));
}

void session::add(timed_case c, bool always) {
  if (!always && !wants(c.name)) return;
  if (c.repetitions == 0) c.repetitions = options_.repetitions;
  if (options_.quick) c.minimum_time = std::min(c.minimum_time, 0.01);
  cases_.push_back(std::move(c));
}

void session::run() {
  std::size_t total = 0;
  double expected = 0;
  for (const timed_case& c : cases_) {
    total += static_cast<std::size_t>(c.repetitions);
    expected += c.repetitions * (c.warm_up ? 2 : 1) * std::max(c.seconds, c.minimum_time);
  }
  std::fprintf(stderr, "%zu cases, %zu repetitions in shuffled order, about %.0f s\n",
               cases_.size(), total, expected);
  progress bar(total);
  for (const timed_case& c : cases_) {
    auto last = std::make_shared<index_t>(0);
    benchmark::RegisterBenchmark(c.name.c_str(),
                                 [&c, &bar, last](benchmark::State& state) {
                                   // Repeated calls to find the number of iterations count once.
                                   if (state.max_iterations <= *last || *last == 0)
                                     bar.show(c.name);
                                   *last = state.max_iterations;
                                   run_case(state, c);
                                 })
        ->Repetitions(c.repetitions)
        ->MinTime(c.minimum_time)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
  collector reporter(seconds_);
  benchmark::RunSpecifiedBenchmarks(&reporter);
  benchmark::Shutdown();
  bar.end();
}

timing session::time_of(const std::string& name) const {
  const auto found = seconds_.find(name);
  if (found == seconds_.end() || found->second.empty()) return {};
  std::vector<double> s = found->second;
  std::sort(s.begin(), s.end());
  const std::size_t n = s.size();
  return {n % 2 == 1 ? s[n / 2] : (s[n / 2 - 1] + s[n / 2]) / 2, s.front(), s.back()};
}

const timed_case* session::find(const std::string& name) const {
  for (const timed_case& c : cases_) {
    if (c.name == name) return &c;
  }
  return nullptr;
}

bool initialize_benchmark(std::vector<std::string>& arguments) {
  arguments.insert(arguments.begin() + 1, "--benchmark_enable_random_interleaving=true");
  std::vector<char*> argv;
  for (std::string& a : arguments)
    argv.push_back(a.data());
  argv.push_back(nullptr);
  int argc = static_cast<int>(arguments.size());
  benchmark::Initialize(&argc, argv.data());
  return !benchmark::ReportUnrecognizedArguments(argc, argv.data());
}

double seconds_of(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <int R>
ssm::tensor<float, R> filled(const ssm::shape<R>& extents, double low, double high,
                             std::uint64_t seed) {
  constexpr index_t block = 40009;  // prime, so that rows and heads do not repeat
  ssm::tensor<float, R> t(extents);
  const auto numbers = ssm::uniform<float, 1>({std::min(block, t.size())}, low, high, seed);
  for (index_t i = 0; i < t.size(); i += block) {
    std::memcpy(t.data() + i, numbers.data(),
                static_cast<std::size_t>(std::min(block, t.size() - i)) * sizeof(float));
  }
  return t;
}
template ssm::tensor<float, 1> filled(const ssm::shape<1>&, double, double, std::uint64_t);
template ssm::tensor<float, 2> filled(const ssm::shape<2>&, double, double, std::uint64_t);
template ssm::tensor<float, 3> filled(const ssm::shape<3>&, double, double, std::uint64_t);
template ssm::tensor<float, 4> filled(const ssm::shape<4>&, double, double, std::uint64_t);

std::string digits(double x, int n) {
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", n, x);
  if (std::strchr(text, 'e') != nullptr) std::snprintf(text, sizeof text, "%.0f", x);
  return text;
}
std::string percent(double share) {
  char text[40];
  std::snprintf(text, sizeof text, share < 0.0995 ? "%.1f %%" : "%.0f %%", 100 * share);
  return text;
}

}  // namespace bench
