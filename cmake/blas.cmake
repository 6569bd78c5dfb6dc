# Sets SSMLIB_CBLAS_LIBRARY and SSMLIB_CBLAS_INCLUDE_DIR to an OpenBLAS with its cblas.h.

find_library(SSMLIB_CBLAS_LIBRARY NAMES openblas)
find_path(SSMLIB_CBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas-pthread openblas)
mark_as_advanced(SSMLIB_CBLAS_LIBRARY SSMLIB_CBLAS_INCLUDE_DIR)
if(SSMLIB_BLAS AND NOT (SSMLIB_CBLAS_LIBRARY AND SSMLIB_CBLAS_INCLUDE_DIR))
  message(FATAL_ERROR "ssmlib: SSMLIB_BLAS=ON needs OpenBLAS with cblas.h; "
                      "on Debian: apt install libopenblas-dev")
endif()
