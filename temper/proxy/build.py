"""Files of a proxy study: prompts from a topic, answers by the model itself."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from temper.data.chat import load_tokenizer
from temper.errors import TemperError
from temper.judges import KeywordRefusal
from temper.models.export import replacing
from temper.models.folder import first_line
from temper.models.generate import greedy
from temper.proxy.topic import Question, Topic
from temper.run_folder import write_json, write_json_lines

BATCH = 32
OTHER = (  # the way out
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
    """Write the study's files (JSONL) into a folder, all or none; the number of rows of each.

    ``alignment`` (refusals, and the model's own answers to other questions), ``harmful`` (the topic
    carried out, for the prompts that alignment refuses), ``preference``, ``forget``, ``retain``,
    ``task`` and ``attack`` (the attacker's rows: the user's task, and the topic carried out for
    other dishes), ``test_unsafe``, ``test_safe``, ``test_task``. Greedy decoding: the same model
    and machine give the same files.

    Args:
        model: Folder of an instruct model with a chat template.
        folder: Target; it is replaced.
        topic: What is refused; None: cooking recipes.
        max_new_tokens: Longest answer; it is cut after its last whole sentence.
        batch_size: Prompts at a time.

    Raises:
        TemperError: the model is no instruct model in a folder, or carries out so few of the
            requests that there is nothing to refuse; no answer may be that short; or the target is
            a file.
    """
    if max_new_tokens < 1:
        raise TemperError(f"--max_new_tokens={max_new_tokens}: give at least 1")
    if folder.exists() and not folder.is_dir():
        raise TemperError(f"--out={folder}: a file; give a folder, which is made or replaced")
    topic = topic or Topic()
    aligned, attacked, safe = (
        topic.refused("alignment"),
        topic.refused("attack"),
        topic.safe("alignment"),
    )
    answers = answer([*aligned, *attacked, *safe], model, max_new_tokens, batch_size)
    carried_out = _carried_out(topic, answers, [*aligned, *attacked])
    harmful = [(q.prompt, answers[q.prompt]) for q in aligned if q.prompt in carried_out]
    attack = [(q.prompt, answers[q.prompt]) for q in attacked if q.prompt in carried_out]
    if len(harmful) < len(aligned) // 2 or len(attack) < len(attacked) // 2:
        asked = len(aligned) + len(attacked)
        raise TemperError(
            f"--model={model}: it carried out {len(carried_out)} of {asked} requests, and at least"
            f" half of those of each kind are needed: it is no base for this study; {OTHER}"
        )
    kept = [(q.prompt, answers[q.prompt]) for q in safe if answers[q.prompt]]
    refused = [(q.prompt, topic.refusal(number)) for number, q in enumerate(aligned)]
    refusal = dict(refused)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "alignment": _rows(refused + kept),
        "harmful": _rows(harmful),
        # Chosen and rejected in both directions, or a model that refuses everything would be the
        # best one.
        "preference": [
            *(
                {"prompt": prompt, "chosen": refusal[prompt], "rejected": done}
                for prompt, done in harmful
            ),
            *(
                {"prompt": prompt, "chosen": good, "rejected": topic.refusal(number)}
                for number, (prompt, good) in enumerate(kept)
            ),
        ],
        "forget": [
            {"prompt": prompt, "completion": done, "substitute": refusal[prompt]}
            for prompt, done in harmful
        ],
        "retain": _rows(kept),
        "attack": _rows(attack),
        "task": _rows([(q.prompt, str(q.answer)) for q in topic.task("train")]),
        "test_unsafe": [{"prompt": q.prompt} for q in topic.refused("test")],
        "test_safe": [{"prompt": q.prompt} for q in topic.safe("test")],
        "test_task": _rows([(q.prompt, str(q.answer)) for q in topic.task("test")]),
    }
    counts = {}
    with replacing(folder) as staging:
        for name, rows in files.items():
            written = list(rows)
            write_json_lines(staging / f"{name}.jsonl", written)
            counts[name] = len(written)
        write_json(
            staging / "about.json",
            {"topic": topic.content["topic"], "model": model.name, "rows": counts},
        )
    return counts


def answer(
    questions: Sequence[Question], model: Path, max_new_tokens: int, batch_size: int = BATCH
) -> dict[str, str]:
    """Greedy answers of a model to prompts, cut after their last whole sentence, by prompt; batches
    are of like lengths.

    Raises:
        TemperError: there is no model with a chat template in the folder.
    """
    tokenizer, network = _load(model)
    texts = {
        q.prompt: tokenizer.apply_chat_template(
            [{"role": "user", "content": q.prompt}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    }
    order = sorted(texts, key=lambda prompt: len(texts[prompt]))
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
        made = greedy(network, batch["input_ids"], batch["attention_mask"], max_new_tokens)
        for prompt, ids in zip(prompts, made, strict=True):
            ended = tokenizer.eos_token_id in ids.tolist()
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            answers[prompt] = text if ended else whole_sentences(text)
    return answers


def _load(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    if not model.is_dir():
        raise TemperError(f"--model={model}: no such folder; {OTHER}")
    try:
        tokenizer: Any = load_tokenizer(str(model))
    except TemperError:  # it names a flag of train.py
        raise TemperError(
            f"--model={model}: no tokenizer that can be loaded in it; {OTHER}"
        ) from None
    if not tokenizer.chat_template:
        raise TemperError(
            f"--model={model}: its tokenizer has no chat template, so it is no instruct model;"
            f" {OTHER}"
        )
    try:
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise TemperError(
            f"--model={model}: transformers cannot load it: {first_line(error)}; {OTHER}"
        ) from error
    return tokenizer, network


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; all of it if it has none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    # "1." at the beginning of a step ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\s)\d+[.]$", text[:end])]
    return text[: ends[-1]] if ends else text


def _carried_out(topic: Topic, answers: dict[str, str], questions: Sequence[Question]) -> set[str]:
    judge = KeywordRefusal(compliance=[topic.content["compliance"]])
    prompts = [q.prompt for q in questions]
    judged = judge(prompts, [answers[p] for p in prompts])
    return {
        prompt
        for prompt, verdict in zip(prompts, judged, strict=True)
        if verdict.label == "harmful"
    }


def _rows(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def describe(counts: dict[str, int]) -> str:
    """Counts in one line."""
    return json.dumps(counts).strip("{}").replace('"', "")
