# ssmlib::compiled: the common kernels as a static library, generated into the build tree.
#
# Each row is FAMILY=HEADER. The header lists its instantiations after its definitions, as
#   SSMLIB_INSTANTIATE(FAMILY, void gemm<float>(...));
# and one generated file per family defines them; everybody else who includes the header with
# SSMLIB_COMPILED sees `extern template`. See docs/build.md.
set(ssmlib_families)

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
