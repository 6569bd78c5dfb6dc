#pragma once

#include <ssmlib/backend/cpu.hpp>
#include <ssmlib/tensor/tensor.hpp>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace bench {

using ssm::index_t;

/// What the time of a case is compared with.
enum class unit { none, flops, exps, bytes, tokens };

/// A number of operations that is fixed by the problem, whatever the implementation does.
struct work {
  double amount = 0;
  bench::unit unit = unit::none;
};

/// One thing to time. `prepare` makes the operands and returns what is timed; both happen anew in
/// every repetition, so that no case keeps memory while others run.
struct timed_case {
  std::string name;  ///< "ssd/chunked/forward/T2048"
  bench::work work = {};
  std::function<std::function<void()>()> prepare;
  bool warm_up = true;         ///< one untimed run first, which also fills the memory pool
  int repetitions = 0;         ///< 0: as many as the options say
  double seconds = 0;          ///< what a run is expected to take; 0: not known
  double minimum_time = 0.03;  ///< a repetition runs as often as this many seconds take
  /// Runs after each repetition, for what leaves threads or processes behind.
  std::function<void()> clean_up = {};
};

/// A row of the sweep's table: a mixer by an algorithm in a direction, over lengths.
struct series {
  std::string mixer, algorithm, direction, shape;
  std::vector<index_t> lengths;   ///< that are measured
  std::vector<index_t> left_out;  ///< that would take too long
  [[nodiscard]] std::string name(index_t length) const {
    return mixer + "/" + algorithm + "/" + direction + "/T" + std::to_string(length);
  }
};

/// The algorithms of a mixer at one length, and which of them alg::automatic takes.
struct crossover {
  std::string mixer, shape;
  index_t length;
  std::vector<std::string> algorithms;
  std::string chosen;
  [[nodiscard]] std::string name(const std::string& algorithm) const {
    return "crossover/" + mixer + "/" + algorithm + "/T" + std::to_string(length);
  }
};

struct options {
  bool quick = false;
  bool list = false;
  std::string filter;    ///< a regular expression; the ceilings are measured in any case
  std::string markdown;  ///< a file for the tables, or empty
  int threads = 0;       ///< 0: all
  int repetitions = 0;   ///< 0: 5, or 3 with quick
  double limit = 0;      ///< seconds a run of the sweep may take; 0: 0.7, or 0.05 with quick
  std::string command = "./dev bench";
};

/// Seconds a run, over the repetitions.
struct timing {
  double median = 0, least = 0, most = 0;
  explicit operator bool() const { return median > 0; }
};

/// The cases of a run and, afterwards, their timings.
class session {
 public:
  explicit session(const bench::options& o);

  [[nodiscard]] const bench::options& options() const { return options_; }
  /// A context with this many threads, made once.
  [[nodiscard]] const ssm::cpu::context& context(int threads);
  /// The context of the run.
  [[nodiscard]] const ssm::cpu::context& context() { return context(options_.threads); }

  [[nodiscard]] bool wants(const std::string& name) const;
  /// Adds a case if the filter wants it, or if it is a ceiling.
  void add(timed_case c, bool always = false);
  void add(bench::series s) { series_.push_back(std::move(s)); }
  void add(bench::crossover c) { crossovers_.push_back(std::move(c)); }

  /// Runs all repetitions of all cases in one shuffled order, through Google Benchmark.
  void run();

  [[nodiscard]] timing time_of(const std::string& name) const;
  [[nodiscard]] const timed_case* find(const std::string& name) const;
  [[nodiscard]] const std::vector<timed_case>& cases() const { return cases_; }
  [[nodiscard]] const std::vector<bench::series>& all_series() const { return series_; }
  [[nodiscard]] const std::vector<crossover>& crossovers() const { return crossovers_; }

 private:
  bench::options options_;
  std::vector<timed_case> cases_;
  std::vector<bench::series> series_;
  std::vector<crossover> crossovers_;
  std::map<std::string, std::vector<double>> seconds_;
  std::map<int, std::unique_ptr<ssm::cpu::context>> contexts_;
};

/// Gives Google Benchmark its part of the command line, which must outlive the run.
/// @return false if there is more than it knows; it has said so then.
[[nodiscard]] bool initialize_benchmark(std::vector<std::string>& arguments);

/// Seconds of one call.
[[nodiscard]] double seconds_of(const std::function<void()>& f);

/// A tensor of pseudo-random elements in [low, high): a block of numbers, repeated. Millions of
/// independent draws would take longer than what is measured.
template <int R>
[[nodiscard]] ssm::tensor<float, R> filled(const ssm::shape<R>& extents, double low, double high,
                                           std::uint64_t seed);

/// "1.23" with so many significant digits.
[[nodiscard]] std::string digits(double x, int n = 3);
[[nodiscard]] std::string percent(double share);

extern template ssm::tensor<float, 1> filled(const ssm::shape<1>&, double, double, std::uint64_t);
extern template ssm::tensor<float, 2> filled(const ssm::shape<2>&, double, double, std::uint64_t);
extern template ssm::tensor<float, 3> filled(const ssm::shape<3>&, double, double, std::uint64_t);
extern template ssm::tensor<float, 4> filled(const ssm::shape<4>&, double, double, std::uint64_t);

}  // namespace bench
