#!/usr/bin/python3
"""A client of the shared-memory protocol written from proto/SHM.md (and the messages of proto/quarry/v1)
with Python's standard library alone, against a real daemon: what the document leaves out fails here.

Usage: shm_reference.py QUARRYD
"""
import array
import ctypes
import math
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time

MAGIC = 0x31595251
HEADER, SLOT_PAYLOAD = 4096, 128
CALL, APPEND, ATTEND, LEASE, RELEASE, PUT, NOP = 1, 2, 3, 4, 5, 6, 7
OPEN, SEAL, CLOSE, STATUS = 1, 2, 4, 12


def check(condition, what):
    if not condition:
        sys.exit(f"shm_reference: {what}")


class Refused(Exception):
    """A request's status and text."""


# ---- Protobuf's wire format, as far as the messages here need it.
def varint(x):
    out = b""
    while x > 127:
        out, x = out + bytes([x & 127 | 128]), x >> 7
    return out + bytes([x])


def number(field, x):
    return varint(field << 3) + varint(x)


def data(field, x):
    return varint(field << 3 | 2) + varint(len(x)) + x


def fields_of(message):
    """Field number -> last value: an integer, or bytes."""
    def read():
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value
    at, out = 0, {}
    while at < len(message):
        tag = read()
        if tag & 7 == 0:
            out[tag >> 3] = read()
        else:
            size = {1: 8, 5: 4}.get(tag & 7)
            size = read() if size is None else size
            out[tag >> 3] = message[at:at + size]
            at += size
    return out


def exchange(sock, message, reply_bytes, descriptors):
    sock.sendmsg([message])
    reply, ancillary, _, _ = sock.recvmsg(reply_bytes + 1, socket.CMSG_SPACE(4 * descriptors))
    check(len(reply) == reply_bytes, f"reply of {len(reply)} bytes, expected {reply_bytes}")
    fds = array.array("i")
    for _, _, packed in ancillary:
        fds.frombytes(packed)
    return reply, list(fds)


class Client:
    def __init__(self, path, versions=(1, 1), slots=4, slot_bytes=65536):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.socket.connect(path)
        hello = struct.pack("<IHHIIQ40s", MAGIC, *versions, slots, 0, slot_bytes, b"reference")
        check(len(hello) == 64, "HelloRequest is 64 bytes")
        reply, fds = exchange(self.socket, hello, 256, 2)
        (magic, self.version, self.daemon_min, self.daemon_max, _, status, self.session, bytes_,
         self.slot_bytes, self.slots, _, tenant, text) = struct.unpack("<IHHHHIQQQII64s144s", reply)
        check(magic == MAGIC, f"magic {magic:#x}")
        if status != 0:
            raise Refused(status, text.rstrip(b"\0").decode())
        self.tenant = tenant.rstrip(b"\0").decode()
        check(self.version in (1, 2, 3) and len(fds) == 2, f"version {self.version}, {len(fds)} descriptors")
        self.memory = mmap.mmap(fds[0], bytes_)
        self.doorbell = fds[1]
        os.close(fds[0])
        magic, version, _, slots, self.ring, self.slots_at, slot_bytes = struct.unpack_from(
            "<IHHIIQQ", self.memory)
        check((magic, version, slots, slot_bytes) == (MAGIC, self.version, self.slots, self.slot_bytes),
              "the channel's header agrees with the handshake")
        check(self.ring == HEADER, f"the ring is at {self.ring}")
        self.submitted = 0
        self.generations = [0] * self.slots

    def close(self):
        self.socket.close()
        os.close(self.doorbell)

    def start(self, slot, opcode, payload, generation=None):
        """Writes `payload` and submits it; answers the generation."""
        at = self.slots_at + slot * self.slot_bytes
        self.memory[at + SLOT_PAYLOAD:at + SLOT_PAYLOAD + len(payload)] = payload
        struct.pack_into("<I", self.memory, at, 0)  # waiting
        self.generations[slot] = generation or self.generations[slot] + 1
        entry = self.ring + (self.submitted % self.slots) * 64
        struct.pack_into("<IHHQII", self.memory, entry + 8, slot, opcode, 0, len(payload),
                         self.generations[slot], 0)
        self.submitted += 1
        # One store of 8 bytes, after the others (x86 keeps their order). struct.pack_into would
        # write zeros first, and the daemon close a client whose sequence is 0.
        ctypes.c_uint64.from_buffer(self.memory, entry).value = self.submitted
        # Python has no fence between this store and a load of `parked`: always ring.
        os.write(self.doorbell, struct.pack("<Q", 1))

    def finish(self, slot):
        """The answer's payload, or Refused."""
        at = self.slots_at + slot * self.slot_bytes
        end = time.monotonic() + 20
        while struct.unpack_from("<I", self.memory, at + 64)[0] != self.generations[slot]:
            closing = struct.unpack_from("<I", self.memory, 132)[0]
            check(time.monotonic() < end, f"slot {slot} was not answered, closing is {closing}")
            time.sleep(0)
        status, size = struct.unpack_from("<IQ", self.memory, at + 68)
        payload = self.memory[at + SLOT_PAYLOAD:at + SLOT_PAYLOAD + size]
        if status != 0:
            raise Refused(status, payload.decode())
        return payload

    def request(self, opcode, payload=b"", slot=0):
        self.start(slot, opcode, payload)
        return self.finish(slot)

    def call(self, method, message=b""):
        return fields_of(self.request(CALL, struct.pack("<II", method, 0) + message))

    def read_slot(self, slot, offset, layout):
        return struct.unpack_from("<" + layout, self.memory,
                                  self.slots_at + slot * self.slot_bytes + offset)


