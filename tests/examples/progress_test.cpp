#include "../../examples/distill/progress.hpp"

#include "../support/catch.hpp"

#include <limits>
#include <sstream>
#include <string>

namespace {

// A progress display that writes to a string and takes its time from a variable.
struct display {
  double now = 100.0;
  std::ostringstream out;

  demo::progress_options options(bool terminal) {
    demo::progress_options o;
    o.terminal = terminal;
    o.stream = &out;
    o.clock = [this] { return now; };
    return o;
  }
};

}  // namespace

TEST_CASE("examples/progress: plain lines come every so many seconds and once at the end",
          "[examples][progress]") {
  display d;
  demo::progress p("teacher", 1000, d.options(false));
  for (int i = 1; i <= 40; ++i) {
    d.now += 1;
    p.update(i * 25, 2.5);
  }
  p.finish();
  CHECK(d.out.str() ==
        "teacher  37 %  loss 2.5000  25.0 bytes/s  25 s left\n"
        "teacher  75 %  loss 2.5000  25.0 bytes/s  10 s left\n"
        "teacher  100 %  loss 2.5000  25.0 bytes/s  took 40 s\n");
}

TEST_CASE("examples/progress: a terminal line is drawn over the last one", "[examples][progress]") {
  display d;
  {
    demo::progress p("stage 1", 10, d.options(true));
    d.now += 2;
    p.update(1);
    d.now += 0.01;
    p.update(2);  // too soon to be drawn
    d.now += 1.99;
    p.update(5);
    CHECK(d.out.str() ==
          "\rstage 1  10 %  0.50 bytes/s  18 s left\x1b[K"
          "\rstage 1  50 %  1.25 bytes/s  4 s left\x1b[K");
  }
  CHECK(d.out.str().back() == '\n');
}

TEST_CASE("examples/progress: finishing twice shows one last line", "[examples][progress]") {
  display d;
  {
    demo::progress p("s", 10, d.options(true));
    p.finish();
    p.finish();
    p.update(3);
  }
  CHECK(d.out.str() == "\rs  0 %  took 0 s\x1b[K\n");
}

TEST_CASE("examples/progress: a resumed stage counts only its own work in the rate",
          "[examples][progress]") {
  display d;
  auto options = d.options(false);
  options.first = 500;
  options.unit = "tokens";
  demo::progress p("s", 1000, options);
  d.now += 20;
  p.update(600);
  CHECK(d.out.str() == "s  60 %  5.00 tokens/s  1:20 left\n");
}

TEST_CASE("examples/progress: a loss that is not a number is left out", "[examples][progress]") {
  display d;
  demo::progress p("s", 10, d.options(false));
  d.now += 20;
  p.update(5, std::numeric_limits<double>::quiet_NaN());
  CHECK(d.out.str().find("loss") == std::string::npos);
}

TEST_CASE("examples/progress: a drawn line stays within the width", "[examples][progress]") {
  display d;
  auto options = d.options(true);
  options.width = 20;
  demo::progress p(std::string(50, 's'), 10, options);
  d.now += 1;
  p.update(5);
  CHECK(d.out.str() == "\r" + std::string(20, 's') + "\x1b[K");
}

TEST_CASE("examples/progress: numbers and times are short", "[examples][progress]") {
  CHECK(demo::short_number(0.5) == "0.50");
  CHECK(demo::short_number(9.996) == "10.0");
  CHECK(demo::short_number(99.96) == "100");
  CHECK(demo::short_number(999.6) == "1.00k");
  CHECK(demo::short_number(24e6) == "24.0M");
  CHECK(demo::duration_text(59.4) == "59 s");
  CHECK(demo::duration_text(59.6) == "1:00");
  CHECK(demo::duration_text(7209) == "2:00:09");
  CHECK(demo::duration_text(std::numeric_limits<double>::infinity()) == "?");
}
