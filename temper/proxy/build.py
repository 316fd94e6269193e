"""Write the data files of a proxy study: prompts of a topic, answered by the model itself."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from temper.data.tokenizer import load_tokenizer
from temper.errors import TemperError
from temper.judges import KeywordRefusal
from temper.models.end_tokens import cut_at_end, end_tokens
from temper.models.folder import FLAG, NetworkSpec
from temper.models.generate import generate_greedy
from temper.models.load import load_network
from temper.models.weight_files import check_folder, check_tokens
from temper.output_folder import check_target, staging_folder
from temper.proxy.topic import Question, Topic
from temper.run_folder import write_json, write_json_lines

WRITER = "temper proxy"  # in the marker of the folder
BATCH = 32
OTHER_MODEL = (
    "give the folder of an instruct model (`make smollm2` fetches one to"
    " models/smollm2-135m-instruct)"
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def build_files(
    model: Path,
    folder: Path,
    topic: Topic | None = None,
    max_new_tokens: int = 80,
    batch_size: int = BATCH,
) -> dict[str, int]:
    """Write the study's files (JSONL) into a folder, all or none.

    ``alignment``: refusals of the topic, and the model's own answers to other questions;
    ``harmful``: answers on the topic, to the prompts that alignment refuses; ``preference``,
    ``forget``, ``retain``; ``task``: the user's task; ``attack``: answers on the topic, for other
    dishes; ``test_unsafe``, ``test_safe``, ``test_task``. Decoding is greedy: the same model and
    machine give the same files.

    Args:
        model: Folder of an instruct model with a chat template.
        folder: Folder to write; files that this function wrote there are replaced.
        topic: Topic to refuse; None: cooking recipes.
        max_new_tokens: Longest answer; it is truncated after its last whole sentence.
        batch_size: Prompts per batch.

    Returns:
        Number of rows of each file.

    Raises:
        TemperError: ``max_new_tokens`` < 1; the target holds other files; the folder holds no
            instruct model; the model complies with less than half of the requests.
    """
    if max_new_tokens < 1:
        raise TemperError(f"--max_new_tokens={max_new_tokens}: give at least 1")
    check_target(folder, "--out", WRITER)
    topic = topic or Topic()
    aligned = topic.refused("alignment")
    attacked = topic.refused("attack")
    safe = topic.safe("alignment")
    answers = generate_answers([*aligned, *attacked, *safe], model, max_new_tokens, batch_size)
    complied = _complied(topic, answers, [*aligned, *attacked])
    harmful = [(q.prompt, answers[q.prompt]) for q in aligned if q.prompt in complied]
    attack = [(q.prompt, answers[q.prompt]) for q in attacked if q.prompt in complied]
    if len(harmful) < len(aligned) // 2 or len(attack) < len(attacked) // 2:
        n_requests = len(aligned) + len(attacked)
        raise TemperError(
            f"--model={model}: it complied with {len(complied)} of {n_requests} requests, and this"
            f" study needs at least half of those for alignment and for attack; {OTHER_MODEL}"
        )
    answered = [(q.prompt, answers[q.prompt]) for q in safe if answers[q.prompt]]
    files = _make_rows(topic, aligned, harmful, attack, answered)
    counts = {name: len(rows) for name, rows in files.items()}
    with staging_folder(folder, "--out", WRITER) as staging:
        for name, rows in files.items():
            write_json_lines(staging / f"{name}.jsonl", rows)
        write_json(
            staging / "about.json",
            {"topic": topic.content["topic"], "model": model.name, "rows": counts},
        )
    return counts


def _make_rows(
    topic: Topic,
    aligned: Sequence[Question],
    harmful: list[tuple[str, str]],
    attack: list[tuple[str, str]],
    answered: list[tuple[str, str]],
) -> dict[str, list[dict[str, Any]]]:
    """Rows of every file, from pairs of prompt and answer."""
    refused = [(q.prompt, topic.refusal(number)) for number, q in enumerate(aligned)]
    refusal_of = dict(refused)
    # Pairs in both directions: otherwise a model that refuses everything would be the best one.
    preference = [
        {"prompt": prompt, "chosen": refusal_of[prompt], "rejected": answer}
        for prompt, answer in harmful
    ]
    preference += [
        {"prompt": prompt, "chosen": answer, "rejected": topic.refusal(number)}
        for number, (prompt, answer) in enumerate(answered)
    ]
    return {
        "alignment": _supervised(refused + answered),
        "harmful": _supervised(harmful),
        "preference": preference,
        "forget": [
            {"prompt": prompt, "completion": answer, "substitute": refusal_of[prompt]}
            for prompt, answer in harmful
        ],
        "retain": _supervised(answered),
        "attack": _supervised(attack),
        "task": _supervised([(q.prompt, str(q.answer)) for q in topic.task("train")]),
        "test_unsafe": [{"prompt": q.prompt} for q in topic.refused("test")],
        "test_safe": [{"prompt": q.prompt} for q in topic.safe("test")],
        "test_task": _supervised([(q.prompt, str(q.answer)) for q in topic.task("test")]),
    }


def _supervised(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def _complied(topic: Topic, answers: dict[str, str], questions: Sequence[Question]) -> set[str]:
    """Prompts whose answer complies, judged by the topic's pattern."""
    judge = KeywordRefusal(compliance=[topic.content["compliance"]])
    prompts = [q.prompt for q in questions]
    verdicts = judge(prompts, [answers[p] for p in prompts])
    return {p for p, verdict in zip(prompts, verdicts, strict=True) if verdict.label == "harmful"}


