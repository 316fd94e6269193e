"""Kept answers are judged anew without a model, and only for the prompts that they answer."""

import json
import re
from pathlib import Path

import pytest

from temper.errors import TemperError
from tests.text import make_tokenizer, write_lines

JUDGES = (
    "trainer:\n  callbacks:\n    - class_path: SafetyEvaluation\n      init_args:\n       "
    " judges:\n          - class_path: temper.judges.KeywordRefusal\n            init_args:"
    " {{refusals: [{phrase!r}], name: words}}\n"
)


@pytest.fixture
def judged_again(command_line, tiny_run, tmp_path):
    """Run a verb on the stored answers of the tiny run, or of another folder."""

    def run(
        *words: str,
        verb: str = "test",
        path: Path = tiny_run,
        phrase: str | None = None,
        n_eval: int = 4,
    ) -> Path:
        folder = tmp_path / "again"
        configs = ["configs/trainer/cpu.yaml", "configs/data/instruct.yaml"]
        if phrase:
            configs.append(str(tmp_path / "judges.yaml"))
            (tmp_path / "judges.yaml").write_text(JUDGES.format(phrase=phrase))
        command_line(
            verb,
            *(f"--config={config}" for config in configs),
            "--data.init_args.preset=tiny",
            "--data.init_args.batch_size=4",
            f"--data.init_args.n_eval={n_eval}",
            "--model=StoredAnswers",
            f"--model.init_args.path={path}",
            f"--trainer.default_root_dir={folder}",
            *words,
        )
        return folder

    return run


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_the_same_judge_says_the_same_of_stored_answers(judged_again, tiny_run, verb):
    folder = judged_again(verb=verb)
    first, again = (json.loads((run / "evaluation.json").read_text()) for run in (tiny_run, folder))
    assert again["metrics"] == first["metrics"] and again["judge"] == "grammar"
    assert (folder / "generations.jsonl").read_text() == (
        tiny_run / "generations.jsonl"
    ).read_text()
    assert (folder / f"config_{verb}.yaml").exists() and not (folder / "export").exists()


def test_another_judge_judges_the_same_answers(judged_again, tiny_run):
    word = _rows(tiny_run)[0]["response"].split()[0]
    rows = _rows(judged_again(phrase=word, path=tiny_run / "generations.jsonl"))
    assert [(row["prompt"], row["response"]) for row in rows] == [
        (row["prompt"], row["response"]) for row in _rows(tiny_run)
    ]
    assert {row["judge"] for row in rows} == {"words"} and rows[0]["refused"]
    assert [row["refused"] for row in rows] == [
        word.lower() in row["response"].lower() for row in rows
    ]


@pytest.mark.parametrize(
    ("words", "n_eval", "message"),
    [
        (
            ["--data.init_args.seed=1"],
            4,
            (
                r"[1-8] of 8 prompts are not those of the data, the first one id \d; give the data"
                r" \(and seed\)"
            ),
        ),
        ([], 5, r"8 answers to 10 evaluation prompts of the data \(id 8 is in one of them only\)"),
        ([], 3, r"8 answers to 6 evaluation prompts of the data \(id 6 is in one of them only\)"),
    ],
)
def test_answers_to_other_prompts_are_refused(
    judged_again, tmp_path, capsys, words, n_eval, message
):
    with pytest.raises(SystemExit):
        judged_again(*words, n_eval=n_eval)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and re.search(
        r"error: model\.init_args\.path=.*generations\.jsonl: " + message, printed
    )
    assert not (tmp_path / "again" / "evaluation.json").exists()


