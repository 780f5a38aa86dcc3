# One library per folder, named quarry_<folder> with the alias quarry::<folder>.

# Warnings and sanitizers of our own targets; third-party code keeps its own.
function(quarry_target_defaults target)
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}> $<INSTALL_INTERFACE:include/quarry>)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wno-missing-field-initializers>
    $<$<AND:$<CXX_COMPILER_ID:Clang>,$<COMPILE_LANGUAGE:CXX>>:-Wthread-safety>)
  if(QUARRY_SANITIZE)
    target_compile_options(${target} PUBLIC
      $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${QUARRY_SANITIZE} -fno-omit-frame-pointer>)
    target_link_options(${target} PUBLIC -fsanitize=${QUARRY_SANITIZE})
    get_target_property(type ${target} TYPE)
    if(QUARRY_SANITIZE MATCHES "thread" AND type STREQUAL "EXECUTABLE")
      target_sources(${target} PRIVATE ${CMAKE_SOURCE_DIR}/tests/tsan/absl_sync.cc)
      target_link_libraries(${target} PRIVATE absl::synchronization)
    endif()
  endif()
endfunction()

function(quarry_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(quarry_${folder} STATIC ${ARG_SOURCES})
  add_library(quarry::${folder} ALIAS quarry_${folder})
  target_link_libraries(quarry_${folder} PUBLIC ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
  quarry_target_defaults(quarry_${folder})
endfunction()

# Kernels of one instruction set: an object library of one source, with the flags of `level` on that
# target alone. Levels: scalar, avx2, avx512, amx (proto/simd_level.h).
set(QUARRY_AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni -mavx512vbmi
  -mavx2 -mfma -mf16c)
set(QUARRY_SIMD_FLAGS_scalar)
set(QUARRY_SIMD_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(QUARRY_SIMD_FLAGS_avx512 ${QUARRY_AVX512_FLAGS})
set(QUARRY_SIMD_FLAGS_amx ${QUARRY_AVX512_FLAGS} -mamx-tile -mamx-bf16)
function(quarry_simd_objects target level source)
  add_library(${target} OBJECT ${source})
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR})
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-psabi ${QUARRY_SIMD_FLAGS_${level}}
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized>)  # of GCC's own intrinsics
  if(QUARRY_SANITIZE)  # at -O3 GCC takes many minutes over what sanitizers add
    target_compile_options(${target} PRIVATE -O1 -fsanitize=${QUARRY_SANITIZE})
  else()
    target_compile_options(${target} PRIVATE -O3)
  endif()
endfunction()

# LABELS as in HACKING.md; TIMEOUT in seconds, of a build without sanitizers.
function(quarry_limit_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "LABELS;ENVIRONMENT" ${ARGN})
  if(QUARRY_SANITIZE)  # tests take several times as long, those that search for minutes
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 10")
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}" ENVIRONMENT "${ARG_ENVIRONMENT}")
endfunction()

# A test program tests/<folder>/<name>.cc.
function(quarry_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS;LABELS;ENV" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_SOURCES)
    set(ARG_SOURCES ${name}.cc)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  quarry_target_defaults(${name})
  add_test(NAME ${name} COMMAND ${name})
  quarry_limit_test(${name} TIMEOUT ${ARG_TIMEOUT} LABELS ${ARG_LABELS} ENVIRONMENT ${ARG_ENV})
endfunction()

# A benchmark program perf/<name>.cc, built to build/<preset>/perf/<name>.
function(quarry_bench name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS" ${ARGN})
  if(NOT ARG_SOURCES)
    set(ARG_SOURCES ${name}.cc)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS})
  quarry_target_defaults(${name})
endfunction()
