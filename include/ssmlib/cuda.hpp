#pragma once

/// @file
/// The CUDA backend, apart from ssmlib.hpp because it needs the CUDA Toolkit's headers: contexts,
/// tensors on the device, and the kernels, called by their own names. Evaluating expressions over
/// tensors of this backend is not part of this version. Kernels are declared here; their
/// definitions are in the .cuh files beside them, for nvcc.

#include <ssmlib/kernels/cuda/attention.hpp>
#include <ssmlib/kernels/cuda/attention_decode.hpp>
#include <ssmlib/kernels/cuda/conv1d.hpp>
#include <ssmlib/kernels/cuda/conv1d_step.hpp>
#include <ssmlib/kernels/cuda/cross_entropy.hpp>
#include <ssmlib/kernels/cuda/delta_rule.hpp>
#include <ssmlib/kernels/cuda/embedding.hpp>
#include <ssmlib/kernels/cuda/gated_linear.hpp>
#include <ssmlib/kernels/cuda/layers.hpp>
#include <ssmlib/kernels/cuda/norm.hpp>
#include <ssmlib/kernels/cuda/optimizer.hpp>
#include <ssmlib/kernels/cuda/quadratic.hpp>
#include <ssmlib/kernels/cuda/recurrence.hpp>
#include <ssmlib/kernels/cuda/rope.hpp>
#include <ssmlib/kernels/cuda/sample.hpp>
#include <ssmlib/kernels/cuda/selective.hpp>
#include <ssmlib/kernels/cuda/selective_step.hpp>
#include <ssmlib/kernels/cuda/skinny.hpp>
#include <ssmlib/kernels/cuda/ssd.hpp>
#include <ssmlib/kernels/cuda/ssd_step.hpp>
#include <ssmlib/kernels/cuda/toeplitz.hpp>
#include <ssmlib/lower/cuda/delta_rule.hpp>
#include <ssmlib/lower/cuda/gated_linear.hpp>
#include <ssmlib/lower/cuda/kv_state.hpp>
#include <ssmlib/lower/cuda/recurrence.hpp>
#include <ssmlib/nn/cuda/conv1d.hpp>
#include <ssmlib/nn/cuda/discretize.hpp>
#include <ssmlib/nn/cuda/embedding.hpp>
#include <ssmlib/nn/cuda/l2_normalize.hpp>
#include <ssmlib/nn/cuda/mlp.hpp>
#include <ssmlib/nn/cuda/norm.hpp>
#include <ssmlib/nn/cuda/rope.hpp>
#include <ssmlib/tensor/transfer.hpp>
