#!/bin/bash
# Installs the Debian packages that building, testing and running Quarry needs.
#   deploy/install_dependencies.sh          installs what is missing, as root or with sudo
#   deploy/install_dependencies.sh --list   prints the packages, one per line, and stops
# Prints nothing when everything is there. All output goes to standard error.
set -euo pipefail

packages=(
  # tools
  build-essential cmake ninja-build ccache pkg-config git ca-certificates python3 patchelf zstd
  # services and their types
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc
  # status, containers and synchronisation; memory placement
  libabsl-dev libnuma-dev
  # the disk tier: io_uring, CRC32C
  liburing-dev libisal-dev
  # digests
  libxxhash-dev libssl-dev
  # configuration, command lines, logs, metrics, JSON
  libtomlplusplus-dev libcli11-dev libspdlog-dev prometheus-cpp-dev nlohmann-json3-dev
  # the reference worker: matrix products, tokenizers
  libopenblas-pthread-dev libsentencepiece-dev
  # heat maps of the command line
  libpng-dev
  # eigenvectors for the coordinates of coded keys
  libeigen3-dev
  # the indexes that retrieval is measured against
  libfaiss-dev libhnswlib-dev
  # tests
  libgtest-dev libgmock-dev
)

say() { printf 'install_dependencies: %s\n' "$*" >&2; }

case "${1:-}" in
  "") ;;
  --list) printf '%s\n' "${packages[@]}"; exit 0 ;;
  *) say "unknown argument '$1' (only --list is known)"; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  say "this system has no apt; install the equivalents of: ${packages[*]}"
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    say "missing packages: ${missing[*]}"
    say "not root, and there is no sudo; run as root: apt-get install ${missing[*]}"
    exit 1
  fi
  as_root=(sudo)
fi

say "installing ${#missing[@]} of ${#packages[@]} packages: ${missing[*]}"
apt() {
  ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive \
    apt-get -y -q -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" >&2
}
# A stale or unreachable extra source must not stop us while Debian's own are there.
apt update || say "apt-get update had errors; trying to install all the same"
apt install --no-install-recommends "${missing[@]}"
say "done"
