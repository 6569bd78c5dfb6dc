#pragma once

#include <csignal>

namespace demo {

/// Thrown when Ctrl-C ended a stage or the measuring, after everything was saved.
struct interrupted {};

inline volatile std::sig_atomic_t stop_requested = 0;

/// Ctrl-C asks for a stop after the current step; a second one ends the program at once.
inline void install_signal_handler() {
  std::signal(SIGINT, [](int) {
    stop_requested = 1;
    std::signal(SIGINT, SIG_DFL);
  });
}

/// For work that has nothing to save. @throws interrupted  Ctrl-C.
inline void stop_if_requested() {
  if (stop_requested != 0) throw interrupted{};
}

}  // namespace demo
