#include "version.hpp"

#include <ssmlib/base/config.hpp>

#include <ctime>

// The build defines it for this file alone, so that a commit recompiles nothing else.
#ifndef DEMO_SOURCE_COMMIT
#define DEMO_SOURCE_COMMIT "unknown"
#endif

std::string demo::library_version() {
  return std::to_string(SSMLIB_VERSION_MAJOR) + "." + std::to_string(SSMLIB_VERSION_MINOR) + "." +
         std::to_string(SSMLIB_VERSION_PATCH);
}

std::string demo::source_commit() {
  return DEMO_SOURCE_COMMIT;
}

std::string demo::utc_time() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}
