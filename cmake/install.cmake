# find_package(ssmlib [COMPONENTS io compiled]) after `cmake --install`.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(ssmlib_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/ssmlib)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/ssmlib DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp")
install(TARGETS ssmlib EXPORT ssmlib-targets)
install(TARGETS ssmlib_compiled EXPORT ssmlib-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET ssmlib_io)
  install(TARGETS ssmlib_io EXPORT ssmlib-targets)
endif()
install(EXPORT ssmlib-targets NAMESPACE ssmlib:: DESTINATION ${ssmlib_package_dir})

set(ssmlib_eigen_version 3.4)
if(Eigen3_VERSION VERSION_GREATER_EQUAL 5)
  set(ssmlib_eigen_version 5)
endif()
configure_package_config_file(
  ${CMAKE_CURRENT_LIST_DIR}/ssmlib-config.cmake.in ${PROJECT_BINARY_DIR}/ssmlib-config.cmake
  INSTALL_DESTINATION ${ssmlib_package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/ssmlib-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/ssmlib-config.cmake
              ${PROJECT_BINARY_DIR}/ssmlib-config-version.cmake DESTINATION ${ssmlib_package_dir})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