def refusal(function, *arguments):
    try:
        function(*arguments)
    except Refused as refused:
        return refused.args
    return 0, ""


def handshake(path):
    status, text = refusal(Client, path, (4, 7))
    check(status == 9 and text, f"a client of versions 4 to 7 gets {status} {text!r}")
    newer = Client(path, (1, 7))  # speaks more than the daemon
    check(newer.version == 3, f"1 to 7 gave {newer.version}")
    newer.close()


def ring(client):
    for i in range(5 * client.slots + 3):  # round and round
        check(client.request(NOP, slot=i % client.slots) == b"", "nop answers nothing")
    for slot in reversed(range(client.slots)):  # all in flight
        client.start(slot, NOP, b"")
    for slot in range(client.slots):
        client.finish(slot)
    client.start(0, NOP, b"", generation=0xfffffffe)  # the last before the skipped two
    client.finish(0)
    client.generations[0] = 0
    client.request(NOP)
    status, text = refusal(client.request, 99)
    check(status == 3 and "99" in text, f"opcode 99 gives {status} {text!r}")


def blocks(client):
    name_space, key, stored = b"reference/ns", b"\0key\xff", random.randbytes(5000)
    names = name_space + key
    offset = SLOT_PAYLOAD + 48 + len(names)
    put = struct.pack("<IIQQQQII", len(name_space), len(key), offset, len(stored), 0, 0, 0, 0)
    check(len(put) == 48, "PutHeader is 48 bytes")
    reply = client.request(PUT, put + names + stored)
    check(len(reply) == 56, f"PutReply of {len(reply)} bytes")
    low, high, existed = struct.unpack_from("<QQI", reply, 32)
    check(existed == 0, "a new block")
    check(struct.unpack_from("<I", client.request(PUT, put + names + stored), 48)[0] == 1,
          "the second put finds the first")
    wrong = struct.pack("<IIQQQQII", len(name_space), len(key) - 1, offset, len(stored), low ^ 1,
                        high, 1, 0)
    check(refusal(client.request, PUT, wrong + names + stored)[0] == 15, "DataLoss of a wrong digest")

    header = struct.pack("<IIQII", 2, 0, 0, len(name_space), len(key))
    reply = client.request(LEASE, header + names)
    check(len(reply) == 48, f"LeaseReply of {len(reply)} bytes")
    lease, at, size, lease_low, lease_high, extent = struct.unpack_from("<QQQQQI", reply)
    check((size, lease_low, lease_high) == (len(stored), low, high), "the lease has the put's digest")
    reply, fds = exchange(client.socket, struct.pack("<II", 1, extent), 32, 1)
    kind, status, number_, _, extent_bytes, _ = struct.unpack("<IIIIQQ", reply)
    check((kind, status, number_, len(fds)) == (1, 0, extent, 1), "the extent's descriptor")
    check(at + size <= extent_bytes, "the lease lies in its extent")
    try:
        mmap.mmap(fds[0], extent_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        sys.exit("an extent can be mapped for writing")
    except PermissionError:
        pass
    with mmap.mmap(fds[0], extent_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        check(mapped[at:at + size] == stored, "the leased bytes are those put")
    os.close(fds[0])
    check(client.request(RELEASE, struct.pack("<Q", lease)) == b"", "release answers nothing")
    check(refusal(client.request, RELEASE, struct.pack("<Q", lease))[0] == 5, "released once")
    header = struct.pack("<IIQII", 2, 0, 0, len(name_space), 1)
    check(refusal(client.request, LEASE, header + name_space + b"x")[0] == 5, "a miss is NotFound")
    reply, fds = exchange(client.socket, struct.pack("<II", 1, 0xfffffff0), 32, 1)
    check(struct.unpack_from("<II", reply) == (1, 5) and not fds, "no such extent")


LAYERS, HEADS, KV_HEADS, DIM, TOKENS, SAMPLES = 1, 4, 2, 16, 40, 2


def open_context(client):
    shape = number(1, LAYERS) + number(2, HEADS) + number(3, KV_HEADS) + number(4, DIM) + number(5, 3)
    rope = (data(1, struct.pack("<8f", *[2.0 ** -i for i in range(8)]))
            + varint(2 << 3 | 5) + struct.pack("<f", 1) + number(3, 16) + number(5, 3))
    model = (data(1, b"reference") + data(2, shape) + data(3, b"\x77" * 32)
             + data(4, b"\x78" * 32) + data(6, rope))
    return client.call(OPEN, data(1, model) + number(4, 300))[1]


def append(client, context, keys, values):
    """Token ids and query samples travel too."""
    row = KV_HEADS * DIM
    parts = [struct.pack(f"<{TOKENS * row}f", *keys), struct.pack(f"<{TOKENS * row}f", *values),
             struct.pack(f"<{TOKENS}I", *range(TOKENS)),
             struct.pack(f"<{SAMPLES * HEADS * DIM}f", *[0.5] * (SAMPLES * HEADS * DIM)),
             struct.pack(f"<{SAMPLES}I", 3, 17)]
    offsets = [SLOT_PAYLOAD + 80]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part))
    header = struct.pack("<QIIIIIIII5Q", context, 0, 0, KV_HEADS, 0, TOKENS, TOKENS, SAMPLES, 0,
                         offsets[0], offsets[1], offsets[2], offsets[3], offsets[4])
    check(len(header) == 80, "AppendHeader is 80 bytes")
    check(client.request(APPEND, header + b"".join(parts)) == b"", "append answers nothing")
    status, text = refusal(client.request, APPEND, header + b"".join(parts))
    check(status == 3 and text, f"a second append of the same tokens gives {status} {text!r}")