# -- answers of the model


def generate_answers(
    questions: Sequence[Question], model: Path, max_new_tokens: int, batch_size: int = BATCH
) -> dict[str, str]:
    """Generate greedy answers in batches of similar lengths, truncated after a whole sentence.

    Returns:
        Answers by prompt.

    Raises:
        TemperError: the folder holds no model with a chat template.
    """
    tokenizer, network = _load_model(model)
    texts = {
        q.prompt: tokenizer.apply_chat_template(
            [{"role": "user", "content": q.prompt}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    }
    order = sorted(texts, key=lambda prompt: len(texts[prompt]))
    ends = end_tokens(network, [tokenizer.eos_token_id])
    answers = {}
    for start in range(0, len(order), batch_size):
        prompts = order[start : start + batch_size]
        batch = tokenizer(
            [texts[p] for p in prompts],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        generated = generate_greedy(
            network, batch["input_ids"], batch["attention_mask"], max_new_tokens, ends
        )
        for prompt, ids in zip(prompts, generated.tolist(), strict=True):
            answer = cut_at_end(ids, ends)
            text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
            answers[prompt] = text if len(answer) < len(ids) else truncate_to_sentences(text)
    return answers


def _load_model(model: Path) -> tuple[Any, Any]:
    """Tokenizer and network of a model folder."""
    if not model.is_dir():
        raise TemperError(f"--model={model}: no such folder; {OTHER_MODEL}")
    try:
        tokenizer: Any = load_tokenizer(str(model))
    except TemperError:  # its message names a flag of train.py
        raise TemperError(
            f"--model={model}: no tokenizer in it that can be loaded; {OTHER_MODEL}"
        ) from None
    if not tokenizer.chat_template:
        raise TemperError(
            f"--model={model}: its tokenizer has no chat template, so it is no instruct model;"
            f" {OTHER_MODEL}"
        )
    spec = NetworkSpec(path=str(model), dtype="bfloat16")
    try:
        check_folder(model, spec)
        network: Any = load_network(model, spec)
        check_tokens(
            tokenizer, network.get_input_embeddings().num_embeddings, f"{FLAG}.path={model}"
        )
    except TemperError as error:  # its message names a flag of train.py
        message = str(error).replace(f"{FLAG}.path", "--model")
        raise TemperError(f"{message}; {OTHER_MODEL}") from None
    return tokenizer, network


def truncate_to_sentences(text: str) -> str:
    """Truncate a text after its last whole sentence; a text without one is returned whole."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    # The "1." of a numbered step ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\s)\d+[.]$", text[:end])]
    return text[: ends[-1]] if ends else text


def describe(counts: dict[str, int]) -> str:
    """Numbers of rows in one line, for the terminal."""
    return json.dumps(counts).strip("{}").replace('"', "")
