#!/bin/bash
# Makes a relocatable bundle of the programs with the third-party libraries that they need:
#   build/bundle/quarry-<version>-<architecture>.tar.zst
# It runs on any Linux of this architecture whose glibc is at least this machine's. What comes from
# the machine it runs on: glibc, and CUDA's libraries where they are used.
#   --build DIR   take the programs of this build (default: build/release, built if need be)
#   --out DIR     put the archive there
#   --smoke       afterwards unpack it elsewhere and start every program of it, and the daemon for
#                 long enough to be asked for its status and to end on SIGTERM
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

# Serves on sockets of its own until it is asked for its status, then ends it. Everything but the
# bundle's own libraries is the machine's; nothing of the caller's environment reaches it.
smoke_daemon() {  # BIN DIRECTORY
  local bin=$1 directory=$2 status=0
  env -i "$bin/quarryd" --socket "$directory/quarryd.sock" --grpc-socket "$directory/grpc.sock" \
    --metrics off --arena-bytes 64MiB >"$directory/quarryd.log" 2>&1 &
  daemon_pid=$!
  for _ in $(seq 300); do
    if [ -S "$directory/quarryd.sock" ] && [ -S "$directory/grpc.sock" ]; then break; fi
    kill -0 "$daemon_pid" 2>/dev/null || break
    sleep 0.1
  done
  if ! timeout 30 env -i "$bin/quarry" --socket "$directory/quarryd.sock" status \
    >"$directory/status" ||
    ! grep -q "^quarryd $version, pid $daemon_pid," "$directory/status"; then
    say "no status of the bundle's quarryd $version, pid $daemon_pid; the answer and the log:"
    cat "$directory/status" "$directory/quarryd.log" >&2
    return 1
  fi
  kill -TERM "$daemon_pid"
  timeout 30 tail --pid="$daemon_pid" -s 0.1 -f /dev/null || status=124
  [ "$status" = 124 ] || { wait "$daemon_pid" || status=$?; daemon_pid=; }
  if [ "$status" != 0 ]; then
    say "quarryd's status after SIGTERM is $status (124: did not end within 30 s); its log:"
    cat "$directory/quarryd.log" >&2
    return 1
  fi
  if [ -e "$directory/quarryd.sock" ] || [ -e "$directory/grpc.sock" ]; then
    say "the bundle's quarryd left its sockets in $directory"
    return 1
  fi
}

readonly programs=(daemon/quarryd client/quarry gpu/quarry-worker gpu/quarry-patterns)
readonly modules=(gpu/libquarry_sentencepiece.so)  # loaded at run time
readonly limit_bytes=$((64 << 20))
# glibc must match the machine's kernel and loader, CUDA the machine's driver.
readonly glibc='(ld-linux[-_0-9a-z]*|lib(c|m|mvec|dl|rt|pthread|resolv|util|anl|nss_[a-z]+))\.so'
readonly cuda='lib(cuda|cudart|cublas|cublasLt|cusparse|cufft|nvrtc|nvidia|nccl)[-._0-9a-z]*\.so'
readonly from_machine="^($glibc|$cuda)"

if [ "$own_build" = 1 ]; then
  cmake --preset release >&2
  cmake --build --preset release --target quarryd quarry-cli quarry-worker quarry-patterns >&2
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
for module in "${modules[@]}"; do
  install -s -m 755 "$build/$module" "$root/lib/"
done
cp deploy/quarryd.toml LICENSE "$root/share/"

# ldd names the whole closure, so one pass over programs and modules is enough.
readonly built=("${programs[@]/#/$build/}" "${modules[@]/#/$build/}")
ldd "${built[@]}" | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u |
  while read -r soname path; do
    [[ $soname =~ $from_machine ]] && continue
    cp -L "$path" "$root/lib/$soname"
    chmod 755 "$root/lib/$soname"
    package=$(dpkg-query -S "$(realpath "$path")" 2>/dev/null | head -1 | cut -d: -f1 || true)
    if [ -n "$package" ] && [ -e "/usr/share/doc/$package/copyright" ]; then
      cp -L "/usr/share/doc/$package/copyright" "$root/share/licenses/$package"
    fi
  done
if ldd "${built[@]}" | grep -q 'not found'; then
  say "a library of the programs is not found:"
  ldd "${built[@]}" | grep 'not found' >&2
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
  daemon_pid=
  finish() {
    if [ -n "$daemon_pid" ]; then kill -KILL "$daemon_pid" 2>/dev/null || true; fi
    rm -rf "$stage" "$elsewhere"
  }
  trap finish EXIT
  tar -C "$elsewhere" --zstd -xf "$archive"
  for program in "${programs[@]##*/}"; do
    (cd / && env -i LD_LIBRARY_PATH= "$elsewhere/$name/bin/$program" --help >/dev/null)
  done
  for file in "${programs[@]/#*\//bin/}" "${modules[@]/#*\//lib/}"; do
    # Every library that is not glibc's must come from the bundle.
    foreign=$(env -i LD_LIBRARY_PATH= /usr/bin/ldd "$elsewhere/$name/$file" |
      awk '$2 == "=>" { print $1, $3 }' | while read -r soname path; do
        [[ $soname =~ $from_machine ]] && continue
        case "$(realpath "$path" 2>/dev/null || echo "$path")" in
          "$(realpath "$elsewhere")"/*) ;;
          *) echo "$soname ($path)" ;;
        esac
      done)
    if [ -n "$foreign" ]; then
      say "$file takes from the machine: $foreign"
      exit 1
    fi
  done
  # The worker finds what it loads at run time: a model of random weights is given text.
  mkdir "$elsewhere/model"
  cp tests/models/tiny/llama3-rope/{config.json,model.safetensors} \
    tests/models/tokenizer/tokenizer.model "$elsewhere/model/"
  env -i "$elsewhere/$name/bin/quarry-worker" --model "$elsewhere/model" --attention full \
    --prompt "The archive" --max-new-tokens 4 >"$elsewhere/answer"
  mkdir "$elsewhere/sockets"
  smoke_daemon "$elsewhere/$name/bin" "$elsewhere/sockets"
  say "smoke test passed: every program starts from $elsewhere with its own libraries, and its" \
    "daemon serves, answers and stops"
fi
