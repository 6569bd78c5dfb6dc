#pragma once

/// @file
/// The CUDA kernels, apart from ssmlib.hpp because they need the CUDA Toolkit's headers. In this
/// version they are called by their own names, on device pointers and a stream of the caller's:
/// tensors and expressions compute on the CPU. The definitions are in the .cuh files beside them,
/// for nvcc.

#include <ssmlib/backend/cuda_error.hpp>
#include <ssmlib/kernels/cuda/attention.hpp>
#include <ssmlib/kernels/cuda/conv1d.hpp>
#include <ssmlib/kernels/cuda/norm.hpp>
#include <ssmlib/kernels/cuda/quadratic.hpp>
#include <ssmlib/kernels/cuda/rope.hpp>
#include <ssmlib/kernels/cuda/sample.hpp>
#include <ssmlib/kernels/cuda/selective.hpp>
#include <ssmlib/kernels/cuda/skinny.hpp>
#include <ssmlib/kernels/cuda/ssd.hpp>
#include <ssmlib/kernels/cuda/ssd_step.hpp>
#include <ssmlib/kernels/cuda/toeplitz.hpp>
