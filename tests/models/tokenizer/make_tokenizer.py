#!/usr/bin/env python3
"""Trains the small SentencePiece tokenizer of the tests and writes what it must answer.

    pip install sentencepiece
    tests/models/tokenizer/make_tokenizer.py

The text is made from a seed, so that nothing but this file is needed. The answers come from
SentencePiece's own Python package.
"""
import io
import json
import pathlib
import random

import sentencepiece

HERE = pathlib.Path(__file__).parent
SUBJECTS = ["The archive", "A reader", "The old bridge", "Her letter", "The night train",
            "Every garden", "The engineer", "Die Straße", "Le café", "The memory"]
VERBS = ["keeps", "crosses", "remembers", "answers", "carries", "hides", "measures", "returns"]
OBJECTS = ["the key of record {}", "{} pages", "a number like {}", "nothing at all", "the river",
           "what was promised in {}", "naïve questions", "the long context"]
PROMPTS = ["", "The archive keeps the key of record 42.", "  two  spaces ", "naïve café Straße",
           "line one\nline two\ttab", "unseen: 漢字 🙂", "0123456789"]


def corpus():
    rng = random.Random(1)
    for _ in range(3000):
        yield (f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} "
               f"{rng.choice(OBJECTS).format(rng.randrange(2000))}.")


def main():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=model, vocab_size=250, model_type="bpe",
        remove_extra_whitespaces=False, bos_id=1, eos_id=2, num_threads=1)
    (HERE / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    cases = []
    for text in PROMPTS:
        ids = [processor.bos_id()] + processor.encode(text)
        cases.append({"text": text, "ids": ids, "decoded": processor.decode(ids)})
    golden = {"sentencepiece": sentencepiece.__version__, "cases": cases}
    (HERE / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
