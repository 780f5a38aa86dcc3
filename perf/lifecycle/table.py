"""The table of all cells, and what it comes to."""
from lifecycle.cells import COUNTED, FULL, WANTED, Paired, tallies

COLUMNS = (  # name, heading, width, format
    ("model", "model", -8, ""), ("length", "length", 7, ""), ("task", "task", 9, ""), ("mode", "mode", 9, ""),
    ("turn", "turn", 5, ""), ("method", "method", 13, ""), ("n", "n", 5, ""), ("full", "full", 5, ""),
    ("right", "right", 6, ""), ("ratio", "ratio", 7, ".3f"), ("lost", "lost", 5, ""), ("won", "won", 4, ""),
    ("chance", "chance", 8, ".2g"), ("tokens_attended", "attended", 9, ".0f"), ("mib_read", "MiB", 8, ".2f"),
    ("ms", "ms", 7, ".0f"), ("verdict", "verdict", 8, ""))


def cell_row(cell, method, tally, paired, verdict):
    return {**dict(zip(("model", "length", "task", "mode", "turn"), cell)), "method": method, "n": paired.n,
            "full": paired.full, "right": paired.right, "ratio": paired.ratio, "lost": paired.lost, "won": paired.won,
            "chance": paired.chance, "tokens_attended": tally.mean("tokens_attended"),
            "tokens_in_reach": tally.mean("tokens_in_reach"), "mib_read": tally.mean("bytes_read") / 2**20,
            "ms": tally.mean("ms"), "verdict": verdict}


def right_of_all(rows):
    return f"{sum(row['right'] for row in rows)}/{sum(row['n'] for row in rows)}"


def all_cells(rows):
    def mean(name):
        return sum(row[name] for row in rows) / len(rows)

    worst = min(rows, key=lambda row: row["ratio"])
    return (f"{right_of_all(rows)}, {worst['ratio']:.3f}, {mean('tokens_attended'):.0f}, {mean('mib_read'):.0f}, "
            f"{mean('ms'):.0f}")


class Outcome:
    """A row for each cell and method, and the verdicts of the methods."""

    def __init__(self, rows, answers):
        self.answers = answers
        self.rows = []
        for cell, methods in sorted(tallies(rows).items()):
            if FULL not in methods:
                continue
            for method in sorted(methods, key=lambda name: (name != FULL, name)):
                paired = Paired(methods[FULL], methods[method])
                verdict = "" if method == FULL else paired.verdict(answers)
                self.rows.append(cell_row(cell, method, methods[method], paired, verdict))

    def of(self, method, verdict):
        return [row for row in self.rows if (row["method"], row["verdict"]) == (method, verdict)]

    def by_task(self):
        """A line of a Markdown table for each model, length and task: all of its cells together."""
        methods = sorted({row["method"] for row in self.rows} - {FULL})
        groups = {}
        for row in self.rows:
            place = (row["model"], row["length"], row["task"])
            groups.setdefault(place, {}).setdefault(row["method"], []).append(row)
        lines = ["| model | tokens | task | full | " +
                 " | ".join(f"{method}: right, worst cell, attended, MiB, ms" for method in methods) + " |",
                 "| --- " * (4 + len(methods)) + "|"]
        for place, rows in groups.items():
            columns = [*map(str, place), right_of_all(rows[FULL])]
            columns += [all_cells(rows[method]) if method in rows else "" for method in methods]
            lines.append(f"| {' | '.join(columns)} |")
        return lines

    def summary(self):
        """What counts, what is only listed, and what is lost, by method."""
        lines = [f"A cell counts if full attention has {COUNTED:.0%} of at least {self.answers} answers right, and holds "
                 f"if the method has {WANTED:.0%} of these: of 300, at most 3 fewer.",
                 "lost, won: answers that only full attention, only the method has right; chance: of losing as many if "
                 "either is as likely.",
                 "attended: tokens a row and head; MiB: K, V and indexes read in the daemon for a question."]
        for method in sorted({row["method"] for row in self.rows} - {FULL}):
            lines.append(f"{method}: {len(self.of(method, 'holds'))} cells hold, "
                         f"{len(self.of(method, 'loses'))} lose, {len(self.of(method, 'listed'))} are listed, "
                         f"{len(self.of(method, 'short'))} have too few answers")
            for verdict in ("loses", "listed"):
                for row in self.of(method, verdict):
                    where = " ".join(str(row[name]) for name in ("model", "length", "task", "mode", "turn"))
                    lines.append(f"  {verdict}: {where}: {row['right']} of {row['full']} of {row['n']}")
        return lines

    def text(self):
        def cells(values):
            return "".join(f"{value:<{-width}}" if width < 0 else f"{value:>{width}}"
                           for value, (_, _, width, _) in zip(values, COLUMNS))

        lines = [cells([heading for _, heading, _, _ in COLUMNS])]
        lines += [cells([format(row[name], form) for name, _, _, form in COLUMNS]) for row in self.rows]
        return "\n".join(lines + [""] + self.by_task() + [""] + self.summary())
