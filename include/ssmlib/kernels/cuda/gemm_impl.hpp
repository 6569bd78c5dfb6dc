#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/kernels/cuda/gemm.hpp>

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#define SSMLIB_CHECK_CUBLAS(...) \
  ::ssm::kernels::cuda::detail::check_cublas((__VA_ARGS__), #__VA_ARGS__)

namespace ssm::kernels::cuda {

namespace detail {

inline void check_cublas(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw backend_error("ssm: " + std::string(call) + " failed: " + cublasLtGetStatusName(status) +
                      " (" + cublasLtGetStatusString(status) + ")");
}

/// What a context keeps for its products.
struct cublas_state {
  struct choice {
    bool possible = false;
    cublasLtMatmulAlgo_t algorithm{};
  };
  static constexpr std::size_t workspace_bytes = std::size_t{32} << 20;

  cudaStream_t stream;
  cublasLtHandle_t handle = nullptr;
  std::shared_ptr<cuda_allocator> source;  // of the workspace; absent: the pool
  void* workspace = nullptr;
  std::map<std::array<index_t, 17>, choice> choices;

  explicit cublas_state(const ssm::cuda::context& ctx)
      : stream(ctx.stream()), source(ctx.allocator()) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    SSMLIB_CHECK_CUDA(cudaStreamIsCapturing(stream, &capture));
    if (capture != cudaStreamCaptureStatusNone && !ctx.is_dry_run()) {
      throw backend_error(
          "ssm: the context's first matrix product is inside a graph capture, which must not "
          "allocate; call kernels::cuda::prepare_gemm(ctx) or run one step before");
    }
    SSMLIB_CHECK_CUBLAS(cublasLtCreate(&handle));
    try {
      if (source) {
        const ssm::detail::workspace_scope scope;
        workspace = source->allocate(workspace_bytes);
      } else {
        ssm::detail::check_cuda(
            cudaMallocFromPoolAsync(&workspace, workspace_bytes, ctx.pool(), stream),
            "cudaMallocFromPoolAsync(32 MiB for matrix products)");
      }
    } catch (...) {
      (void)cublasLtDestroy(handle);
      throw;
    }
  }
  ~cublas_state() {
    if (source) {
      source->release(workspace, workspace_bytes);
    } else {
      (void)cudaFreeAsync(workspace, stream);
    }
    (void)cublasLtDestroy(handle);
  }
  cublas_state(const cublas_state&) = delete;
  cublas_state& operator=(const cublas_state&) = delete;

  [[nodiscard]] static cublas_state& of(const ssm::cuda::context& ctx) {
    std::shared_ptr<void>& kept = ctx.products();
    if (!kept) kept = std::make_shared<cublas_state>(ctx);
    return *static_cast<cublas_state*>(kept.get());
  }
};

/// Descriptions of a product for cuBLASLt, on the stack. Its matrices lie column by column: what it
/// computes is the transpose of ours, with the factors exchanged.
struct cublas_product {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t left, right, result;

  cublas_product(const library_product& p, bool tf32) {
    const bool is_double = p.type == product_type::in_double;
    const bool from_bf16 =
        p.type == product_type::bf16_to_bf16 || p.type == product_type::bf16_to_float;
    const cudaDataType_t scale = is_double ? CUDA_R_64F : CUDA_R_32F;
    const cudaDataType_t in = from_bf16 ? CUDA_R_16BF : scale;
    const cudaDataType_t out = p.type == product_type::bf16_to_bf16 ? CUDA_R_16BF : scale;
    const cublasComputeType_t compute = is_double            ? CUBLAS_COMPUTE_64F
                                        : !from_bf16 && tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                             : CUBLAS_COMPUTE_32F;
    SSMLIB_CHECK_CUBLAS(cublasLtMatmulDescInit(&operation, compute, scale));
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (p.bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, out);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    }
    describe(left, p.b, in, p.batch);
    describe(right, p.a, in, p.batch);
    describe(result, p.c, out, p.batch);
  }

  template <class V>
  void set(cublasLtMatmulDescAttributes_t attribute, const V& value) {
    SSMLIB_CHECK_CUBLAS(
        cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof value));
  }
  static void describe(cublasLtMatrixLayoutOpaque_t& layout, const column_matrix& m,
                       cudaDataType_t type, index_t batch) {
    SSMLIB_CHECK_CUBLAS(cublasLtMatrixLayoutInit(&layout, type, static_cast<std::uint64_t>(m.rows),
                                                 static_cast<std::uint64_t>(m.columns), m.step));
    if (batch == 1) return;
    const auto count = static_cast<std::int32_t>(batch);
    SSMLIB_CHECK_CUBLAS(cublasLtMatrixLayoutSetAttribute(
        &layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    SSMLIB_CHECK_CUBLAS(cublasLtMatrixLayoutSetAttribute(
        &layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &m.batch_step, sizeof m.batch_step));
  }
};

/// The bytes, at most 16, that an address is a multiple of: more must not change the algorithm.
[[nodiscard]] inline std::uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  return address == 0
             ? 16
             : static_cast<std::uint32_t>(std::min<std::uintptr_t>(16, address & (~address + 1)));
}

[[nodiscard]] inline cublas_state::choice choose(cublas_state& state, cublas_product& product,
                                                 const library_product& p) {
  cublasLtMatmulPreferenceOpaque_t preference;
  SSMLIB_CHECK_CUBLAS(cublasLtMatmulPreferenceInit(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    SSMLIB_CHECK_CUBLAS(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, cublas_state::workspace_bytes);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.b.data));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.a.data));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(p.c.data));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c.data));
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      state.handle, &product.operation, &product.left, &product.right, &product.result,
      &product.result, &preference, 1, &result, &found);
  // Sizes and strides that no algorithm takes come back as one of these.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
      found == 0) {
    return {};
  }
  check_cublas(status, "cublasLtMatmulAlgoGetHeuristic");
  return {result.state == CUBLAS_STATUS_SUCCESS, result.algo};
}

