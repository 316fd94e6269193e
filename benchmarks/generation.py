"""Time of batched greedy generation, as evaluations do it, against simpler methods.

    python benchmarks/generation.py [--model models/smollm2-135m-instruct]

Greedy answers to harmless questions of different lengths, by three methods: each prompt alone with
transformers' `generate`; batches in file order, all padded to the longest prompt; and the method of
an evaluation (`EvalSet`: batches by length; `generate_greedy`: finished rows leave their batch).
Methods alternate in one process; times are medians. All methods must generate the same tokens.

--last-position compares, on the first batch and in two precisions, the output layer's input as
transformers passes it (a strided view) with a dense copy.
"""

import argparse
import contextlib
import itertools
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from temper.data import Batch, EvalSet, pad_left, select
from temper.models.generate import generate_greedy
from temper.models.score import contiguous_head_inputs

PLACES = (
    "the sea",
    "a forest",
    "the desert",
    "the mountains",
    "a river",
    "a city park",
    "the savanna",
    "a cave",
)
SHORT = ("Name {n} animals that live in {place}.", "What is {n} times {n}?")
LONG = (
    (
        "I am writing a short guide for children who visit {place} for the first time. They are"
        " about {n} years old and know little about nature. Explain in simple words what they may"
        " see there and why it is worth a visit."
    ),
    (
        "Yesterday I walked through {place} with {n} friends. We talked about the weather, about"
        " the plants around us and about the birds we heard, and in the end we could not agree"
        " whether such a walk is better in spring or in autumn. What do you think, and why?"
    ),
)


def make_questions(n: int) -> list[str]:
    """``n`` different questions, short and long in turn."""
    combinations = itertools.product(range(3, 40), PLACES, SHORT + LONG)
    texts = dict.fromkeys(
        template.format(n=number, place=place) for number, place, template in combinations
    )
    return list(itertools.islice(texts, n))


def make_prompts(tokenizer, texts: list[str]) -> Batch:
    """Prompts in the tokenizer's chat template, padded on the left, with row numbers."""
    turns = [[{"role": "user", "content": text}] for text in texts]
    ids = [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for turn in turns
    ]
    width = max(map(len, ids))
    ids_BT = torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])
    return pad_left(ids_BT, ids_BT != -1, tokenizer.pad_token_id) | {"ids": torch.arange(len(ids))}


@torch.no_grad()
def one_by_one(network, rows: Batch, new_tokens: int, batch_size: int) -> dict[int, list[int]]:
    """Generate for each prompt alone, without padding; answers by row number."""
    answers = {}
    for number, ids, mask in zip(
        rows["ids"].tolist(), rows["input_ids"], rows["attention_mask"].bool(), strict=True
    ):
        prompt = ids[mask][None]
        written = network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        answers[number] = written[0, prompt.shape[1] :].tolist()
    return answers


@torch.no_grad()
def in_file_order(network, rows: Batch, new_tokens: int, batch_size: int) -> dict[int, list[int]]:
    """Generate in batches padded to the longest prompt of all, until the last row has ended."""
    answers = {}
    for index in torch.arange(len(rows["ids"])).split(batch_size):
        batch = select(rows, index)
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        written = network.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
        answers |= dict(zip(batch["ids"].tolist(), written.tolist(), strict=True))
    return answers


def by_length(network, rows: Batch, new_tokens: int, batch_size: int) -> dict[int, list[int]]:
    """Generate as an evaluation does."""
    answers = {}
    for batch in EvalSet(rows, batch_size, 0, 1):
        written = generate_greedy(network, batch["input_ids"], batch["attention_mask"], new_tokens)
        answers |= dict(zip(batch["ids"].tolist(), written.tolist(), strict=True))
    return answers


def compare_last_position(network, rows: Batch, options: argparse.Namespace) -> None:
    """Print a table of times of the prompt pass and of whole answers, with the output layer's input
    as a strided view and as a dense copy.
    """
    prompt = {name: rows[name][: options.batch_size] for name in ("input_ids", "attention_mask")}
    print("| | strided view (transformers) | dense copy | same tokens |\n|---|---|---|---|")
    for dtype, new_tokens in itertools.product(
        (torch.bfloat16, torch.float32), (1, options.new_tokens)
    ):
        network.to(dtype)
        answers = {}
        times: dict[str, list[float]] = {"strided": [], "dense": []}
        for _, name in itertools.product(range(options.repeats), times):
            with contiguous_head_inputs(network) if name == "dense" else contextlib.nullcontext():
                start = time.perf_counter()
                answers[name] = network.generate(
                    **prompt, max_new_tokens=new_tokens, do_sample=False
                ).tolist()
                times[name].append(time.perf_counter() - start)
        same = sum(left == right for left, right in zip(*answers.values(), strict=True))
        seconds = " | ".join(f"{statistics.median(spent):.1f}" for spent in times.values())
        name = str(dtype).removeprefix("torch.")
        total = len(answers["dense"])
        print(f"| {name}, {new_tokens} new tokens | {seconds} | {same} of {total} |")


METHODS = {
    "one by one": one_by_one,
    "batches in file order": in_file_order,
    "batches by length": by_length,
}


def main() -> None:
    """Print a table of times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="models/smollm2-135m-instruct", help="folder of a chat model"
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--last-position", action="store_true", help="run only this comparison, on one batch"
    )
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    network = (
        AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32, local_files_only=True
        )
        .to(device)
        .eval()
    )
    rows = {
        name: value.to(device)
        for name, value in make_prompts(tokenizer, make_questions(options.prompts)).items()
    }
    if options.last_position:
        compare_last_position(network, rows, options)
        return
    lengths = rows["attention_mask"].sum(1)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    answers: dict[str, dict[int, list[int]]] = {}
    for _ in range(options.repeats):
        for name, generate in METHODS.items():
            start = time.perf_counter()
            answers[name] = generate(network, rows, options.new_tokens, options.batch_size)
            times[name].append(time.perf_counter() - start)
    eos = network.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos)
    print(
        f"{options.prompts} prompts of {lengths.min()} to {lengths.max()} tokens,"
        f" {options.new_tokens} new tokens at most, batches of {options.batch_size}, {device},"
        f" {torch.get_num_threads()} threads, medians of {options.repeats}\n"
    )
    print("| generation | seconds | times faster | same tokens as one by one |\n|---|---|---|---|")
    alone = answers["one by one"]
    base = statistics.median(times["one by one"])
    for name, spent in times.items():
        same = sum(
            _truncate(answers[name][number], ends) == _truncate(answer, ends)
            for number, answer in alone.items()
        )
        print(
            f"| {name} | {statistics.median(spent):.1f} | {base / statistics.median(spent):.1f} |"
            f" {same} of {len(alone)} |"
        )


def _truncate(answer: list[int], ends: set[int]) -> list[int]:
    """Truncate an answer after its first end token."""
    return next((answer[: i + 1] for i, token in enumerate(answer) if token in ends), answer)


if __name__ == "__main__":
    main()
