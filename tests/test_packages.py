"""Errors about optional packages end in the command that installs them."""

import re
import tomllib
from pathlib import Path

import pytest

from temper import packages
from temper.errors import TemperError
from temper.packages import REQUIREMENTS, check_deepspeed, install_command, install_hint

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def test_every_extra_that_a_hint_names_exists():
    named = {name for text in REQUIREMENTS.values() for name in re.findall(r"\[([\w-]+)\]", text)}
    assert named and named <= EXTRAS.keys()


def test_a_package_with_an_extra_is_installed_by_it():
    assert install_command("lm_eval.tasks") == "pip install -e '.[lm-eval]'"


def test_a_package_without_an_extra_is_installed_by_its_name():
    assert install_hint("nowhere.at_all") == (
        "the package nowhere is not installed: pip install nowhere"
    )


def test_what_is_installed_is_found_without_importing_it():
    assert packages.is_installed("torch")
    assert not packages.is_installed("nowhere")


def _no_version(name: str) -> str:
    raise packages.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (_no_version, r"deepspeed is not installed: pip install .*\[deepspeed\].*or use fsdp2"),
        (lambda name: "0.20.1", r"DeepSpeed 0\.20\.1 .*supported version is 0\.19\.\*.*fsdp2"),
    ],
)
def test_another_deepspeed_is_refused(monkeypatch, version, message):
    monkeypatch.setattr(packages, "version", version)
    with pytest.raises(TemperError, match=message):
        check_deepspeed()


def test_the_supported_deepspeed_is_accepted(monkeypatch):
    asked = []
    monkeypatch.setattr(packages, "version", lambda name: asked.append(name) or "0.19.8")
    check_deepspeed()
    assert asked == ["deepspeed"]
