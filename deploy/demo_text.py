"""The demo's text: records spread evenly over background text, and questions about them.

The same task as kv_prompt() of tests/models/training/tasks.py, which the reference models were
trained on, in plain Python so that the demo needs no packages: `K a b V c d` is a record, and
`Q K a b A` is answered by `c d`. Symbols come from the model's vocab.json.
"""
import base64
import json
import math
import os
import random

# What may follow two filler symbols: for each pair of classes of 14 symbols, three successors.
# It is the table that tasks.py draws from NumPy's generator with seed 12345; the models know it.
FILLER_TABLE = base64.b64decode(
    "qZybMqywEEbRLR+yy48Fl2vdqVd9vEFKyH+qhnkvtSmKM6WWlone0pOeBjefzMTUq6QQlZwdqxUiO1piOBBNxp9qRpze"
    "L6JJABmgpAytqzEHoFUST1fNI26mtExeaslosWolOzl9obbXb6YrigXGHNESTBQOG6iGr7RRv8KSvoZgSrDQ0Y88okmk"
    "FMBenRLQbXm9ekM4S9KVe3ZuW0bfPXiNrGV9f92Udck8StiYqsqJZok5pEHdTCCNMDmAu3lPuQ4gAYcFMowjTTQ/zIgr"
    "D2x5cIpbB6EnIVdZRKXU1mKmkJMhhLQpME2ryGpTW0Vqq3jLOdIbNUK83dM+E5VHOom7O2ypfzkvmIiQbyCf3DdNiLK7"
    "omgIKMYQPcEKcQcnX0G3qAhTVogttSkuU8Dfqk1KeTfPTQYTCWDYimysqXjHGEyOzhavJ7LXnje4gH2ZibcAEnC8uMRA"
    "m8xgrzwSiruWmEZgmHIo1jluAohBVC+duFHC0MNT2ZuMQ2JJgqJUD2poPYSbhtjYI1ENMVSvW2RcOiV1JBI1AIGFrlJp"
    "GS3GXy97RdFJUiE1MHFzDShKqSRkP0ccBj8sTnoTYE0fa5AVqsVkxHTUvxqKBljZtc0YszMbspXUp85AVcgwqGQluoGt"
    "SkCvw1Q0wRRNGZRKczFdYAKy3I9efkonxD0AKRMXadxsmb+la1+eh6+3OlTYPtM9npUKiD0lHXqWwgUJTTMABayBVE+X"
    "MyV42nxgm8I+3aQKXdiSQcfRlMF3ESSG0hJATcTF2QwHg4uqyZV3AKCXhRRctEDekdixrahL38Kbgglqv4OUJdsbpXe6"
    "fkdfSZxEJEdk1SWIXRw5NZ5k09GdVd1kGmydFEC9obpv2qQ1GgdzOVu1JycvXsSokzrFSokMnkfGKtF1DCPbBoOwcE+6"
    "EKnZPp+KSI1SGXIJi0bJoQEPiajdxq1UWgQfnIt40ajdJ6NZZiBnFq8l3XIMxIEvhW4DkTlMNgAw3xWaAnqrShhDUEYG"
    "U3+ISpsLqmsa")
FILLER_CLASS = 14
NOISE_SHARE = 0.35  # of the gaps hold random symbols instead of text


class Vocabulary:
    def __init__(self, model_directory):
        with open(os.path.join(model_directory, "vocab.json"), encoding="utf-8") as file:
            vocabulary = json.load(file)
        self.special = vocabulary["specials"]
        self.ranges = {name: range(*bounds) for name, bounds in vocabulary["ranges"].items()}


class Record:
    def __init__(self, key, answer):
        self.key, self.answer = key, answer
        self.position = None  # of its first token in the context


class Background:
    """Text of the models' training around records; `source` makes all random choices."""

    def __init__(self, vocabulary, source):
        self.vocabulary, self.random = vocabulary, source

    def spread(self, tokens, chunks, first=1, last=0):
        """`tokens` token ids that hold the chunks in their order, evenly spread behind the first
        `first` tokens and before the last `last`, and where each chunk begins."""
        text = tokens - 1 - sum(map(len, chunks))
        gaps = [0] * (len(chunks) + 1)
        gaps[0], gaps[-1] = first - 1, gaps[-1] + last
        free = text - sum(gaps)
        if free < 0:
            raise ValueError(f"{len(chunks)} records do not fit into {tokens} tokens")
        for _ in range(free):
            gaps[self.random.randrange(len(gaps))] += 1
        filler = self._filler(text)
        out, places = [self.vocabulary.special["BOS"]], []
        for gap, chunk in zip(gaps, chunks + [[]]):
            out.extend(self._gap(gap, filler))
            places.append(len(out))
            out.extend(chunk)
        return out, places[:-1]

    def _gap(self, length, filler):
        text = [next(filler) for _ in range(length)]
        if not text or self.random.random() >= NOISE_SHARE:
            return text
        low = self.vocabulary.ranges["values" if self.random.random() < .3 else "filler"].start
        noise = range(low, self.vocabulary.ranges["filler"].stop)
        return [self.vocabulary.special["NOISE"]] + [self.random.choice(noise) for _ in text[1:]]

    def _filler(self, length):
        """Order-2 Markov text over classes of symbols."""
        symbols = self.vocabulary.ranges["filler"]
        before, last = self.random.randrange(len(symbols)), self.random.randrange(len(symbols))
        for _ in range(length):
            yield symbols[before]
            draw = self.random.random()
            pick = (draw > .75) + (draw > .93)
            row = before // FILLER_CLASS * 16 + last // FILLER_CLASS
            following = FILLER_TABLE[3 * row + pick]
            if self.random.random() < .05:
                following = self.random.randrange(len(symbols))
            before, last = last, following


class KeyValueText:
    """A context of `tokens` token ids with `records` records; the seed decides everything."""

    RECORD_TOKENS = 6

    def __init__(self, vocabulary, tokens, records, seed):
        if records * self.RECORD_TOKENS > tokens // 2:
            raise ValueError(f"{records} records do not leave half of {tokens} tokens to text")
        self.vocabulary = vocabulary
        self.random = random.Random(seed)
        self.records = self._make_records(records)
        special = vocabulary.special
        self.tokens, places = Background(vocabulary, self.random).spread(
            tokens, [[special["K"], *record.key, special["V"], *record.answer]
                     for record in self.records])
        for record, place in zip(self.records, places):
            record.position = place

    def question(self, record):
        special = self.vocabulary.special
        return [special["Q"], special["K"], *record.key, special["A"]]

    def questions(self, count, first, last):
        """`count` records that lie outside the first `first` and the last `last` tokens."""
        end = len(self.tokens) - last - self.RECORD_TOKENS
        outside = [r for r in self.records if first <= r.position < end]
        if len(outside) < count:
            raise ValueError(f"only {len(outside)} of {len(self.records)} records lie outside the "
                             f"window; {count} questions are asked")
        return self.random.sample(outside, count)

    def _make_records(self, count):
        # Half of a key is often shared with other records, so that matching half is not enough.
        side = math.ceil(math.sqrt(count) * 1.5) + 1
        symbols = self.random.sample(self.vocabulary.ranges["keys"], 2 * side)
        cells = self.random.sample(range(side * side), count)
        values = self.vocabulary.ranges["values"]
        return [Record([symbols[cell % side], symbols[side + cell // side]],
                       [self.random.choice(values), self.random.choice(values)]) for cell in cells]
