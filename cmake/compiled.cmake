# ssmlib::compiled: the common kernels as a static library, generated into the build tree.
#
# Each row is FAMILY=HEADER. The headers of a family become one generated file, which defines what
# they mark with SSMLIB_INSTANTIATE(FAMILY, ...) or, in FAMILY_impl.hpp, with SSMLIB_INLINE. Everybody
# else sees declarations. See include/ssmlib/base/compiled.hpp and docs/build.md.
set(ssmlib_families
    cpu=ssmlib/backend/cpu_impl.hpp
    cpu_memory=ssmlib/backend/cpu_memory_impl.hpp
    error=ssmlib/base/error_impl.hpp
    tensor=ssmlib/tensor/tensor_impl.hpp
    layout=ssmlib/tensor/layout_impl.hpp
    concepts=ssmlib/expr/concepts_impl.hpp
    state_positions=ssmlib/lower/state_positions_impl.hpp
    options=ssmlib/mixer/options_impl.hpp
    config=ssmlib/model/config_impl.hpp
    gemm=ssmlib/kernels/cpu/gemm.hpp
    gemm=ssmlib/kernels/cpu/skinny.hpp
    attention=ssmlib/kernels/cpu/attention.hpp
    attention=ssmlib/kernels/cpu/attention_backward.hpp
    attention=ssmlib/kernels/cpu/attention_decode.hpp
    attention=ssmlib/kernels/cpu/attention_quadratic.hpp
    gated=ssmlib/kernels/cpu/gated_linear.hpp
    gated=ssmlib/kernels/cpu/gated_linear_vjp.hpp
    gated=ssmlib/kernels/cpu/delta_rule.hpp
    gated=ssmlib/kernels/cpu/delta_rule_vjp.hpp
    selective=ssmlib/kernels/cpu/selective.hpp
    selective=ssmlib/kernels/cpu/selective_vjp.hpp
    selective=ssmlib/kernels/cpu/selective_quadratic.hpp
    gram=ssmlib/kernels/cpu/gram.hpp
    gram=ssmlib/kernels/cpu/masked_quadratic.hpp
    ssd=ssmlib/kernels/cpu/linear_recurrence.hpp
    ssd=ssmlib/kernels/cpu/ssd.hpp
    ssd=ssmlib/kernels/cpu/ssd_vjp.hpp
    toeplitz=ssmlib/kernels/cpu/toeplitz.hpp
    toeplitz=ssmlib/kernels/cpu/toeplitz_gram.hpp
    toeplitz=ssmlib/kernels/cpu/toeplitz_quadratic.hpp
    layers=ssmlib/kernels/cpu/activation.hpp
    layers=ssmlib/kernels/cpu/conv1d.hpp
    layers=ssmlib/kernels/cpu/cross_entropy.hpp
    layers=ssmlib/kernels/cpu/discretize.hpp
    layers=ssmlib/kernels/cpu/embedding.hpp
    layers=ssmlib/kernels/cpu/l2_normalize.hpp
    layers=ssmlib/kernels/cpu/norm.hpp
    layers=ssmlib/kernels/cpu/rope.hpp
    layers=ssmlib/kernels/cpu/rows.hpp
    block_attention=ssmlib/model/make_block.hpp
    block_discrete_mamba2=ssmlib/model/make_block.hpp
    block_gated_delta_net=ssmlib/model/make_block.hpp
    block_linear_attention=ssmlib/model/make_block.hpp
    block_mamba1=ssmlib/model/make_block.hpp
    block_mamba2=ssmlib/model/make_block.hpp
    block_mlp=ssmlib/model/make_block.hpp
    language_model=ssmlib/model/language_model.hpp
    model_state=ssmlib/model/model_state_impl.hpp
    semiseparable=ssmlib/lower/semiseparable.hpp
    softmax=ssmlib/lower/softmax.hpp
    training=ssmlib/train/adamw.hpp
    training=ssmlib/train/cross_entropy.hpp
    training=ssmlib/train/distillation_loss.hpp
    training=ssmlib/train/gradient.hpp
    model_losses=ssmlib/train/model_losses_impl.hpp
    distillation=ssmlib/distill/hidden_state_alignment.hpp
    distillation=ssmlib/distill/matrix_orientation.hpp
    distillation=ssmlib/distill/mohawk.hpp
    mohawk=ssmlib/distill/mohawk_impl.hpp
    matrix_orientation=ssmlib/distill/matrix_orientation_impl.hpp
    weight_transfer=ssmlib/distill/weight_transfer_impl.hpp
    decoding=ssmlib/decode/generate.hpp
    decoding=ssmlib/decode/speculate.hpp
    checkpoints=ssmlib/io/checkpoint.hpp
    checkpoints=ssmlib/io/parameters.hpp
    safetensors=ssmlib/io/safetensors_impl.hpp)
