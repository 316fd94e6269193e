"""Data take the tokenizer of the model unless one is given."""

import json
import shutil
from pathlib import Path

import pytest
from jsonargparse import Namespace

from temper.cli.parser import fill_tokenizer
from temper.errors import TemperError

NETWORK = {"revision": None, "local_files_only": True, "trust_remote_code": False}


def _config(path: Path | None, **arguments: object) -> Namespace:
    network = Namespace(path=None if path is None else str(path), **NETWORK)
    return Namespace(
        model=Namespace(
            class_path="lightning_modules.SFTModule", init_args=Namespace(network=network)
        ),
        data=Namespace(class_path="datamodules.Text", init_args=Namespace(**arguments)),
    )


def _filled(path: Path | None, **arguments: object) -> Namespace:
    config = _config(path, **arguments)
    fill_tokenizer(config)
    return config.data.init_args


@pytest.fixture
def adapter(tiny_run, tmp_path) -> Path:
    """An adapter folder on the tiny run's export, without a tokenizer."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tiny_run / "export"), "peft_type": "LORA"})
    )
    return folder


def test_the_tokenizer_is_that_of_the_models_folder(tiny_run):
    assert _filled(tiny_run / "export", tokenizer=None).tokenizer == str(tiny_run / "export")


@pytest.mark.parametrize(
    ("said", "model", "wanted"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_tokenizer_code_is_trusted_as_the_models_by_default(
    tiny_run, monkeypatch, said, model, wanted
):
    monkeypatch.setitem(NETWORK, "trust_remote_code", model)
    assert (
        _filled(tiny_run / "export", tokenizer=None, trust_remote_code=said).trust_remote_code
        is wanted
    )


def test_a_given_tokenizer_stays(tiny_run):
    assert _filled(tiny_run / "export", tokenizer="mine").tokenizer == "mine"


def test_data_without_the_argument_are_left_alone(tmp_path):
    assert _filled(tmp_path / "nowhere", preset="tiny") == Namespace(preset="tiny")


def test_an_adapter_without_a_tokenizer_stands_for_its_base(tiny_run, adapter):
    assert _filled(adapter, tokenizer=None).tokenizer == str(tiny_run / "export")


def test_an_adapter_with_a_tokenizer_has_its_own(tiny_run, adapter):
    shutil.copy(tiny_run / "export" / "tokenizer.json", adapter)
    assert _filled(adapter, tokenizer=None).tokenizer == str(adapter)


def test_random_weights_have_no_tokenizer():
    with pytest.raises(
        TemperError,
        match=r"data.init_args.tokenizer is not set, and data=Text needs one.*network.path",
    ):
        _filled(None, tokenizer=None)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TemperError, match="no tokenizer.json in it"):
        _filled(tmp_path, tokenizer=None)
