#include "ceilings.hpp"
#include "goals.hpp"
#include "harness.hpp"
#include "report.hpp"
#include "sweep.hpp"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>

namespace {

constexpr const char* usage =
    R"(usage: ./dev bench [OPTIONS] [GOOGLE BENCHMARK OPTIONS]
Measures this machine's ceilings, every mixer by every algorithm, and the goals of
docs/performance.md, in one shuffled order; about 6 minutes.

  --quick            a few seconds a part: short sequences, 3 repetitions; not for reports
  --filter=REGEX     only cases whose name matches: "^goal/", "^ssd/", "/T2048$"; --list shows names
  --list             the names of all cases and their expected seconds, and nothing is measured
  --markdown=FILE    the tables also as Markdown, as docs/performance.md holds them
  --threads=N        default: SSMLIB_THREADS, else all cores
  --repetitions=N    default: 5
  --limit=SECONDS    a run of the sweep that takes longer is left out; default: 0.7
  --help             this text

  --benchmark_out=FILE --benchmark_out_format=json   every repetition as JSON
)";

/// The value of --name=value or of --name value.
bool take(std::vector<std::string>& arguments, std::size_t i, const std::string& name,
          std::string& value) {
  if (arguments[i].rfind(name + "=", 0) == 0) {
    value = arguments[i].substr(name.size() + 1);
  } else if (arguments[i] == name && i + 1 < arguments.size()) {
    value = arguments[i + 1];
    arguments.erase(arguments.begin() + static_cast<std::ptrdiff_t>(i) + 1);
  } else {
    return false;
  }
  arguments.erase(arguments.begin() + static_cast<std::ptrdiff_t>(i));
  return true;
}

bench::options parse(std::vector<std::string>& arguments) {
  bench::options o;
  for (std::size_t i = 1; i < arguments.size(); ++i)
    o.command += " " + arguments[i];
  for (std::size_t i = 1; i < arguments.size();) {
    std::string value;
    if (arguments[i] == "--help" || arguments[i] == "-h") {
      std::cout << usage;
      std::exit(0);
    } else if (arguments[i] == "--quick" || arguments[i] == "--list") {
      (arguments[i] == "--quick" ? o.quick : o.list) = true;
      arguments.erase(arguments.begin() + static_cast<std::ptrdiff_t>(i));
    } else if (take(arguments, i, "--filter", o.filter) ||
               take(arguments, i, "--markdown", o.markdown)) {
    } else if (take(arguments, i, "--threads", value)) {
      o.threads = std::stoi(value);
    } else if (take(arguments, i, "--repetitions", value)) {
      o.repetitions = std::stoi(value);
    } else if (take(arguments, i, "--limit", value)) {
      o.limit = std::stod(value);
    } else {
      ++i;  // Google Benchmark refuses what it does not know
    }
  }
  return o;
}

int run(std::vector<std::string> arguments) {
  bench::session s(parse(arguments));
  if (!bench::initialize_benchmark(arguments)) return 2;
  bench::add_ceilings(s);
  const bench::goal_report goals[] = {bench::add_gemm_goals(s),      bench::add_ssd_goals(s),
                                      bench::add_attention_goals(s), bench::add_selective_goals(s),
                                      bench::add_training_goals(s),  bench::add_decoding_goals(s),
                                      bench::add_toeplitz_goals(s)};
  std::cerr << "probing how long the mixers take\n";
  for (auto* sweep :
       {bench::sweep_attention, bench::sweep_linear, bench::sweep_ssd, bench::sweep_selective,
        bench::sweep_gated, bench::sweep_toeplitz, bench::add_crossovers})
    sweep(s);
  if (s.options().list) {
    for (const auto& c : s.cases())
      std::cout << c.name << "  " << bench::digits(c.seconds) << " s\n";
    return 0;
  }
  s.run();
  const bench::ceilings c = bench::measured_ceilings(s);
  std::vector<bench::goal_row> rows;
  for (const auto& report : goals)
    report(s, c, rows);
  bench::print_report(s, c, rows);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv, argv + argc});
  } catch (const std::exception& e) {
    std::cerr << "ssmlib_bench: " << e.what() << "\n";
    return 1;
  }
}
