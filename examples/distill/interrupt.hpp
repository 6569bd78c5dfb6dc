#pragma once

#include <csignal>

namespace demo {

/// Thrown when Ctrl-C ended a stage, after everything was saved.
struct interrupted {};

inline volatile std::sig_atomic_t stop_requested = 0;

/// Ctrl-C asks for a stop after the current step; a second one ends the program at once.
inline void install_signal_handler() {
  std::signal(SIGINT, [](int) {
    stop_requested = 1;
    std::signal(SIGINT, SIG_DFL);
  });
}

}  // namespace demo
