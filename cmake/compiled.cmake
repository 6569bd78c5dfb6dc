# ssmlib::compiled: the common kernels as a static library, generated into the build tree.
#
# Each row is FAMILY=HEADER and becomes one generated file, which defines what the header marks with
# SSMLIB_INSTANTIATE(FAMILY, ...) or, in FAMILY_impl.hpp, with SSMLIB_INLINE. Everybody else sees
# declarations. See include/ssmlib/base/compiled.hpp and docs/build.md.
set(ssmlib_families
    cpu_threads=ssmlib/backend/cpu_threads_impl.hpp)

set(ssmlib_compiled_dir ${PROJECT_BINARY_DIR}/compiled)
set(ssmlib_compiled_sources ${ssmlib_compiled_dir}/build_flags.cpp)
file(CONFIGURE OUTPUT ${ssmlib_compiled_dir}/build_flags.cpp CONTENT
[[// Generated from cmake/compiled.cmake: the symbol that every user of ssmlib::compiled refers to.
#include <ssmlib/base/compiled.hpp>

extern "C" const char SSMLIB_DETAIL_BUILD_FLAGS = 0;
]])
foreach(row IN LISTS ssmlib_families)
  string(REGEX MATCH "^([a-z0-9_]+)=(.+)$" matched "${row}")
  set(family ${CMAKE_MATCH_1})
  set(header ${CMAKE_MATCH_2})
  file(CONFIGURE OUTPUT ${ssmlib_compiled_dir}/${family}.cpp CONTENT
[[// Generated from cmake/compiled.cmake.
#define SSMLIB_DEFINE_@family@ , template
#include <@header@>
]] @ONLY)
  list(APPEND ssmlib_compiled_sources ${ssmlib_compiled_dir}/${family}.cpp)
endforeach()

add_library(ssmlib_compiled STATIC ${ssmlib_compiled_sources})
add_library(ssmlib::compiled ALIAS ssmlib_compiled)
set_target_properties(ssmlib_compiled PROPERTIES EXPORT_NAME compiled OUTPUT_NAME ssmlib
                                                 POSITION_INDEPENDENT_CODE ON)
target_link_libraries(ssmlib_compiled PUBLIC ssmlib)
target_compile_definitions(ssmlib_compiled PUBLIC SSMLIB_COMPILED)
# Kernels choose their vector width at compile time, so whoever links this library must be compiled
# for the same instruction set.
target_compile_options(ssmlib_compiled INTERFACE ${ssmlib_isa_flags})
ssmlib_own_target(ssmlib_compiled -O3)
if(NOT PROJECT_IS_TOP_LEVEL)
  set_target_properties(ssmlib_compiled PROPERTIES EXCLUDE_FROM_ALL ON)
endif()
