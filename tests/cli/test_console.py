"""The console command: one dispatcher, quick help, and exit statuses."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import temper
from temper.cli import console
from temper.cli.console import TRAINER_VERBS, help_text, main, verb_modules
from temper.cli.main import VERBS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verb(monkeypatch):
    """A verb ``study`` that runs a given function in place of its own."""

    def replace(run):
        module = types.ModuleType("temper.cli.verbs.study")
        module.main = run
        monkeypatch.setitem(sys.modules, "temper.cli.verbs.study", module)

    return replace


def test_the_verbs_of_the_trainer_are_those_of_train_py():
    assert TRAINER_VERBS.keys() == VERBS.keys()


def test_the_other_verbs_are_modules_with_a_main():
    assert verb_modules().keys() == {"study", "report", "edit", "proxy"}
    for name, line in verb_modules().items():
        module = importlib.import_module(f"temper.cli.verbs.{name}")
        assert callable(module.main)
        assert module.__doc__.splitlines()[0] == line


def test_the_help_has_every_verb_in_one_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in (TRAINER_VERBS | verb_modules()).items():
        assert f"  {name:<10} {text}" in lines
    assert max(map(len, lines)) <= 100
    assert help_text().splitlines() == lines


def test_the_help_does_not_import_torch():
    code = (
        "import sys; from temper.cli.console import main;"
        " status = main(['--help']); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"temper {temper.__version__}\n"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fti"], "unknown verb 'fti'; did you mean 'fit'?"),
        (["xyzzy"], "unknown verb 'xyzzy'; accepted: fit, validate,"),
        ([], "a verb is missing; give one of fit, validate,"),
    ],
)
def test_a_wrong_verb_is_one_line_and_status_2(words, found, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {found}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", ["edit", "proxy", "report", "study"])
def test_every_verb_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_verb_gets_its_words_and_passes_on_its_status(verb):
    seen = []

    def run(words):
        seen.append(words)
        return 3

    verb(run)
    assert main(["study", "studies/demo.yaml", "--cores", "2"]) == 3
    assert seen == [["studies/demo.yaml", "--cores", "2"]]


def _raising(error: BaseException):
    def run(words):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (temper.errors.TemperError("--x=1: no"), 2, "error: --x=1: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(), 0, ""),
        (SystemExit(75), 75, ""),
        (SystemExit("a reason"), 1, "a reason\n"),
    ],
)
def test_exit_statuses(verb, capsys, error, status, printed):
    verb(_raising(error))
    assert main(["study"]) == status
    assert capsys.readouterr().err == printed


def test_an_error_of_the_program_keeps_its_traceback(verb):
    verb(_raising(KeyError("bug")))
    with pytest.raises(KeyError):
        main(["study"])


def test_fit_is_train_py_fit(tiny_command, tiny_run, tmp_path):
    _, _, *words = tiny_command("fit", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "temper.cli.console", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "LightningCLI's args parameter" not in done.stderr
    weights = [folder / "export" / "model.safetensors" for folder in (tiny_run, tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {path.name for path in tiny_run.iterdir()} == {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_a_refused_fit_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["fit", "--trainer.max_stps=3", f"--trainer.default_root_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["temper", *words])
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and "'trainer.max_steps'" in line
    assert line.count("\n") == 1


def test_classes_of_the_current_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place != ""])
    console._make_current_folder_importable()
    console._make_current_folder_importable()
    assert sys.path.count(str(tmp_path)) == 1 and sys.path[-1] == str(tmp_path)


def test_a_checkout_with_a_package_of_its_own_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "temper" / "cli").mkdir(parents=True)
    (tmp_path / "temper" / "cli" / "console.py").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["fit"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and "temper.cli.console" in line


@pytest.mark.parametrize("words", ["--help", "study --help"])
def test_a_closed_pipe_ends_quietly(words):
    command = f"{sys.executable} -m temper.cli.console {words} | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == ""
    assert ended.stdout.strip() in ("141", "0")  # 0: all was read before the pipe closed


def test_another_broken_pipe_keeps_its_traceback(verb):
    def broken(argv):
        raise BrokenPipeError

    verb(broken)
    with pytest.raises(BrokenPipeError):
        main(["study"])
