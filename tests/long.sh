#!/bin/bash
# Runs what does not fit into tests/run.sh, and writes what came out to tests/results/:
#   address   all tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   thread    all tests under ThreadSanitizer
#   release   all tests, those labelled slow (none so far) included, in the build that is measured
#   simd      the kernels' tests and the attention tests at every instruction-set level
#   disk      30,000 seeds of the simulated disk, each of its calls failing in both tiers, every bit
#             of the metadata of logs and 10^6 of their payload flipped, 10^6 executions of each fuzz
#             target of the log and the configuration, every fault at each call of the disk, 2,000
#             kills of the daemon under load, and 25 crashes at each of the named places
#   mutants   bugs that peers had, put into copies of the tree: tests must fail (tests/mutants/run.py)
#   demo      the demo of every reference model
#   perf      every benchmark, its JSON lines in the results; of retrieval_bench one trace of its
#             default set, which takes half an hour (perf/README.md)
#   bundle    the relocatable bundle, unpacked and started elsewhere
# Arguments choose parts; none means all. Every part runs, whatever failed before it.
#   QUARRY_SEED=N           of the randomised tests and the demo (default: the date)
#   QUARRY_JOBS=N           compile N at a time (default: the cores)
#   QUARRY_SKIP_INSTALL=1   use the packages that are there
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly parts=(address thread release simd disk mutants demo perf bundle)
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${parts[@]}")
for part in "${chosen[@]}"; do
  if [[ " ${parts[*]} " != *" $part "* ]]; then
    echo "long: unknown part '$part' (known: ${parts[*]})" >&2
    exit 2
  fi
done

jobs=${QUARRY_JOBS:-$(nproc)}
seed=${QUARRY_SEED:-$(date +%Y%m%d)}
export QUARRY_TEST_SEED=$seed GTEST_RANDOM_SEED=$((seed % 99999))
commit=$(git rev-parse --short=12 HEAD)
[ -z "$(git status --porcelain)" ] || commit=$commit-modified
results=tests/results/$(date +%Y-%m-%d)-$commit.txt
logs=$(mktemp -d)
mkdir -p tests/results
failed=()

say() { printf '== %s\n' "$*" >&2; }
record() { printf '%s\n' "$@" >>"$results"; }

# Runs a command with its output in a log; the results get its last lines and how it ended.
# step NAME LINES COMMAND...
step() {
  local name=$1 lines=$2 status=0 began=$SECONDS
  shift 2
  say "$name: $*"
  "$@" >"$logs/$name.log" 2>&1 || status=$?
  record "" "### $name: status $status, $((SECONDS - began)) s" "\$ $*"
  tail -n "$lines" "$logs/$name.log" | sed "s|$PWD|.|g" >>"$results"
  if [ "$status" -ne 0 ]; then
    failed+=("$name")
    say "$name FAILED with status $status; the log's end:"
    tail -n 40 "$logs/$name.log" >&2
  fi
  return "$status"
}

build() {  # preset targets...
  local preset=$1
  shift
  step "configure-$preset" 3 cmake --preset "$preset" &&
    step "build-$preset" 2 cmake --build --preset "$preset" -j "$jobs" ${1:+--target "$@"}
}

run_address() {
  build asan && ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    step tests-address 12 \
    ctest --preset asan -j 2 --timeout 900 --label-exclude 'slow|timing'
}

run_thread() {
  build tsan && TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1:suppressions=$PWD/tests/tsan/suppressions.txt \
    step tests-thread 12 ctest --preset tsan -j 2 --timeout 900 --label-exclude 'slow|timing'
}

run_release() {
  build release && step tests-release 12 ctest --preset release -j 2
}

run_simd() {
  build release || return
  local level
  for level in scalar avx2 avx512 amx; do
    QUARRY_SIMD=$level step "simd-$level" 6 ctest --preset release -j 2 -R 'kernels|exact_scan|attention|budget'
  done
}

run_disk() {
  build release log_simulation_test tiered_failure_test log_flip_test log_fuzz_test config_fuzz_test \
    kill_test quarryd || return
  # Seeds of each kind of disk; there are nine.
  QUARRY_SIMULATION_SEEDS=3400 step simulation 12 \
    build/release/tests/storage/log/log_simulation_test
  QUARRY_FAILURE_STRIDE=1 step failures 12 build/release/tests/storage/tiered_failure_test
  QUARRY_FLIP_STRIDE=1 QUARRY_PAYLOAD_FLIPS=1000000 step flips 16 \
    build/release/tests/storage/log/log_flip_test
  QUARRY_FUZZ_RUNS=1000000 step fuzz-log 20 build/release/tests/storage/log/log_fuzz_test
  QUARRY_FUZZ_RUNS=1000000 step fuzz-config 8 build/release/tests/daemon/config_fuzz_test
  step kills 8 build/release/tests/crash/kill_test --kills=2000
  build dev crash_point_test call_sites_test quarryd || return
  QUARRY_CALLS_PER_SITE=3 step call-sites 8 build/dev/tests/storage/log/call_sites_test
  cat build/dev/tests/storage/log/disk_call_sites.txt >>"$results"
  QUARRY_CRASHES=25 step crash-points 8 build/dev/tests/crash/crash_point_test
}

run_mutants() { step mutants 50 tests/mutants/run.py --jobs "$jobs"; }

run_demo() {
  local model
  build release quarryd quarry-cli quarry-worker || return
  for model in llama-a phi3-b; do
    step "demo-$model" 60 deploy/quickstart.sh --skip-install --model "$model" --seed "$seed" --json
  done
}

run_perf() {
  build release || return
  local bench arguments
  for bench in build/release/perf/*_bench; do
    arguments=(--json)
    [ "${bench##*/}" != retrieval_bench ] ||
      arguments=(--synthetic mass-300 --tokens 32768 --kv-heads 1 --threads 1)
    step "${bench##*/}" 200 timeout 1800 "$bench" "${arguments[@]}"
  done
}

run_bundle() { step bundle 10 deploy/bundle.sh --smoke; }

[ "${QUARRY_SKIP_INSTALL:-0}" = 1 ] || deploy/install_dependencies.sh || exit 1
: >"$results"
record "commit $commit" "date $(date -u +%Y-%m-%dT%H:%MZ)" "seed $seed" "parts ${chosen[*]}" \
  "machine $(nproc) CPUs, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(awk '/MemTotal/ { printf "%d GiB", $2 / 1048576 }' /proc/meminfo)"
for part in "${chosen[@]}"; do
  say "part $part"
  "run_$part"
done

summary="all parts passed"
[ ${#failed[@]} -eq 0 ] || summary="FAILED: ${failed[*]}"
record "" "## $summary"
say "$summary; results in $results, logs in $logs"
[ ${#failed[@]} -eq 0 ]
