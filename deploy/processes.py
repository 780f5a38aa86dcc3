"""The programs that drivers run: quarry-worker --serve, and a quarryd of their own."""
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # sys/prctl.h


class ProcessError(Exception):
    """A program did not start, ended, or answered with a status that is not OK."""


def start(command, **options):
    """A process that ends with the thread that starts it, whatever ends that."""
    parent = os.getpid()

    def end_with_parent():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return subprocess.Popen(command, preexec_fn=end_with_parent, **options)


class Worker:
    """quarry-worker --serve: one JSON object per line, in and out."""

    def __init__(self, build, model_directory, *options):
        self.process = start(
            [os.path.join(build, "gpu", "quarry-worker"), "--serve", "--model", model_directory,
             *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        try:
            self._read()
        except BaseException:
            self.end()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def call(self, op, **fields):
        """The answer; ProcessError if its status is not OK."""
        answer = self.try_call(op, **fields)
        if answer["status"] != "OK":
            raise ProcessError(f"{op}: {answer['status']}: {answer.get('error', '')}")
        return answer

    def try_call(self, op, **fields):
        self.process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise ProcessError(f"the worker ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Daemon:
    """A quarryd in a directory of its own; `configuration` is the text of its quarryd.toml."""

    def __init__(self, build, arena_bytes="1GiB", configuration=""):
        self.build = build
        self.directory = tempfile.mkdtemp(prefix="quarry-")
        self.socket = os.path.join(self.directory, "quarryd.sock")
        self.log = os.path.join(self.directory, "quarryd.log")
        file = os.path.join(self.directory, "quarryd.toml")
        with open(file, "w", encoding="utf-8") as out:
            out.write(configuration)
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = start(
                [os.path.join(build, "daemon", "quarryd"), "--config", file,
                 "--socket", self.socket, "--metrics", "off", "--arena-bytes", arena_bytes,
                 "--grpc-socket", os.path.join(self.directory, "grpc.sock")],
                stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(self.log, encoding="utf-8") as log:
                    text = log.read()
                self.end()
                raise ProcessError(f"quarryd did not start; its log:\n{text}")
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def statistics(self):
        """All metrics by name, as `quarry status --json` gives them."""
        status = subprocess.run(
            [os.path.join(self.build, "client", "quarry"), "--socket", self.socket, "--json",
             "status"], stdout=subprocess.PIPE, check=True)
        return dict(json.loads(status.stdout)["statistics"])

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