if(NOT nlohmann_json_FOUND)
  list(FILTER ssmlib_families EXCLUDE REGEX "^(checkpoints|safetensors)=")
endif()

set(ssmlib_compiled_dir ${PROJECT_BINARY_DIR}/compiled)
set(ssmlib_compiled_sources ${ssmlib_compiled_dir}/build_flags.cpp)
file(CONFIGURE OUTPUT ${ssmlib_compiled_dir}/build_flags.cpp CONTENT
[[// Generated from cmake/compiled.cmake: the symbol that every user of ssmlib::compiled refers to.
#include <ssmlib/base/compiled.hpp>

extern "C" const char SSMLIB_DETAIL_BUILD_FLAGS = 0;
]])
set(ssmlib_compiled_families)
foreach(row IN LISTS ssmlib_families)
  string(REGEX MATCH "^([a-z0-9_]+)=(.+)$" matched "${row}")
  list(APPEND ssmlib_compiled_families ${CMAKE_MATCH_1})
  string(APPEND ssmlib_includes_${CMAKE_MATCH_1} "#include <${CMAKE_MATCH_2}>\n")
endforeach()
list(REMOVE_DUPLICATES ssmlib_compiled_families)
foreach(family IN LISTS ssmlib_compiled_families)
  set(includes ${ssmlib_includes_${family}})
  file(CONFIGURE OUTPUT ${ssmlib_compiled_dir}/${family}.cpp CONTENT
[[// Generated from cmake/compiled.cmake.
#define SSMLIB_DEFINE_@family@ , template
@includes@]] @ONLY)
  list(APPEND ssmlib_compiled_sources ${ssmlib_compiled_dir}/${family}.cpp)
endforeach()

add_library(ssmlib_compiled STATIC ${ssmlib_compiled_sources})
add_library(ssmlib::compiled ALIAS ssmlib_compiled)
set_target_properties(ssmlib_compiled PROPERTIES EXPORT_NAME compiled OUTPUT_NAME ssmlib
                                                 POSITION_INDEPENDENT_CODE ON)
target_link_libraries(ssmlib_compiled PUBLIC ssmlib)
if(nlohmann_json_FOUND)
  # For one source file only: those who link the library need no JSON headers.
  target_link_libraries(ssmlib_compiled PRIVATE $<BUILD_INTERFACE:nlohmann_json::nlohmann_json>)
endif()
target_compile_definitions(ssmlib_compiled PUBLIC SSMLIB_COMPILED)
# Kernels choose their vector width at compile time, so whoever links this library must be compiled
# for the same instruction set.
list(JOIN ssmlib_isa_flags "," isa_flags)
target_compile_options(
  ssmlib_compiled INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${ssmlib_isa_flags}>
                            $<$<AND:$<BOOL:${isa_flags}>,$<COMPILE_LANGUAGE:CUDA>>:-Xcompiler=${isa_flags}>)
ssmlib_own_target(ssmlib_compiled -O3)
if(NOT PROJECT_IS_TOP_LEVEL)
  set_target_properties(ssmlib_compiled PROPERTIES EXCLUDE_FROM_ALL ON)
endif()