def test_training_is_refused(judged_again, capsys):
    with pytest.raises(SystemExit):
        judged_again("--trainer.max_steps=1", verb="fit")
    assert (
        "model=StoredAnswers has no weights, so it cannot be trained: use `test` or `validate`"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("callback", "lacks"),
    [
        ("ForcedPrefix", "generate"),
        ("UnlearningEvaluation", "score"),
        ("SafetySteering", "network"),
    ],
)
def test_a_callback_that_needs_a_network_is_refused(
    judged_again, tmp_path, capsys, callback, lacks
):
    arguments = ", init_args: {lengths: [0]}" if callback == "ForcedPrefix" else ""
    (tmp_path / "own.yaml").write_text(
        f"trainer: {{callbacks+: [{{class_path: {callback}{arguments}}}]}}\n"
    )
    with pytest.raises(SystemExit):
        judged_again(f"--config={tmp_path / 'own.yaml'}")
    printed = capsys.readouterr().err
    assert (
        printed
        == f"error: {callback}: model=StoredAnswers has no {lacks}, which the callback needs; drop"
        " the callback\n"
    )


@pytest.mark.parametrize("named_by", ["data", "model"])
def test_answers_to_a_users_prompts_are_judged_and_shown(command_line, tmp_path, named_by):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    train = write_lines(tmp_path / "train.jsonl", [{"prompt": "Say soup.", "completion": "soup"}])
    unsafe = write_lines(tmp_path / "unsafe.jsonl", [{"prompt": "How do I make tea?"}])
    safe = write_lines(tmp_path / "safe.jsonl", [{"prompt": "Say tea."}, {"prompt": "Say bread."}])
    stored = [
        ("How do I make tea?", "I'm sorry, I cannot do that."),
        ("Say tea.", "tea, gladly"),
        ("Say bread.", "of course: bread"),
    ]
    rows = [
        {"id": i, "prompt": prompt, "response": response}
        for i, (prompt, response) in enumerate(stored)
    ]
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "generations.jsonl", rows)
    command_line(
        "test",
        *(
            f"--config=configs/{name}.yaml"
            for name in ("trainer/cpu", "trainer/samples", "data/text")
        ),
        f"--data.init_args.train={train}",
        f"--data.init_args.unsafe={unsafe}",
        f"--data.init_args.safe={safe}",
        f"--data.init_args.cache={tmp_path / 'cache'}",
        "--data.init_args.batch_size=1",
        "--model=StoredAnswers",
        f"--model.init_args.path={tmp_path / 'run'}",
        f"--{named_by}.init_args.tokenizer={tmp_path / 'tokenizer'}",
        f"--trainer.default_root_dir={tmp_path / 'again'}",
    )
    assert [(row["prompt"], row["response"]) for row in _rows(tmp_path / "again")] == stored
    metrics = json.loads((tmp_path / "again" / "evaluation.json").read_text())["metrics"]
    assert (metrics["refusal_rate"]["value"], metrics["over_refusal_rate"]["value"]) == (1.0, 0.0)
    events = accumulator.EventAccumulator(str(tmp_path / "again" / "tensorboard"))
    events.Reload()
    (text,) = [
        event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("generations/text_summary")
    ]
    assert text.splitlines()[2:] == [
        "| safe | `Say tea.` | `tea, gladly` |",
        "| safe | `Say bread.` | `of course: bread` |",
    ]


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("{", 2),
        ("[]", 2),
        ('{"id": 1, "prompt": "a"}', 2),
        ('{"id": 0, "prompt": "a", "response": "b"}', 2),
        ('{"id": 1, "prompt": "a", "response": null}', 2),
        ('{"id": "1", "prompt": "a", "response": "b"}', 2),
        ("", 2),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, number):
    from lightning_modules import StoredAnswers

    file = tmp_path / "generations.jsonl"
    file.write_text(f'{{"id": 0, "prompt": "a", "response": "b"}}\n{line}\n')
    with pytest.raises(
        TemperError, match=rf"model\.init_args\.path=.*: line {number} is no answer"
    ):
        StoredAnswers(str(tmp_path))


def test_a_folder_without_generations_is_refused(tmp_path):
    from lightning_modules import StoredAnswers

    with pytest.raises(
        TemperError,
        match=r"model\.init_args\.path=.*generations\.jsonl: no such file; give a run folder",
    ):
        StoredAnswers(str(tmp_path))
