"""The disk cache of reference log-probabilities: keys, reuse, damage and interruption."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from temper.data import PoolSource
from temper.errors import TemperError
from temper.models import AdapterOff, CachedSums, FrozenCopy, score
from temper.models import reference as reference_cache
from temper.models.reference import cache_key, reference_sums
from temper.synthetic import build_tokenizer, language_spec
from tests.objectives import exact_network
from tests.preference import make_pairs


@pytest.fixture(scope="module")
def data() -> Any:
    """A datamodule of twelve pairs."""
    data = make_pairs()
    data.setup("fit")
    return data


@pytest.fixture
def network(data) -> torch.nn.Module:
    """A float64 GPT-2."""
    return exact_network(len(data.tokenizer))


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Number of rows of every forward pass that fills a cache."""
    passes: list[int] = []

    def counted(network, rows, **settings):
        passes.append(len(rows["input_ids"]))
        return score(network, rows, **settings)

    monkeypatch.setattr(reference_cache, "score", counted)
    return passes


def _table(network, data, folder, source=None, **settings):
    return reference_sums(
        network, source or data.sources["pairs"], data.tokenizer, folder, "pairs", **settings
    )


def test_a_table_holds_the_sums_of_every_row_by_number(network, data, tmp_path):
    rows = data.sources["pairs"].rows
    table = _table(network, data, tmp_path, batch_size=5)
    with torch.no_grad():
        assert torch.allclose(table, score(network, rows).sums, rtol=1e-13, atol=0)
    shuffled = data.sources["pairs"].batch(0)
    found = CachedSums({"pairs": table}).score(shuffled, "pairs")
    assert found.sums.equal(table[shuffled["ids"]])
    assert found[:, 1].sums.equal(table[shuffled["ids"], 1])


def test_a_second_run_reads_the_cache(network, data, tmp_path, forwards):
    first = _table(network, data, tmp_path, batch_size=5)
    assert forwards == [5, 5, 2]
    assert _table(network, data, tmp_path).equal(first)
    assert forwards == [5, 5, 2]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def _other_weights(network, data):
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-9
    return {}


def _other_rows(network, data):
    rows = {name: value.clone() for name, value in data.sources["pairs"].rows.items()}
    rows["labels"][0, 0, 1] = rows["input_ids"][0, 0, 1]
    return {"source": PoolSource(rows, 6, 1, "pairs")}


def _flat_rows(network, data):
    """The same tokens as rows of one sequence."""
    rows = {
        name: value.flatten(0, 1)
        for name, value in data.sources["pairs"].rows.items()
        if value.dim() == 3
    }
    return {"source": PoolSource(rows | {"ids": torch.arange(24)}, 6, 1, "pairs")}


def _other_precision(network, data):
    return {"precision": "bf16-mixed"}


@pytest.mark.parametrize("change", [_other_weights, _other_rows, _flat_rows, _other_precision])
def test_another_model_data_or_precision_misses_the_cache(
    change, network, data, tmp_path, forwards
):
    _table(network, data, tmp_path)
    _table(network, data, tmp_path, **change(network, data))
    assert len(forwards) == len(list(tmp_path.iterdir())) == 2


def test_tokenizer_and_chat_template_are_part_of_the_key(network):
    spec = language_spec("tiny")
    one = build_tokenizer(spec)
    other = build_tokenizer(spec)
    assert cache_key(network, "rows", one) == cache_key(network, "rows", other)
    other.chat_template = "{{ messages }}"
    bigger = build_tokenizer(language_spec("small"))
    assert len({cache_key(network, "rows", tokenizer) for tokenizer in (one, other, bigger)}) == 3


def test_a_new_adapter_of_another_seed_hits_the_cache(network, data):
    def key(seed: int, trained: bool = False) -> str:
        torch.manual_seed(seed)
        adapted = get_peft_model(
            copy.deepcopy(network), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        if trained:
            for name, parameter in adapted.named_parameters():
                parameter.data += 0.1 * ("lora_B" in name)
        return cache_key(adapted, "rows", data.tokenizer)

    assert key(0) == key(1)
    assert len({key(0), key(0, trained=True), key(1, trained=True)}) == 3


@pytest.mark.parametrize("stop", ["save_file", "replace"])
def test_an_interrupted_write_leaves_no_file(stop, network, data, tmp_path, forwards, monkeypatch):
    def interrupted(*arguments: Any, **_: Any) -> None:
        if stop == "save_file":
            with open(arguments[1], "wb") as file:
                file.write(b"half a table")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            reference_cache if stop == "save_file" else reference_cache.os, stop, interrupted
        )
        with pytest.raises(KeyboardInterrupt):
            _table(network, data, tmp_path)
    assert list(tmp_path.iterdir()) == []
    _table(network, data, tmp_path)
    assert len(forwards) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: whole[:20] + b"x" * 40 + whole[60:],
    ],
)
def test_a_damaged_file_is_replaced(damage, network, data, tmp_path):
    table = _table(network, data, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert _table(network, data, tmp_path).equal(table)
    (path,) = tmp_path.iterdir()
    assert reference_cache.load_file(path)["sums"].equal(table)


def test_computing_leaves_the_mode_of_the_network_as_it_was(network, data, tmp_path):
    for mode in (True, False):
        network.train(mode)
        _table(network, data, tmp_path / str(mode))
        assert network.training is mode


def test_streams_without_a_pool_or_row_numbers_are_refused(network, data, tmp_path):
    with pytest.raises(TemperError, match="'pairs' makes rows as it goes; use reference=frozen"):
        _table(network, data, tmp_path, source=object())
    rows = data.sources["pairs"].rows | {"ids": torch.arange(12).flip(0)}
    with pytest.raises(TemperError, match="are not numbered 0, 1, 2"):
        _table(network, data, tmp_path, source=PoolSource(rows, 6, 1, "pairs"))


def test_a_cache_refuses_logits():
    with pytest.raises(ValueError, match="keeps sums only"):
        CachedSums({}).score({}, "pairs", logits=True)


@pytest.mark.parametrize("kind", [AdapterOff, FrozenCopy])
def test_a_reference_has_neither_dropout_nor_gradient(kind, network, data):
    adapted = get_peft_model(
        network, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    ).train()
    rows = data.sources["pairs"].rows
    with torch.no_grad():
        wanted = score(adapted, rows).sums
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    found = kind(adapted).score(rows, "pairs").sums
    assert torch.allclose(found, wanted, rtol=1e-13, atol=0)
    assert not found.requires_grad
    assert all(module.training for module in adapted.modules())
