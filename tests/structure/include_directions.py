"""The include directions of the folders, as a table and a check.

`violations(files)` takes {path: text} of the tree's C++ files and returns one line for each include
that breaks a rule. Rules:
- a folder includes only itself and what ALLOWED names; siblings do not include each other;
- protobuf, gRPC and the generated messages are seen, directly or through a header, only by WIRE_FILES;
- CUDA headers are seen only by gpu/, and there not by headers that other folders can include.
tests/ and perf/ drive everything and are free, but CUDA stays in gpu/ and tests/gpu/.
"""
import posixpath
import re

FOLDERS = ("proto", "cpu_index", "storage", "daemon", "client", "gpu", "tests", "perf")

# Headers of another folder that a folder may include: a whole folder, or a pattern of files.
PLAIN = r"proto/(?!convert\.h$)[a-z0-9_]+\.h"
ALLOWED = {
    "proto": [],
    "cpu_index": [PLAIN],
    "storage": [PLAIN],
    "daemon": [PLAIN, r"cpu_index/.*", r"storage/.*"],
    "client": [r"proto/.*"],
    "gpu": [PLAIN, r"client/.*", r"cpu_index/(key_index|partial|simd|kernels|kernels_.*)\.h"],
    "tests": [r".*"],
    "perf": [r".*"],
}

WIRE_HEADERS = re.compile(r"(google/protobuf|grpc|grpcpp|grpc\+\+|quarry/v1)/")
# The daemon's service files: what turns messages into calls of the engine, and what starts them.
WIRE_FILES = re.compile(
    r"(proto/.*|client/.*\.cc|client/.*_impl\.h|client/calls\.h|daemon/(grpc_[a-z0-9_]+|call_[a-z0-9_]+)\.(h|cc)"
    r"|daemon/main\.cc|tests/.*|perf/.*)$")
DAEMON_CONVERT_FILES = re.compile(r"daemon/(grpc_[a-z0-9_]+|call_[a-z0-9_]+)\.(h|cc)$")
# Headers of proto/ that a plain file may include carry no wire types themselves.
WIRE_PROTO_HEADERS = {"proto/convert.h"}

CUDA_HEADERS = re.compile(
    r"(cuda[a-z0-9_]*\.h|cuda[a-z0-9_]*\.hpp|cuda/|cublas|cudnn|cusparse|curand|nvrtc|nvml\.h|nccl\.h"
    r"|cooperative_groups|cub/|thrust/|cutlass/|device_launch_parameters|sm_[0-9]+_|mma\.h|vector_types\.h)")
CUDA_FILES = re.compile(r"gpu/.*|tests/gpu/.*")

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
SOURCE_ENDINGS = (".h", ".hpp", ".cuh", ".cc", ".cpp", ".c", ".cu")


def includes(text):
    return [name for _, name in INCLUDE.findall(text)]


def resolve(includer, name, files):
    """The tree's own file that this include names, or None."""
    if name in files:
        return name
    beside = posixpath.normpath(posixpath.join(posixpath.dirname(includer), name))
    return beside if beside in files else None


def reach(path, files):
    """Every include seen by a file, directly or through the tree's headers, with the way there."""
    seen, todo, found = {path}, [(path, [path])], []
    while todo:
        current, way = todo.pop()
        for name in includes(files[current]):
            found.append((name, way))
            own = resolve(current, name, files)
            if own and own not in seen:
                seen.add(own)
                todo.append((own, way + [own]))
    return found


def _direction(path, files):
    folder = path.split("/")[0]
    for name in includes(files[path]):
        own = resolve(path, name, files)
        target = own or name
        top = target.split("/")[0]
        if top not in FOLDERS:
            continue  # the standard library, third-party and generated headers
        if not own:
            yield f"{path}: includes {name}, which does not exist"
        elif top == folder:
            continue
        elif folder == "daemon" and target in WIRE_PROTO_HEADERS:
            if not DAEMON_CONVERT_FILES.match(path):
                yield f"{path}: includes {name}; only the daemon's service files meet wire messages"
        elif not any(re.fullmatch(rule, target) for rule in ALLOWED[folder]):
            yield f"{path}: {folder}/ may not include {target}"


def _wire(path, files):
    if WIRE_FILES.match(path):
        return
    for name, way in reach(path, files):
        if WIRE_HEADERS.match(name):
            yield f"{path}: sees the wire header {name} through {' -> '.join(way)}"
            return


def _cuda(path, files):
    if not CUDA_FILES.match(path):
        for name, way in reach(path, files):
            if CUDA_HEADERS.match(name):
                yield f"{path}: sees the CUDA header {name} through {' -> '.join(way)}"
                return


def violations(files):
    result = []
    for path in sorted(files):
        if path.split("/")[0] not in FOLDERS:
            result.append(f"{path}: lies in no known folder")
            continue
        for check in (_direction, _wire, _cuda):
            result.extend(check(path, files))
    return result