def attend_rows(context, q, lo, hi, token):
    """Two rows: one over [lo, hi) that also brings token TOKENS, one whose range is beyond."""
    at = SLOT_PAYLOAD + 8 + 2 * 88
    size = {"q": 4 * HEADS * DIM, "k": 4 * KV_HEADS * DIM, "o": 4 * HEADS * DIM, "lse": 4 * HEADS}
    places = [at]
    for name in ("q", "k", "k", "o", "lse", "o"):
        places.append(places[-1] + size[name])
    q_at, k_at, v_at, o_at, lse_at, o2_at, lse2_at = places
    def row(lo, hi, has_token, o, lse):
        return struct.pack("<QIIIIIBBBBIfII5Q", context, 0, lo, hi, 0, HEADS, 0, 3, has_token, 0, 0,
                           0, TOKENS if has_token else 0, 0, q_at, k_at, v_at, o, lse)
    rows = row(lo, hi, 1, o_at, lse_at) + row(lo, 10 * TOKENS, 0, o2_at, lse2_at)
    check(len(rows) == 2 * 88, "AttendRowPod is 88 bytes")
    payload = (struct.pack("<II", 2, 0) + rows + struct.pack(f"<{HEADS * DIM}f", *q)
               + struct.pack(f"<{2 * KV_HEADS * DIM}f", *token))
    return payload, o_at, lse_at


