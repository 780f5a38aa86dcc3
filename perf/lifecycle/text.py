"""Contexts of every task that the reference models were trained on, and questions about them.

The formats are those of tests/models/training/tasks.py (vocab.json has them too), in plain Python. All
that a question needs lies evenly spread behind the first and before the last tokens of the context, which
a worker keeps itself.
"""
import random
from typing import NamedTuple

from demo_text import Background

TURNS = 5
EXAMPLE_TOKENS = 11  # of icl


class Question(NamedTuple):
    tokens: list
    answer: list


class Context(NamedTuple):
    tokens: list
    questions: list  # in random order


class Pieces:
    """What tasks are made of: symbols of a vocabulary, in an order that the seed decides."""

    def __init__(self, vocabulary, seed):
        self.random = random.Random(seed)
        self.special = vocabulary.special
        ranges = vocabulary.ranges
        self.values, self.numerals = ranges["values"], ranges["numerals"]
        self.symbols = range(ranges["keys"].start, ranges["values"].stop)
        self.free = self.random.sample(ranges["keys"], len(ranges["keys"]))

    def take(self, count):
        """Key symbols that nothing else in the context has."""
        if count > len(self.free):
            raise ValueError(f"{count} key symbols are wanted, {len(self.free)} are left")
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def pick(self, symbols, count):
        return [self.random.choice(symbols) for _ in range(count)]

    def timed(self, chunks):
        """A time in order for each of chunks that depend on those before them."""
        return list(zip(sorted(self.random.random() for _ in chunks), chunks))


