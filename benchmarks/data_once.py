"""Work that a run does on a user's files before and beside training: python benchmarks/data_once.py
[--rows 200000] [--before FOLDER].

Writes a training file, three sets of evaluation prompts and a cache of tokens (not measured), and
then measures the start of a run of two ranks that validates and fits, and batches of its stream.
``--before`` names a checkout of an earlier commit, which is measured on the same files and the same
cache. Prints a Markdown table of CPU seconds: everything runs in one thread, so on an idle machine
they are the seconds that a user waits.
"""

import argparse
import functools
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("unsafe", "safe", "task")
N_EVAL = 200  # prompts of each kind
N_WORKERS = 2  # loader processes that are sent the pool
N_BATCHES = 200
SEARCH = "search a training file for evaluation prompts"
HASH = "hash the token cache"
CONTENT = "hash a training file"
BATCH = f"draw {N_BATCHES} batches of 16 rows"
START = "whole start of the run, both ranks"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000, help="training rows (default: 200000)")
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit to compare with")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, options.rows)
        write_cache(folder)
        before = measured_by(options.before, folder) if options.before else None
        after = measured_by(ROOT, folder)
    if before and before["fingerprints"] != after["fingerprints"]:
        raise SystemExit("the two commits do not make the same rows")
    print(f"| {options.rows:,} rows | calls before | s | calls after | s |")
    print("|---|---|---|---|---|")
    for work, (calls, seconds) in after["work"].items():
        earlier = before["work"].get(work, (0, 0.0)) if before else ("", None)
        cells = [str(earlier[0]), "" if earlier[1] is None else f"{earlier[1]:.2f}"]
        print(f"| {work} | {cells[0]} | {cells[1]} | {calls} | {seconds:.2f} |")


def write_files(folder: Path, n_rows: int) -> None:
    """A tokenizer of whole words, and files of random words, seeded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(5000)]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder / "tokenizer")
    rng = random.Random(0)

    def text(n_words: int) -> str:
        return " ".join(rng.choices(words, k=n_words))

    for name, n in {"train": n_rows, **dict.fromkeys(KINDS, N_EVAL)}.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(n):
                file.write(json.dumps({"prompt": text(40), "completion": text(40)}) + "\n")


def write_cache(folder: Path) -> None:
    """The tokens of the training file: a word a token, instead of a template and a tokenizer, which
    are not what is measured here.
    """
    from temper.data.chat import Encoded

    data = datamodule(folder)
    vocabulary = data.tokenizer.get_vocab()

    def encode(messages: Any, answer: str, all_turns: bool | None) -> Encoded:
        prompt = [vocabulary[word] for word in messages[-1].content.split()]
        completion = [vocabulary[word] for word in answer.split()]
        trained = [False] * len(prompt) + [True] * len(completion)
        return Encoded(prompt + completion, trained)

    data.format.encode = encode
    data.pool("train")


def datamodule(folder: Path) -> Any:
    """A datamodule on the files."""
    from datamodules import TextSupervised

    prompts: dict[str, Any] = {kind: str(folder / f"{kind}.jsonl") for kind in KINDS}
    return TextSupervised(
        train=str(folder / "train.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        template="plain",
        cache=str(folder / "cache"),
        **prompts,
    )


def measured_by(checkout: Path, folder: Path) -> dict[str, Any]:
    """What a checkout's code does, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(folder)],
        env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
        cwd=checkout,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Calls and seconds of every kind of work, and fingerprints of the rows."""
    import datamodules.text
    import temper.data.token_pool

    work: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def timed(name: str, module: Any, function: str) -> None:
        original = getattr(module, function)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            started = time.process_time()
            result = original(*arguments, **settings)
            work[name][0] += 1
            work[name][1] += time.process_time() - started
            return result

        setattr(module, function, wrapped)

    timed(SEARCH, datamodules.text, "find_leaks")
    timed(CONTENT, datamodules.text, "content_hash")
    timed(HASH, temper.data.token_pool, "_sha256")
    for name in (SEARCH, CONTENT, HASH):
        work[name] = [0, 0.0]
    given: list[Any] = []
    if hasattr(datamodules.text, "gather_objects"):  # the ranks run one after the other

        def gather(value: Any) -> list[Any]:
            given.append(value)
            return [given[0], value]

        datamodules.text.gather_objects = gather
    started = time.process_time()
    for rank in range(2):
        data = datamodule(folder)
        data.trainer = SimpleNamespace(global_rank=rank, local_rank=rank, world_size=2)
        for stage in ("validate", "fit"):
            if rank == 0:
                data.prepare_data()
            data.setup(stage)
        source = data.sources["train"]
        for _ in range(N_WORKERS):
            pickle.loads(pickle.dumps(source))
    work[START] = [1, time.process_time() - started]
    started = time.process_time()
    for number in range(N_BATCHES):
        source.batch(number)
    work[BATCH] = [N_BATCHES, time.process_time() - started]
    return {"work": work, "fingerprints": data.fingerprints()}


if __name__ == "__main__":
    main()
