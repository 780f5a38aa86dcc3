# Install and export. Component `daemon`: the programs. Component `client`: the library, the
# headers that it shows and the package quarryConfig.cmake with the target quarry::client.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS quarryd quarry-cli quarry-worker quarry-patterns quarry_sentencepiece
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT daemon
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT daemon)
# For what the worker loads at run time.
set_target_properties(quarry-worker PROPERTIES
  INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
install(FILES deploy/quarryd.toml DESTINATION ${CMAKE_INSTALL_DATADIR}/quarry COMPONENT daemon)

# A static client carries its own static parts along.
set(exported client proto proto_generated proto_types)
foreach(name ${exported})
  set_target_properties(quarry_${name} PROPERTIES EXPORT_NAME ${name})
  install(TARGETS quarry_${name} EXPORT quarryTargets
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT client)
endforeach()

# client/client.h and client/quarry.h, and the plain types that they show; no wire header.
set(public_headers client/client.h client/quarry.h client/rung_attends.h)
foreach(name audit_types default_socket kv_types model_spec retrieval_types rung_attend types identity
    shm_layout)
  list(APPEND public_headers proto/${name}.h)
endforeach()
foreach(header ${public_headers})
  get_filename_component(folder ${header} DIRECTORY)
  install(FILES ${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/quarry/${folder} COMPONENT client)
endforeach()
install(DIRECTORY proto/quarry DESTINATION ${CMAKE_INSTALL_DATADIR}/quarry/proto COMPONENT client
  FILES_MATCHING PATTERN "*.proto")

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/quarry)
configure_package_config_file(cmake/quarryConfig.cmake.in ${CMAKE_BINARY_DIR}/quarryConfig.cmake
  INSTALL_DESTINATION ${package_dir} PATH_VARS CMAKE_INSTALL_DATADIR)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/quarryConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/quarryConfig.cmake ${CMAKE_BINARY_DIR}/quarryConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT client)
install(EXPORT quarryTargets NAMESPACE quarry:: DESTINATION ${package_dir} COMPONENT client)