def attention(keys, values, q, lo, hi, head):
    kv = head // (HEADS // KV_HEADS)
    at = [(t * KV_HEADS + kv) * DIM for t in range(lo, hi)]
    scores = [sum(q[head * DIM + d] * keys[i + d] for d in range(DIM)) / math.sqrt(DIM) for i in at]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = sum(weights)
    o = [sum(w * values[i + d] for w, i in zip(weights, at)) / total for d in range(DIM)]
    return o, top + math.log(total)


def contexts(client, pid):
    status = client.call(STATUS)
    check(status[2] == pid, f"Status says pid {status[2]}")
    check(refusal(client.call, CLOSE, number(1, 99))[0] == 5, "an unknown context is NotFound")
    check(refusal(client.call, 1000)[0] == 12, "an unknown method is Unimplemented")
    context = open_context(client)
    single = lambda: struct.unpack("<f", struct.pack("<f", random.uniform(-1, 1)))[0]
    keys, values = ([single() for _ in range(TOKENS * KV_HEADS * DIM)] for _ in range(2))
    append(client, context, keys, values)
    q = [single() for _ in range(HEADS * DIM)]
    token = [single() for _ in range(2 * KV_HEADS * DIM)]
    lo, hi = 3, TOKENS + 1  # with the token that the row brings
    payload, o_at, lse_at = attend_rows(context, q, lo, hi, token)
    slot = 1
    client.memory[64:68] = struct.pack("<I", 1)  # armed
    answer = client.request(ATTEND, payload, slot)  # o and lse lie behind the request
    client.memory[64:68] = struct.pack("<I", 0)
    keys += token[:KV_HEADS * DIM]
    values += token[KV_HEADS * DIM:]
    code, generation, covered_lo, covered_hi, tokens = struct.unpack_from("<IIIIQ", answer)
    check((code, generation) == (0, client.generations[slot]), f"row 0: {code}, {generation}")
    check((covered_lo, covered_hi, tokens) == (lo, hi, (hi - lo) * HEADS), "row 0's coverage")
    code, generation = struct.unpack_from("<II", answer, 40)
    check((code, generation) == (3, client.generations[slot]), f"row 1: {code}, {generation}")
    o = client.read_slot(slot, o_at, f"{HEADS * DIM}f")
    lse = client.read_slot(slot, lse_at, f"{HEADS}f")
    for head in range(HEADS):
        want_o, want_lse = attention(keys, values, q, lo, hi, head)
        check(abs(lse[head] - want_lse) < 1e-4, f"lse of head {head}")
        check(max(abs(a - b) for a, b in zip(o[head * DIM:], want_o)) < 1e-4, f"o of head {head}")
    client.call(CLOSE, number(1, context))


def malformed(path):
    client = Client(path)
    client.start(0, NOP, b"", generation=0xffffffff)
    check(client.socket.recv(1) == b"", "a malformed entry closes the client")
    closing = struct.unpack_from("<I", client.memory, 132)[0]
    check(closing == 1, f"closing is {closing}")


def main():
    seed = int(os.environ.get("QUARRY_TEST_SEED", time.time_ns() % 1000000))
    print(f"QUARRY_TEST_SEED={seed}")
    random.seed(seed)
    with tempfile.TemporaryDirectory(prefix="quarry-shm-") as directory:
        path = os.path.join(directory, "q.sock")
        log = open(os.path.join(directory, "log"), "w+")
        daemon = subprocess.Popen([sys.argv[1], "--socket", path, "--grpc-socket",
                                   os.path.join(directory, "g.sock"), "--metrics", "off",
                                   "--arena-bytes", "64MiB"], stderr=log)
        try:
            end = time.monotonic() + 30
            while not os.path.exists(path):
                check(daemon.poll() is None and time.monotonic() < end, "quarryd does not start")
                time.sleep(0.02)
            handshake(path)
            client = Client(path)
            ring(client)
            blocks(client)
            contexts(client, daemon.pid)
            malformed(path)
            check(client.request(NOP) == b"", "another client's end does not matter")
            daemon.terminate()
            check(client.socket.recv(1) == b"", "the daemon's end hangs up")
            check(daemon.wait(20) == 0, "the daemon ends with 0")
        except SystemExit:
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        finally:
            daemon.kill()
            daemon.wait()


if __name__ == "__main__":
    main()