def key_values(pieces, records, symbols):
    """K a V c d, or K a b V c d with a and b in other records too | Q K a (b) A -> c d"""
    special, chunks, questions = pieces.special, [], []
    if symbols == 1:
        keys = [[key] for key in pieces.take(records)]
    else:
        side = min(int(1.5 * records ** .5) + 2, len(pieces.free) // 2)
        first, second = pieces.take(side), pieces.take(side)
        keys = [[first[cell % side], second[cell // side]]
                for cell in pieces.random.sample(range(side * side), records)]
    for key in keys:
        value = pieces.pick(pieces.values, 2)
        chunks.append([special["K"], *key, special["V"], *value])
        questions.append(Question([special["Q"], special["K"], *key, special["A"]], value))
    return chunks, questions


def kv1(pieces, tokens):
    return key_values(pieces, min(1024, tokens // 16), 1)


def kv2(pieces, tokens):
    return key_values(pieces, min(1024, tokens // 16), 2)


def ps(pieces, tokens):
    """SEP s1..s6, and look-alikes that share the prefix or the suffix | Q PFX s1 s2 SFX s5 s6 A -> s1..s6"""
    special, chunks, questions = pieces.special, [], []
    records = min(400, tokens // 64)
    symbols = pieces.take(min(256, 6 * records))
    for _ in range(records):
        s, other = pieces.pick(symbols, 6), pieces.pick(symbols, 6)
        alike = s[:2] + other[2:] if pieces.random.random() < .5 else other[:4] + s[4:]
        chunks += [[special["SEP"], *s], [special["SEP"], *alike]]
        questions.append(Question([special["Q"], special["PFX"], *s[:2], special["SFX"], *s[4:],
                                   special["A"]], s))
    pieces.random.shuffle(chunks)
    return chunks, questions


def vt(pieces, tokens):
    """VAR x EQ NUM v ; VAR y EQ x ; .. | Q EQ v A -> x y .. END"""
    special, timed, questions = pieces.special, [], []
    chains = min(60, tokens // 64)
    for value in pieces.random.sample(pieces.numerals[16:], chains):
        names = pieces.take(pieces.random.randint(2, 5))
        timed += pieces.timed([[special["VAR"], names[0], special["EQ"], special["NUM"], value]] + [
            [special["VAR"], name, special["EQ"], before] for before, name in zip(names, names[1:])])
        questions.append(Question([special["Q"], special["EQ"], value, special["A"]],
                                  [*names, special["END"]]))
    return [chunk for _, chunk in sorted(timed)], questions


def hop(pieces, tokens):
    """K a V b in a ring | Q HOP h a A -> the next h"""
    special = pieces.special
    ring = pieces.take(min(300, tokens // 16))
    count = len(ring)
    chunks = [[special["K"], name, special["V"], ring[(i + 1) % count]] for i, name in enumerate(ring)]
    pieces.random.shuffle(chunks)
    questions = [Question([special["Q"], special["HOP"], pieces.numerals[hops], name, special["A"]],
                          [ring[(i + 1 + step) % count] for step in range(hops)])
                 for i, name in enumerate(ring) for hops in range(1, 5)]
    return chunks, questions


class Classes:
    """Classes of 8 features and a label; a quarter of an example's features are noise."""

    def __init__(self, pieces, count):
        self.pieces, self.count = pieces, count
        self.features = pieces.take(8 * count)
        self.labels = pieces.random.sample(pieces.values, count)

    def example(self):
        """The number of its class, and the question that it is: EX f1..f8 LBL -> y."""
        random, special = self.pieces.random, self.pieces.special
        number = random.randrange(self.count)
        own = [random.choice(self.features) if random.random() < .25 else feature
               for feature in self.features[8 * number:8 * number + 8]]
        return number, Question([special["EX"], *own, special["LBL"]], [self.labels[number]])

    def questions(self, count):
        """No two of them are alike."""
        return list({tuple(one.tokens): one for _, one in (self.example() for _ in range(count))}.values())


def icl(pieces, tokens):
    """EX f1..f8 LBL y | EX f1..f8 LBL -> y"""
    classes = Classes(pieces, pieces.random.randint(4, 8))
    examples = [classes.example() for _ in range(min(1024, tokens // 32))]
    return ([[*one.tokens, *one.answer] for _, one in examples], classes.questions(min(1024, tokens // 16)))


def icl_wide(pieces, tokens):
    """As icl, of four classes whose examples fill the context: two thirds of a class have its label, which is the
    answer, and one third its wrong label. What most have is seen only by who sees many."""
    classes = Classes(pieces, 4)
    wrong_labels = pieces.random.sample([value for value in pieces.values if value not in classes.labels], 4)
    examples = [classes.example() for _ in range((tokens - 1024) // EXAMPLE_TOKENS)]
    labels = [classes.labels[number] for number, _ in examples]
    for number, wrong in enumerate(wrong_labels):
        own = [at for at, (its, _) in enumerate(examples) if its == number]
        for at in pieces.random.sample(own, len(own) // 3):
            labels[at] = wrong
    return ([[*one.tokens, label] for (_, one), label in zip(examples, labels)],
            classes.questions(min(1024, tokens // 16)))


def mf(pieces, tokens):
    """LST v, scattered | Q MAX A, Q MIN A, Q SND A -> the largest, smallest and second largest"""
    special = pieces.special
    listed = pieces.random.sample(pieces.numerals, min(pieces.random.randint(4, 32), tokens // 64))
    ordered = sorted(listed)
    return ([[special["LST"], value] for value in listed],
            [Question([special["Q"], special[what], special["A"]], [ordered[at]])
             for what, at in (("MAX", -1), ("MIN", 0), ("SND", -2))])


def copy(pieces, tokens):
    """COPY s1..s8 | COPY s1 s2 -> s3..s8"""
    runs = [[pieces.special["COPY"], *pieces.pick(pieces.symbols, 8)]
            for _ in range(min(64, tokens // 64))]
    return runs, [Question(run[:3], run[3:]) for run in runs]


TASKS = {task.__name__.replace("_", "-"): task for task in (kv1, kv2, ps, vt, hop, icl, icl_wide, mf, copy)}


def make_context(vocabulary, task, length, seed, first, last):
    """One more token than `length`, so that all of `length` can be reused; the seed, of whatever
    type random.Random takes, decides everything."""
    pieces = Pieces(vocabulary, seed)
    chunks, questions = TASKS[task](pieces, length)
    tokens, _ = Background(vocabulary, pieces.random).spread(length + 1, chunks, first, last)
    pieces.random.shuffle(questions)
    return Context(tokens, questions)


class Plan(NamedTuple):
    """Which questions of a context are asked: a conversation has no question twice, nor has a cell."""
    requests: list       # of questions
    conversations: list  # of TURNS questions each, fewer where the context has fewer


def make_plan(context, wanted):
    """At most `wanted` requests and conversations."""
    questions = context.questions
    count = len(questions)
    stride = max(1, count // (TURNS + 1))

    def at(number, column):
        return questions[(number + column * stride) % count]

    wanted = min(wanted, count)
    turns = min(TURNS, count)
    return Plan([at(number, TURNS) for number in range(wanted)],
                [[at(number, turn) for turn in range(turns)] for number in range(wanted)])
