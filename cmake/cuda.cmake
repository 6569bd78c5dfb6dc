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
