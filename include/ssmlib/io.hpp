#pragma once

/// @file
/// Files and JSON, apart from ssmlib.hpp because of what the JSON library costs to compile.

#include <ssmlib/io/atomic_file.hpp>
#include <ssmlib/io/safetensors.hpp>
