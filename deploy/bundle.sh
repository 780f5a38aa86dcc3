#!/bin/bash
# Makes a relocatable bundle of the programs with the third-party libraries that they need:
#   build/bundle/quarry-<version>-<architecture>.tar.zst
# It runs on any Linux of this architecture whose glibc is at least this machine's. What comes from
# the machine it runs on: glibc, and CUDA's libraries where they are used.
#   --build DIR   take the programs of this build (default: build/release, built if need be)
#   --out DIR     put the archive there
#   --smoke       afterwards unpack it elsewhere and start every program of it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=build/release
own_build=1
out=build/bundle
smoke=0
while [ $# -gt 0 ]; do
  case "$1" in
    --build) build=$2; own_build=0; shift ;;
    --out) out=$2; shift ;;
    --smoke) smoke=1 ;;
    *) echo "bundle: unknown argument '$1' (known: --build DIR, --out DIR, --smoke)" >&2; exit 2 ;;
  esac
  shift
done
say() { printf 'bundle: %s\n' "$*" >&2; }

readonly programs=(daemon/quarryd client/quarry gpu/quarry-worker)
readonly limit_bytes=$((64 << 20))
# glibc must match the machine's kernel and loader, CUDA the machine's driver.
readonly glibc='(ld-linux[-_0-9a-z]*|lib(c|m|mvec|dl|rt|pthread|resolv|util|anl|nss_[a-z]+))\.so'
readonly cuda='lib(cuda|cudart|cublas|cublasLt|cusparse|cufft|nvrtc|nvidia|nccl)[-._0-9a-z]*\.so'
readonly from_machine="^($glibc|$cuda)"

if [ "$own_build" = 1 ]; then
  cmake --preset release >&2
  cmake --build --preset release --target quarryd quarry-cli quarry-worker >&2
fi
version=$(sed -n 's/^project(quarry VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
name=quarry-$version-$(uname -m)
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/$name
mkdir -p "$root/bin" "$root/lib" "$root/share/licenses"

for program in "${programs[@]}"; do
  install -s -m 755 "$build/$program" "$root/bin/"
done
cp deploy/quarryd.toml LICENSE "$root/share/"

# ldd names the whole closure, so one pass over the programs is enough.
ldd "${programs[@]/#/$build/}" | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u |
  while read -r soname path; do
    [[ $soname =~ $from_machine ]] && continue
    cp -L "$path" "$root/lib/$soname"
    chmod 755 "$root/lib/$soname"
    package=$(dpkg-query -S "$(realpath "$path")" 2>/dev/null | head -1 | cut -d: -f1 || true)
    if [ -n "$package" ] && [ -e "/usr/share/doc/$package/copyright" ]; then
      cp -L "/usr/share/doc/$package/copyright" "$root/share/licenses/$package"
    fi
  done
if ldd "${programs[@]/#/$build/}" | grep -q 'not found'; then
  say "a library of the programs is not found:"
  ldd "${programs[@]/#/$build/}" | grep 'not found' >&2
  exit 1
fi
for file in "$root"/bin/*; do patchelf --set-rpath '$ORIGIN/../lib' "$file"; done
for file in "$root"/lib/*; do patchelf --set-rpath '$ORIGIN' "$file"; done

mkdir -p "$out"
archive=$out/$name.tar.zst
tar -C "$stage" --sort=name --owner=0 --group=0 --numeric-owner -cf - "$name" | zstd -q -f -T0 -15 -o "$archive"
bytes=$(stat -c %s "$archive")
say "$archive: $((bytes >> 10)) KiB, $(ls "$root/lib" | wc -l) libraries"
if [ "$bytes" -ge "$limit_bytes" ]; then
  say "that is not under $((limit_bytes >> 20)) MiB"
  exit 1
fi

if [ "$smoke" = 1 ]; then
  elsewhere=$(mktemp -d)
  trap 'rm -rf "$stage" "$elsewhere"' EXIT
  tar -C "$elsewhere" --zstd -xf "$archive"
  for program in "${programs[@]##*/}"; do
    (cd / && env -i LD_LIBRARY_PATH= "$elsewhere/$name/bin/$program" --help >/dev/null)
    # Every library that is not glibc's must come from the bundle.
    foreign=$(env -i LD_LIBRARY_PATH= /usr/bin/ldd "$elsewhere/$name/bin/$program" |
      awk '$2 == "=>" { print $1, $3 }' | while read -r soname path; do
        [[ $soname =~ $from_machine ]] && continue
        case "$(realpath "$path" 2>/dev/null || echo "$path")" in
          "$(realpath "$elsewhere")"/*) ;;
          *) echo "$soname ($path)" ;;
        esac
      done)
    if [ -n "$foreign" ]; then
      say "$program takes from the machine: $foreign"
      exit 1
    fi
  done
  say "smoke test passed: every program starts from $elsewhere with its own libraries"
fi
