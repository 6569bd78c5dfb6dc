#pragma once

#include <string>

namespace demo {

/// What the program was built from, for the files that it writes: the library's version, such as
/// "0.1.0", and the commit as git described it when the build was configured, or "unknown".
[[nodiscard]] std::string library_version();
[[nodiscard]] std::string source_commit();

/// Now, in UTC: "2026-01-31T12:59:59Z".
[[nodiscard]] std::string utc_time();

}  // namespace demo
