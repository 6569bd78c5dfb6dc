#pragma once

#include "settings.hpp"

namespace demo {

/// The whole run: trains and distils the models, measures them, writes the report.
/// @return the exit code: 0, or 1 where a check of the run itself failed.
/// @throws usage_error  what the user can put right. @throws interrupted  Ctrl-C, all saved.
int distill(const settings& s, ssm::index_t held_out_bytes, ssm::index_t new_tokens);

}  // namespace demo
