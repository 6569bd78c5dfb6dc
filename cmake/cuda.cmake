# The CUDA backend: ssmlib::cuda is the headers with the CUDA runtime. Where there is no nvcc nothing
# is missing but that target, and one sentence says so.
set(SSMLIB_CUDA_FOUND OFF)
if(NOT SSMLIB_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "ssmlib: SSMLIB_CUDA is '${SSMLIB_CUDA}', wanted AUTO, ON or OFF")
endif()
if(NOT SSMLIB_CUDA STREQUAL "OFF" AND (PROJECT_IS_TOP_LEVEL OR SSMLIB_CUDA STREQUAL "ON"))
  include(CheckLanguage)
  set(message_level ${CMAKE_MESSAGE_LOG_LEVEL})
  set(CMAKE_MESSAGE_LOG_LEVEL WARNING)
  check_language(CUDA)
  set(CMAKE_MESSAGE_LOG_LEVEL ${message_level})
  if(CMAKE_CUDA_COMPILER)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 90a-real)
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit 12.4 REQUIRED)
    set(SSMLIB_CUDA_FOUND ON)
  elseif(SSMLIB_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ssmlib: SSMLIB_CUDA=ON, but there is no nvcc; install the CUDA Toolkit "
                        "12.4 or newer, or give -DCMAKE_CUDA_COMPILER=/path/to/nvcc")
  else()
    message(NOTICE "ssmlib: no CUDA compiler found; this build is for the CPU only")
  endif()
endif()

if(SSMLIB_CUDA_FOUND)
  add_library(ssmlib_cuda INTERFACE)
  add_library(ssmlib::cuda ALIAS ssmlib_cuda)
  target_link_libraries(ssmlib_cuda INTERFACE ssmlib CUDA::cudart_static)
  # CMake 3.25 knows no C++20 for nvcc.
  target_compile_options(
    ssmlib_cuda INTERFACE $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-std=c++20
                          --expt-relaxed-constexpr>)
endif()

# ssmlib::cuda_compiled: the kernels as a static library, so that their users need no nvcc. Each
# family of SSMLIB_INSTANTIATE(cuda_..., ) in a .cuh header becomes one generated file.
function(ssmlib_add_cuda_compiled)
  set(dir ${PROJECT_BINARY_DIR}/compiled)
  set(include ${PROJECT_SOURCE_DIR}/include)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${include} ${include}/ssmlib/*.cuh)
  set(families)
  foreach(header IN LISTS headers)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${include}/${header})
    file(READ ${include}/${header} text)
    string(REGEX MATCHALL "SSMLIB_INSTANTIATE\\([ \\\n]*cuda_[a-z0-9_]+" uses "${text}")
    list(TRANSFORM uses REPLACE "SSMLIB_INSTANTIATE\\([ \\\n]*" "")
    list(REMOVE_DUPLICATES uses)
    foreach(family IN LISTS uses)
      list(APPEND families ${family})
      string(APPEND includes_${family} "#include <${header}>\n")
    endforeach()
  endforeach()
  list(REMOVE_DUPLICATES families)
  # What is no template: the backend itself.
  string(PREPEND includes_cuda_elements "#include <ssmlib/backend/cuda_dry_run_impl.hpp>\n"
                                        "#include <ssmlib/kernels/cuda/gemm_impl.hpp>\n")
  set(sources)
  foreach(family IN LISTS families)
    set(includes ${includes_${family}})
    file(CONFIGURE OUTPUT ${dir}/${family}.cu CONTENT
[[// Generated from cmake/cuda.cmake.
#define SSMLIB_DEFINE_@family@ , template
@includes@]] @ONLY)
    list(APPEND sources ${dir}/${family}.cu)
  endforeach()
  add_library(ssmlib_cuda_compiled STATIC EXCLUDE_FROM_ALL ${sources})
  add_library(ssmlib::cuda_compiled ALIAS ssmlib_cuda_compiled)
  set_target_properties(ssmlib_cuda_compiled PROPERTIES OUTPUT_NAME ssmlib_cuda
                                                        POSITION_INDEPENDENT_CODE ON)
  target_link_libraries(ssmlib_cuda_compiled PUBLIC ssmlib_cuda ssmlib_compiled CUDA::cublasLt
                                                    CUDA::cufft)
  # 554: conversions to views of constants; 20012: Eigen's own annotations.
  target_compile_options(ssmlib_cuda_compiled PRIVATE -O3 -lineinfo --diag-suppress=554,20012)
endfunction()
