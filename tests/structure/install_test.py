#!/usr/bin/python3
"""Installs into an empty prefix, builds somebody else's project against it and runs that project
with the installed daemon."""
import argparse
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# In this order: grpc_engine finds the block that cpp_engine left, once it is published.
PROGRAMS = {"cpp_engine": "quarryd.sock", "c_engine": "quarryd.sock", "grpc_engine": "grpc.sock"}


def run(*command, **options):
    print("$", *command, flush=True)
    subprocess.run(command, check=True, **options)


def run_until_right(*command, attempts=50):
    for attempt in range(attempts):
        try:
            return run(*command)
        except subprocess.CalledProcessError:
            if attempt + 1 == attempts or "grpc_engine" not in command[0]:
                raise
            time.sleep(0.1)


def wait_for_socket(path, daemon, seconds):
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if daemon.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the installed quarryd did not make {path} (status {daemon.poll()})")
        time.sleep(0.02)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--build", required=True)
    arguments = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="quarry-install-") as directory:
        prefix, project = os.path.join(directory, "prefix"), os.path.join(directory, "build")
        run("cmake", "--install", arguments.build, "--prefix", prefix, stdout=subprocess.DEVNULL)
        run("cmake", "-S", os.path.join(HERE, "external"), "-B", project, "-G", "Ninja",
            f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release", stdout=subprocess.DEVNULL)
        run("cmake", "--build", project)

        # Nothing in the installed package may point back into the source or the build tree.
        source = os.path.dirname(os.path.dirname(HERE))
        for folder, _, names in os.walk(os.path.join(prefix, "lib")):
            for name in (n for n in names if n.endswith(".cmake")):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    if source in file.read():
                        sys.exit(f"{name} names the source tree {source}")

        socket = os.path.join(directory, "quarryd.sock")
        daemon = subprocess.Popen([os.path.join(prefix, "bin", "quarryd"), "--socket", socket,
                                   "--grpc-socket", os.path.join(directory, "grpc.sock"),
                                   "--metrics", "off", "--arena-bytes", "256MiB"])
        try:
            wait_for_socket(socket, daemon, 60)
            for program, name in PROGRAMS.items():
                run_until_right(os.path.join(project, program), os.path.join(directory, name))
            run(os.path.join(prefix, "bin", "quarry"), "--socket", socket, "status")
        finally:
            daemon.terminate()
            status = daemon.wait(30)
        if status != 0:
            sys.exit(f"the installed quarryd ended with status {status}")


if __name__ == "__main__":
    main()
