#include "goals.hpp"

#include <ssmlib/kernels/cpu/gemm.hpp>

#include <csignal>
#include <memory>
#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#include <sys/prctl.h>
#endif
#include <sys/wait.h>

namespace bench {

namespace {

/// A process that spins on the first core that this one may use, for as long as it lives.
class neighbour {
 public:
  neighbour() : child_(fork()) {
    if (child_ != 0) return;
      // Only what is safe after a fork from a program with threads.
#if defined(__linux__)
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    cpu_set_t allowed, one;
    CPU_ZERO(&one);
    sched_getaffinity(0, sizeof allowed, &allowed);
    int core = 0;
    while (core < CPU_SETSIZE - 1 && !CPU_ISSET(core, &allowed))
      ++core;
    CPU_SET(core, &one);
    sched_setaffinity(0, sizeof one, &one);
#endif
    for (volatile unsigned spins = 0;;)
      spins = spins + 1;
  }
  ~neighbour() {
    if (child_ <= 0) return;
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
  }
  neighbour(const neighbour&) = delete;
  neighbour& operator=(const neighbour&) = delete;

 private:
  pid_t child_;
};

std::function<void()> product_of(index_t n, const ssm::cpu::context& ctx) {
  const auto a = filled<2>({n, n}, -1, 1, 1), b = filled<2>({n, n}, -1, 1, 2);
  const ssm::tensor<float, 2> c(n, n);
  return [=, &ctx] {
    ssm::kernels::gemm<float>(ctx, 1.0f, a.const_view(), b.const_view(), 0.0f, c.view());
  };
}

}  // namespace

goal_row at_least(std::string what, std::string goal_text, double goal, double measured,
                  std::string measured_text) {
  if (!(measured > 0)) return {std::move(what), std::move(goal_text), "-", verdict::not_measured};
  return {std::move(what), std::move(goal_text), std::move(measured_text),
          measured >= goal ? verdict::met : verdict::missed};
}
goal_row at_most(std::string what, std::string goal_text, double goal, double measured,
                 std::string measured_text) {
  if (!(measured > 0)) return {std::move(what), std::move(goal_text), "-", verdict::not_measured};
  return {std::move(what), std::move(goal_text), std::move(measured_text),
          measured <= goal ? verdict::met : verdict::missed};
}

double share_of(const session& s, const ceilings& c, const std::string& name) {
  const timing t = s.time_of(name);
  if (!t) return 0;
  const work w = s.find(name)->work;
  const double ceiling = c.of(w.unit);
  return ceiling > 0 ? w.amount / t.median / ceiling : 0;
}
std::string share_text(const session& s, const ceilings& c, const std::string& name) {
  return percent(share_of(s, c, name)) + " (" + digits(1e3 * s.time_of(name).median) + " ms)";
}

goal_row scaling_row(const session& s, const ceilings& c, const std::string& what,
                     const std::string& name) {
  const timing one = s.time_of(name + "/threads1"), all = s.time_of(name);
  const std::string text = ">= 0.95 of the GEMM's";
  if (!one || !all || !(c.gemm_1 > 0)) return at_least(what, text, 0.95, 0, "");
  const double gain = one.median / all.median, gemm = c.gemm_n / c.gemm_1;
  return at_least(what, text, 0.95, gain / gemm,
                  digits(gain / gemm) + " (" + digits(gain) + "x against " + digits(gemm) + "x)");
}

void add_neighbour_cases(
    session& s, const std::string& name,
    const std::function<std::function<void()>(const ssm::cpu::context&)>& make) {
  const auto make_disturbed = [&ctx = s.context(), make]() -> std::function<void()> {
    auto spinning = std::make_shared<neighbour>();
    return [spinning, body = make(ctx)] { body(); };
  };
  const auto make_alone = [&ctx = s.context(1), make] { return make(ctx); };
  const int repetitions = s.options().repetitions + 2;
  // Long enough to see the scheduler take turns.
  s.add({.name = name + "/neighbour",

         .prepare = make_disturbed,
         .repetitions = repetitions,
         .minimum_time = 0.1});
  s.add({.name = name + "/alone",

         .prepare = make_alone,
         .repetitions = repetitions,
         .minimum_time = 0.1});
}
goal_row neighbour_row(const session& s, const std::string& what, const std::string& name) {
  const timing disturbed = s.time_of(name + "/neighbour"), alone = s.time_of(name + "/alone");
  const double speed = disturbed && alone ? alone.median / disturbed.median : 0;
  return at_least(what, ">= 0.8 of one undisturbed thread", 0.8, speed, digits(speed));
}

goal_report add_gemm_goals(session& s) {
  add_neighbour_cases(s, "goal/gemm256",
                      [](const ssm::cpu::context& ctx) { return product_of(256, ctx); });
  return [](const session& done, const ceilings& c, std::vector<goal_row>& rows) {
    const double share = c.blas_n > 0 ? c.gemm_n / c.blas_n : 0;
    rows.push_back(at_least("GEMM 1024^3 against OpenBLAS, all threads", ">= 85 %", 0.85, share,
                            percent(share) + " (" + digits(c.gemm_n / 1e9) + " of " +
                                digits(c.blas_n / 1e9) + " GF/s)"));
    rows.push_back(neighbour_row(done, "GEMM 256^3 beside a busy neighbour", "goal/gemm256"));
  };
}

}  // namespace bench
