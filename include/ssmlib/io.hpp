#pragma once

/// @file
/// Files and JSON, apart from ssmlib.hpp because of what the JSON library costs to compile.

#include <ssmlib/io/atomic_file.hpp>
#include <ssmlib/io/checkpoint.hpp>
#include <ssmlib/io/parameters.hpp>
#include <ssmlib/io/safetensors.hpp>
#include <ssmlib/io/token_files.hpp>
