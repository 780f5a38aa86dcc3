#!/bin/bash
# Builds everything (preset dev; with nvcc also the CUDA device) and runs the bounded tier of the tests: all but those labelled
# slow (none so far), which tests/long.sh runs. Ends with ctest's summary; the exit status is its.
#   QUARRY_SKIP_INSTALL=1   use the packages that are there
#   QUARRY_JOBS=N           compile and test N at a time (default: the cores)
# Arguments go to ctest, for example: tests/run.sh -R engine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }
jobs=${QUARRY_JOBS:-$(nproc)}

if [ "${QUARRY_SKIP_INSTALL:-0}" != 1 ]; then
  say "packages"
  deploy/install_dependencies.sh
fi
say "configure (build/dev)"
cmake --preset dev
say "build, $jobs at a time"
cmake --build --preset dev -j "$jobs"
# Only compiled: there need not be a card. Three architectures stand for all; a minute on two cores
# with nothing cached.
if [ -n "${CUDACXX:-$(command -v nvcc || true)}" ]; then
  say "CUDA code for sm_80, sm_89 and sm_90a (build/cuda-check)"
  cmake --preset cuda -B build/cuda-check -DQUARRY_PERF=OFF \
    -DQUARRY_CUDA_ARCHITECTURES="80-real;89-real;90a-real"
  cmake --build build/cuda-check -j "$jobs" --target cuda_device_check
else
  say "no nvcc: the CUDA code is not compiled"
fi
say "tests, two at a time"
ctest --preset dev --output-on-failure -j 2 --label-exclude slow --no-tests=error "$@"
