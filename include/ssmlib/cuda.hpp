#pragma once

/// @file
/// The CUDA backend, apart from ssmlib.hpp because it needs the CUDA Toolkit's headers: contexts,
/// tensors on the device, what evaluates mixers and layers there (lower/cuda, nn/cuda), and the
/// kernels by their own names. These headers are plain C++: link ssmlib::cuda_compiled, or include
/// the .cuh files beside kernels/cuda/*.hpp where nvcc compiles the whole program.

#include <ssmlib/backend/cuda_graph.hpp>
#include <ssmlib/decode/cuda/decoder.hpp>
#include <ssmlib/kernels/cuda/attention.hpp>
#include <ssmlib/kernels/cuda/attention_decode.hpp>
#include <ssmlib/kernels/cuda/conv1d.hpp>
#include <ssmlib/kernels/cuda/conv1d_step.hpp>
#include <ssmlib/kernels/cuda/cross_entropy.hpp>
#include <ssmlib/kernels/cuda/delta_rule.hpp>
#include <ssmlib/kernels/cuda/dense_product.hpp>
#include <ssmlib/kernels/cuda/discretize.hpp>
#include <ssmlib/kernels/cuda/elementwise.hpp>
#include <ssmlib/kernels/cuda/embedding.hpp>
#include <ssmlib/kernels/cuda/gated_linear.hpp>
#include <ssmlib/kernels/cuda/gemm.hpp>
#include <ssmlib/kernels/cuda/l2_normalize.hpp>
#include <ssmlib/kernels/cuda/loss_values.hpp>
#include <ssmlib/kernels/cuda/mlp.hpp>
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
#include <ssmlib/kernels/cuda/wrappers.hpp>
#include <ssmlib/lower/cuda/chunk.hpp>
#include <ssmlib/lower/cuda/delta_rule.hpp>
#include <ssmlib/lower/cuda/elements.hpp>
#include <ssmlib/lower/cuda/elementwise.hpp>
#include <ssmlib/lower/cuda/feature_map.hpp>
#include <ssmlib/lower/cuda/gated_linear.hpp>
#include <ssmlib/lower/cuda/gradients.hpp>
#include <ssmlib/lower/cuda/kv_state.hpp>
#include <ssmlib/lower/cuda/layout.hpp>
#include <ssmlib/lower/cuda/matmul.hpp>
#include <ssmlib/lower/cuda/positions.hpp>
#include <ssmlib/lower/cuda/quadratic.hpp>
#include <ssmlib/lower/cuda/recurrence.hpp>
#include <ssmlib/lower/cuda/selective.hpp>
#include <ssmlib/lower/cuda/semiseparable.hpp>
#include <ssmlib/lower/cuda/softmax.hpp>
#include <ssmlib/lower/cuda/workspace.hpp>
#include <ssmlib/lower/cuda/wrappers.hpp>
#include <ssmlib/mixer/cuda/mamba2_step.hpp>
#include <ssmlib/nn/cuda/conv1d.hpp>
#include <ssmlib/nn/cuda/discretize.hpp>
#include <ssmlib/nn/cuda/embedding.hpp>
#include <ssmlib/nn/cuda/l2_normalize.hpp>
#include <ssmlib/nn/cuda/linear.hpp>
#include <ssmlib/nn/cuda/mlp.hpp>
#include <ssmlib/nn/cuda/norm.hpp>
#include <ssmlib/nn/cuda/rope.hpp>
#include <ssmlib/tensor/transfer.hpp>
#include <ssmlib/train/cuda/losses.hpp>
#include <ssmlib/train/cuda/optimizer.hpp>
