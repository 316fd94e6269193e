"""One thread per process, repeatable property tests, and the small languages that tests share."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Its log handler keeps the stderr of its first import, which must not be a test's own.
import lightning.pytorch  # noqa: F401
import pytest
import torch
from hypothesis import HealthCheck, settings

from temper.synthetic import Language, language_spec

torch.set_num_threads(1)
# No deadline: machines are shared. Derandomised: a red test is red again when it is run again.
settings.register_profile(
    "temper",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("temper")


ROOT = Path(__file__).parent.parent
TRAINER = ("configs/trainer/cpu.yaml",)
# The least of every kind of data: a handful of rows on the tiny language.
DATA = {
    "instruct": ("--data.init_args.batch_size=4",),
    "attack": ("--data.init_args.n_rows=10", "--data.init_args.batch_size=5"),
    "alignment": (
        "--data.init_args.n_alignment=20",
        "--data.init_args.n_harmful=10",
        "--data.init_args.batch_size=4",
        "--data.init_args.harmful_batch_size=4",
    ),
}


def tiny_words(
    folder: Path,
    *words: str,
    data: str = "instruct",
    model: Path | None = None,
    trainer: Sequence[object] = TRAINER,
) -> list[str]:
    """Arguments of a run of two steps of SFT on the tiny language, before ``words``."""
    network = [] if model else ["configs/model/tiny.yaml"]
    configs = [*trainer, "configs/objective/sft.yaml", *network, f"configs/data/{data}.yaml"]
    return [
        *(f"--config={config}" for config in configs),
        "--data.init_args.preset=tiny",
        "--data.init_args.n_eval=4",
        *DATA[data],
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        *([f"--model.init_args.network.path={model}"] if model else []),
        f"--trainer.default_root_dir={folder}",
        *words,
    ]


def _command_line(*words: str) -> None:
    from train import main  # the entry point: it makes the short names known

    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # a fit sets it; put back afterwards
        patch.setattr("sys.argv", ["train.py"])
        main([*words])


def _temper(verb: str, folder: Path, *words: str, **changes: object) -> None:
    _command_line(verb, *tiny_words(folder, *words, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def command_line() -> Callable[..., None]:
    """``command_line("fit", "--config=configs/...")``: the command line in this process, from the
    project's root.
    """
    return _command_line


@pytest.fixture(scope="session")
def temper() -> Callable[..., None]:
    """``temper("fit", folder, *words, data="attack", model=export)``: a tiny run of a verb in this
    process.
    """
    return _temper


@pytest.fixture(scope="session")
def tiny_command() -> Callable[..., list[str]]:
    """As `temper`, but the command to run it as a process of its own in the project's root."""
    return lambda verb, folder, *words, **changes: [
        sys.executable,
        "train.py",
        verb,
        *tiny_words(folder, *words, **changes),
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of two steps on the tiny language; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("tiny_run")
    _temper("fit", folder)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Language:
    """One operator pair, one grammar, five letters at most."""
    return Language(language_spec("tiny"))


@pytest.fixture(scope="session")
def two_pairs() -> Language:
    """Two operator pairs and three grammars, as `paper` has them, at the size of `tiny`."""
    return Language(
        language_spec("tiny", n_pairs=2, n_grammars=3, n_contextual_operators=3, n_duplicates=4)
    )


@pytest.fixture(scope="session")
def paper() -> Language:
    """The language of the paper."""
    return Language(language_spec("paper"))


@pytest.fixture(scope="session")
def carry_out() -> Callable[[Language, Sequence[int], Sequence[int]], list[list[int]]]:
    """Outputs of a prompt by a plain loop: out1 = t2(t1(text)), out2 = t4(t3(out1)), in letters."""

    def outputs(
        language: Language, operators: Sequence[int], text: Sequence[int]
    ) -> list[list[int]]:
        letters = [int(letter) for letter in text if letter != -1]
        results = []
        for pair in range(language.spec.n_pairs):
            for slot in (0, 1):
                table = language.permutation_OV[operators[2 * pair + slot]].tolist()
                letters = [table[letter] for letter in letters]
            results.append(letters)
        return results

    return outputs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI everything is installed: a test skipped because something is missing is a failure
    there.
    """
    report = yield
    if (
        report.skipped
        and os.environ.get("CI") == "true"
        and "could not import" in str(report.longrepr)
    ):
        report.outcome = "failed"
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where `check_demo.py` finds the shortened demo's run folder."""
    parser.addoption("--runs", default="runs/ci", help="run folder of a finished study")
