# How our own targets are compiled. Nothing here reaches a consumer of ssmlib::ssmlib.

if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
  endif()
  find_program(SSMLIB_CCACHE ccache)
  mark_as_advanced(SSMLIB_CCACHE)
  if(SSMLIB_CCACHE AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
    set(CMAKE_CXX_COMPILER_LAUNCHER "${SSMLIB_CCACHE}")
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${SSMLIB_CCACHE}")
  endif()
endif()

set(ssmlib_isa_flags "")
if(SSMLIB_NATIVE)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native SSMLIB_HAS_MARCH_NATIVE)
  if(SSMLIB_HAS_MARCH_NATIVE)
    set(ssmlib_isa_flags -march=native)
  endif()
endif()

set(ssmlib_sanitize_flags "")
if(SSMLIB_SANITIZE)
  set(ssmlib_sanitize_flags -fsanitize=${SSMLIB_SANITIZE} -fno-sanitize-recover=all
                            -fno-omit-frame-pointer)
endif()

set(ssmlib_warning_flags -Wall -Wextra -Wpedantic)
if(SSMLIB_WERROR)
  list(APPEND ssmlib_warning_flags -Werror)
endif()
# Compiles TARGET with our warnings, instruction set and sanitizers, at the given optimisation level.
function(ssmlib_own_target target level)
  target_compile_options(
    ${target} PRIVATE ${ssmlib_warning_flags} ${ssmlib_isa_flags} ${ssmlib_sanitize_flags}
                      $<$<CONFIG:Release>:${level}>)
  target_link_options(${target} PRIVATE ${ssmlib_sanitize_flags})
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
endfunction()
