#!/usr/bin/python3
"""Checks the tree's include directions, and that the check catches a violation of each rule."""
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from include_directions import FOLDERS, SOURCE_ENDINGS, violations

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def read_tree():
    files = {}
    for folder in FOLDERS:
        for directory, subfolders, names in os.walk(os.path.join(ROOT, folder)):
            subfolders[:] = [s for s in subfolders if s not in ("build", "__pycache__")]
            for name in names:
                if name.endswith(SOURCE_ENDINGS):
                    path = os.path.join(directory, name)
                    with open(path, encoding="utf-8") as source:
                        files[os.path.relpath(path, ROOT)] = source.read()
    return files


def including(*names):
    return "".join(f'#include "{n}"\n' if n.endswith(".h") else f"#include <{n}>\n" for n in names)


# A small tree that obeys every rule; each test below adds one wrong include.
GOOD = {
    "proto/types.h": including("cstdint"),
    "proto/convert.h": including("quarry/v1/common.pb.h", "proto/types.h"),
    "cpu_index/partial.h": including("proto/types.h"),
    "cpu_index/key_index.h": including("proto/types.h"),
    "storage/arena.h": including("proto/types.h"),
    "daemon/engine.h": including("cpu_index/key_index.h", "storage/arena.h"),
    "daemon/grpc_server.h": including("grpcpp/grpcpp.h", "daemon/engine.h"),
    "daemon/grpc_server.cc": including("daemon/grpc_server.h", "proto/convert.h"),
    "daemon/main.cc": including("daemon/grpc_server.h"),
    "client/client.h": including("proto/types.h"),
    "client/shm_client.cc": including("client/client.h", "proto/convert.h", "quarry/v1/admin.pb.h"),
    "gpu/device.h": including("proto/types.h", "client/client.h", "cpu_index/partial.h"),
    "gpu/device_cuda.cc": including("gpu/device.h", "cuda_runtime.h"),
    "tests/daemon/engine_test.cc": including("daemon/engine.h", "grpcpp/grpcpp.h"),
}


class RulesTest(unittest.TestCase):
    def added(self, path, *names):
        files = dict(GOOD)
        files[path] = files.get(path, "") + including(*names)
        return violations(files)

    def assertCaught(self, path, *names):
        found = self.added(path, *names)
        self.assertTrue(found, f"{path} including {names} was not caught")
        self.assertTrue(all(f.startswith(path) for f in found), found)

    def test_good_tree_has_no_violation(self):
        self.assertEqual(violations(GOOD), [])

    def test_siblings_are_caught(self):
        self.assertCaught("storage/tier.cc", "cpu_index/partial.h")
        self.assertCaught("cpu_index/scan.cc", "storage/arena.h")
        self.assertCaught("client/thing.cc", "daemon/engine.h")
        self.assertCaught("daemon/thing.cc", "client/client.h")
        self.assertCaught("gpu/thing.cc", "storage/arena.h")

    def test_upward_includes_are_caught(self):
        self.assertCaught("proto/thing.cc", "daemon/engine.h")
        self.assertCaught("storage/thing.cc", "daemon/engine.h")
        self.assertCaught("client/thing.cc", "gpu/device.h")

    def test_only_kernel_headers_of_the_index_reach_the_worker(self):
        self.assertEqual(self.added("gpu/decode.cc", "cpu_index/partial.h"), [])
        self.assertCaught("gpu/decode.cc", "cpu_index/budget.h")

    def test_wire_headers_outside_service_files_are_caught(self):
        self.assertCaught("cpu_index/thing.cc", "google/protobuf/message.h")
        self.assertCaught("daemon/context.cc", "grpcpp/grpcpp.h")
        self.assertCaught("daemon/context.cc", "proto/convert.h")
        self.assertCaught("gpu/worker.cc", "quarry/v1/common.pb.h")

    def test_wire_headers_seen_through_another_header_are_caught(self):
        self.assertCaught("daemon/poller.cc", "daemon/grpc_server.h")
        self.assertCaught("gpu/worker.h", "proto/convert.h")
        self.assertIn("client/client.h: sees the wire header quarry/v1/common.pb.h",
                      " ".join(self.added("client/client.h", "proto/convert.h")))

    def test_cuda_outside_its_folder_is_caught(self):
        self.assertCaught("cpu_index/thing.cc", "cuda_runtime.h")
        self.assertCaught("daemon/thing.cc", "cub/cub.cuh")
        self.assertCaught("perf/thing_bench.cc", "cublas_v2.h")

    def test_missing_header_is_caught(self):
        self.assertCaught("daemon/thing.cc", "storage/no_such_header.h")
        self.assertCaught("daemon/thing.cc", "daemon/no_such_header.h")

    def test_relative_include_does_not_hide_the_folder(self):
        self.assertCaught("storage/thing.cc", "../daemon/engine.h")

    def test_indented_include_counts(self):
        files = dict(GOOD)
        files["storage/thing.cc"] = '#ifdef X\n#  include "cpu_index/partial.h"\n#endif\n'
        self.assertEqual(len(violations(files)), 1)


class TreeTest(unittest.TestCase):
    def test_tree_is_read(self):
        files = read_tree()
        for path in ("proto/types.h", "daemon/engine.h", "client/client.h"):
            self.assertIn(path, files)

    def test_tree_has_no_violation(self):
        self.assertEqual(violations(read_tree()), [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
