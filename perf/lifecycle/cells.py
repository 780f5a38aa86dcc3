"""Results as JSON lines in a file that grows, and what they come to in each cell.

A line {"row":"answers", ...} has what one method answered to one context's questions, cell by cell: `right` has
a 1 or a 0 for each, in the order that all methods share. A line {"row":"context", ...} has what the
context cost.
"""
import collections
import json
import math
import os

FULL = "full"
COUNTED = 0.6   # of the answers full attention has right, for a cell to count
WANTED = 0.99   # of full attention's right answers
SETTINGS = ("seed", "per_context", "window", "run_tokens", "index", "device")
NAMES = ("model", "task", "length", "context")
ROWS = ("answers", "context")


class ForeignFile(Exception):
    """Not a file of such lines."""


class Results:
    """The lines of `path`; those of other settings are kept apart, neither read nor written. ForeignFile,
    OSError: it is something else, and left as it is, or cannot be written."""

    def __init__(self, path, settings):
        self.path, self.settings = path, settings
        self.rows = []
        if path:
            self.rows = [row for row in (read(path) if os.path.exists(path) else [])
                         if all(row[name] == settings[name] for name in SETTINGS)]
            drop_unfinished_line(path)

    def has(self, model, task, length, context, method):
        return any((row["model"], row["task"], row["length"], row["context"], row.get("method")) ==
                   (model, task, length, context, method) for row in self.rows)

    def add(self, row):
        self.rows.append({**row, **self.settings})
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1], separators=(",", ":")) + "\n")


def drop_unfinished_line(path):
    """What a run that was killed while it wrote has left; of a file that `read` takes. Makes it if it is not there."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read(path):
    """The rows of a file, but for an unfinished last line."""
    with open(path, "rb") as file:
        *lines, rest = file.read().split(b"\n")
    start = f'{{"{NAMES[0]}":"'.encode()  # of every line that Results adds
    if not (rest.startswith(start) or start.startswith(rest)):
        raise ForeignFile(f"{path}: its last line is not of lifecycle_bench")
    return [parse(path, number, line) for number, line in enumerate(lines, 1)]


def parse(path, number, line):
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if (not isinstance(row, dict) or row.get("row") not in ROWS or
            any(name not in row for name in (*NAMES, *SETTINGS))):
        raise ForeignFile(f"{path}: line {number} is not of lifecycle_bench")
    return row


class Tally:
    """What a method's answers in a cell came to."""

    def __init__(self):
        self.right = {}  # by (settings, context): a string of 1 and 0
        self.sums = collections.Counter()

    def add(self, key, row):
        if key in self.right:
            return
        self.right[key] = row["right"]
        n = len(row["right"])
        self.sums["n"] += n
        self.sums["right"] += row["right"].count("1")
        for name in ("tokens_attended", "tokens_in_reach", "bytes_read", "ms"):
            self.sums[name] += n * row[name]

    def mean(self, name):
        return self.sums[name] / max(1, self.sums["n"])


class Paired:
    """A method beside full attention, over the contexts that both have answered."""

    def __init__(self, full, other):
        both = [key for key in other.right if key in full.right]
        pairs = [pair for key in both for pair in zip(full.right[key], other.right[key])]
        self.n = len(pairs)
        self.full = sum(f == "1" for f, _ in pairs)
        self.right = sum(o == "1" for _, o in pairs)
        self.lost = sum(f == "1" and o == "0" for f, o in pairs)
        self.won = sum(f == "0" and o == "1" for f, o in pairs)

    @property
    def ratio(self):
        return self.right / self.full if self.full else math.nan

    @property
    def chance(self):
        """How likely so many losses among the answers that differ are, if either is as likely."""
        differ = self.lost + self.won
        return sum(math.comb(differ, k) for k in range(self.lost, differ + 1)) / 2 ** differ

    def verdict(self, answers):
        if self.n < answers:
            return "short"
        if self.full < COUNTED * self.n:
            return "listed"
        return "holds" if self.ratio >= WANTED else "loses"


def tallies(rows):
    """Tallies by cell (model, length, task, mode, turn), by method."""
    cells = collections.defaultdict(lambda: collections.defaultdict(Tally))
    for row in rows:
        if row["row"] != "answers":
            continue
        key = (*(json.dumps(row[name]) for name in SETTINGS), row["context"])
        for cell in row["cells"]:
            where = (row["model"], row["length"], row["task"], cell["mode"], cell["turn"])
            cells[where][row["method"]].add(key, cell)
    return cells
