#!/usr/bin/env python3
"""Are the bugs that peers really had found by our tests?

Each *.patch beside this program puts one of them into the tree. Its text, down to an empty line, says
what is wrong then, and names after "Tests:" the tests that must fail. Every patch is applied to a
scratch copy of the tree by itself, and only what its tests need is built. A patch that does not apply
or does not compile is an error, and so is a test that fails without any.

    tests/mutants/run.py                    all of them
    tests/mutants/run.py sync-error-ignored ...
    tests/mutants/run.py --check            only whether all apply
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Mutant:
    def __init__(self, path):
        self.name = path.stem
        self.path = path
        head = path.read_text().split("\n\n", 1)[0]
        self.what, _, tests = head.partition("\nTests:")
        self.tests = tests.split()
        if not self.tests:
            sys.exit(f"{path}: no line 'Tests: ...'")


class Scratch:
    """A copy of the tree, as it is now, with a build of its own."""

    def __init__(self, folder, jobs):
        self.root = folder / "tree"
        self.jobs = str(jobs)
        # The copy is no part of a repository; what is compiled once is found in ccache by copies
        # elsewhere.
        self.environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder),
                                CCACHE_BASEDIR=str(self.root), CCACHE_NOHASHDIR="1")
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        for name in filter(None, files.stdout.decode().split("\0")):
            if not (ROOT / name).is_file():
                continue
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)
        configured = self.run("cmake", "--preset", "dev", "-DQUARRY_PERF=OFF")
        if configured.returncode != 0:
            sys.exit(configured.stdout)

    def run(self, *command):
        return subprocess.run(command, cwd=self.root, env=self.environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def apply(self, mutant, *how):
        return self.run("git", "apply", *how, str(mutant.path))

    def build(self, tests):
        return self.run("cmake", "--build", "build/dev", "-j", self.jobs, "--target", *tests)

    def test(self, tests):
        return self.run("ctest", "--test-dir", "build/dev", "-R", f"^({'|'.join(tests)})$", "--timeout", "300",
                        "--no-tests=error", "--stop-on-failure", "--output-on-failure")


def verdict_of(mutant, scratch):
    applied = scratch.apply(mutant)
    if applied.returncode != 0:
        return "DOES NOT APPLY", applied.stdout
    built = scratch.build(mutant.tests)
    tested = scratch.test(mutant.tests) if built.returncode == 0 else None
    scratch.apply(mutant, "-R").check_returncode()
    if tested is None:
        return "DOES NOT COMPILE", built.stdout
    return ("SURVIVED" if tested.returncode == 0 else "killed"), tested.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of patches, without their ending")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true", help="only whether they apply to the tree as it is")
    given = parser.parse_args()
    mutants = [Mutant(path) for path in sorted(HERE.glob("*.patch"))]
    unknown = set(given.names) - {m.name for m in mutants}
    if unknown:
        sys.exit(f"unknown: {' '.join(sorted(unknown))}")
    mutants = [m for m in mutants if not given.names or m.name in given.names]
    if given.check:
        checked = [(m, subprocess.run(["git", "apply", "--check", str(m.path)], cwd=ROOT)) for m in mutants]
        bad = [m.name for m, check in checked if check.returncode != 0]
        print(f"{len(mutants) - len(bad)} of {len(mutants)} mutants apply")
        return 1 if bad else 0
    bad = []
    with tempfile.TemporaryDirectory(prefix="quarry-mutants-") as folder:
        scratch = Scratch(pathlib.Path(folder), given.jobs)
        tests = sorted({test for m in mutants for test in m.tests})
        for step in (scratch.build, scratch.test):
            done = step(tests)
            if done.returncode != 0:
                print(done.stdout)
                sys.exit(f"without a mutant: {step.__name__} fails")
        for mutant in mutants:
            began = time.monotonic()
            verdict, output = verdict_of(mutant, scratch)
            print(f"{verdict:16} {mutant.name:30} {time.monotonic() - began:4.0f} s  {' '.join(mutant.tests)}",
                  flush=True)
            if verdict != "killed":
                bad.append(mutant.name)
                print(output[-4000:])
    print(f"{len(mutants) - len(bad)} of {len(mutants)} mutants killed" + (f"; not: {' '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
