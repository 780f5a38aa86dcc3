#!/bin/bash
# From a fresh clone to the demo: installs the Debian packages, builds, starts a daemon of its own
# in a temporary directory, runs the demo against it and stops it.
#   --model NAME     llama-a (default) or phi3-b
#   --seed N         of the demo's context and questions (default 1)
#   --questions N    default 64
#   --json           print the results as one JSON object, alone on the last line of standard output
#   --skip-install   use the packages that are there
#   --keep           keep the daemon's directory (configuration, log) and print where it is
# Progress goes to standard error. Nothing is left running, and only what this script started is
# stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*" >&2; }
usage() { sed -n '2,/^set -e/p' "${BASH_SOURCE[0]}" | sed -n 's/^# \{0,1\}//p' >&2; }

# Now, and not minutes later when the demo starts.
check() {
  case "$1" in
    --model)
      [ -n "$2" ] && [ -f "tests/models/$2/config.json" ] && return
      say "there is no model '$2' in tests/models" ;;
    --seed)
      [[ "$2" =~ ^-?[0-9]+$ ]] && return
      say "--seed '$2' is not a number" ;;
    --questions)
      [[ "$2" =~ ^[0-9]*[1-9][0-9]*$ ]] && return
      say "--questions '$2': at least 1 is needed" ;;
  esac
  exit 2
}

demo_arguments=()
install=1
keep=0
while [ $# -gt 0 ]; do
  case "$1" in
    --model | --seed | --questions)
      if [ $# -lt 2 ]; then say "$1 needs a value"; exit 2; fi
      check "$1" "$2"
      demo_arguments+=("$1" "$2")
      shift ;;
    --json) demo_arguments+=(--json) ;;
    --skip-install) install=0 ;;
    --keep) keep=1 ;;
    --help | -h) usage; exit 0 ;;
    *) say "unknown argument '$1'"; usage; exit 2 ;;
  esac
  shift
done

if [ "$install" = 1 ]; then
  say "packages"
  deploy/install_dependencies.sh
fi

say "build (build/release)"
cmake --preset release >&2
cmake --build --preset release --target quarryd quarry-cli quarry-worker >&2

directory=$(mktemp -d)
daemon_pid=
finish() {
  if [ -n "$daemon_pid" ] && kill -0 "$daemon_pid" 2>/dev/null; then
    kill -TERM "$daemon_pid"
    wait "$daemon_pid" || say "the daemon ended with status $?"
    say "daemon stopped"
  fi
  if [ "$keep" = 1 ]; then say "kept: $directory"; else rm -rf "$directory"; fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "daemon (socket $directory/quarryd.sock)"
# The example configuration, with sockets of our own and no metrics port that may be taken.
build/release/daemon/quarryd --config deploy/quarryd.toml --socket "$directory/quarryd.sock" \
  --grpc-socket "$directory/grpc.sock" --metrics off --arena-bytes 1GiB \
  --print-config >"$directory/quarryd.toml"
build/release/daemon/quarryd --config "$directory/quarryd.toml" >"$directory/quarryd.log" 2>&1 &
daemon_pid=$!
for _ in $(seq 200); do
  [ -S "$directory/quarryd.sock" ] && break
  if ! kill -0 "$daemon_pid" 2>/dev/null; then
    say "the daemon did not start; its log:"
    cat "$directory/quarryd.log" >&2
    exit 1
  fi
  sleep 0.05
done

/usr/bin/python3 deploy/demo.py --build build/release --socket "$directory/quarryd.sock" \
  ${demo_arguments[@]+"${demo_arguments[@]}"}