SSMLIB_INLINE bool multiply_by_library(const ssm::cuda::context& ctx, const library_product& p) {
  constexpr index_t largest = 2147483647;
  if (std::max({p.m, p.n, p.k, p.batch}) > largest) return false;
  cublas_state& state = cublas_state::of(ctx);
  cublas_product product(p, ctx.allow_tf32());
  const index_t alignments = alignment_of(p.a.data) + 32 * alignment_of(p.b.data) +
                             32 * 32 * alignment_of(p.c.data) + 32 * 32 * 32 * alignment_of(p.bias);
  const auto key = std::to_array<index_t>(
      {static_cast<index_t>(p.type), p.m, p.n, p.k, p.batch, p.a.transposed, p.b.transposed,
       p.a.step, p.b.step, p.c.step, p.a.batch_step, p.b.batch_step, p.c.batch_step,
       p.bias != nullptr, p.beta != 0, ctx.allow_tf32(), alignments});
  auto found = state.choices.find(key);
  if (found == state.choices.end()) {
    found = state.choices.emplace(key, choose(state, product, p)).first;
  }
  if (!found->second.possible) return false;
  const auto alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
  const bool is_double = p.type == product_type::in_double;
  const auto pick = [&](const double& d, const float& f) {
    return is_double ? static_cast<const void*>(&d) : static_cast<const void*>(&f);
  };
  SSMLIB_CHECK_CUBLAS(cublasLtMatmul(
      state.handle, &product.operation, pick(p.alpha, alpha), p.b.data, &product.left, p.a.data,
      &product.right, pick(p.beta, beta), p.c.data, &product.result, const_cast<void*>(p.c.data),
      &product.result, &found->second.algorithm, state.workspace, cublas_state::workspace_bytes,
      state.stream));
  return true;
}

}  // namespace detail

SSMLIB_INLINE void prepare_gemm(const ssm::cuda::context& ctx) {
  (void)detail::cublas_state::of(ctx);
}

}  // namespace ssm::kernels::cuda
