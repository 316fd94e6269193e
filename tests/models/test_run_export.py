"""Which form the network of a run is exported in, what is checked, and what the card says."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from temper.models import (
    LoRASpec,
    NetworkSpec,
    ShapeSpec,
    build_network,
    export_check,
    export_network,
    run_export,
)
from temper.models.export_check import Agreement, NotChecked, prompts_of
from temper.models.lora import save_adapter
from temper.models.merge import merged_copy
from temper.models.run_export import ExportSettings, export_module, keep_adapter
from tests.errors import error_line
from tests.models.networks import IDS, TOKENIZER, build, disturb, logits

DATA = SimpleNamespace(tokenizer=TOKENIZER, max_new_tokens=8, stop_ids=None)


def _module(base, size: float, dtype: str = "bfloat16", **settings) -> SimpleNamespace:
    """An adapter whose trained change has a size, on a base in a precision."""
    spec = NetworkSpec(path=str(base), dtype=dtype, lora=LoRASpec(rank=2), **settings)
    torch.manual_seed(0)
    network = build_network(spec, TOKENIZER)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return SimpleNamespace(network=network, network_spec=spec)


def _export(module, folder, **settings) -> tuple[str, str]:
    """The form that is exported, and the card."""
    form = export_module(module, DATA, folder, ExportSettings(**settings))
    return form, (folder / "README.md").read_text()


def _precisions(folder) -> set[torch.dtype]:
    return {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()}


def test_a_small_change_is_not_rounded_away_in_a_16_bit_merge(base, tmp_path):
    """It is below the resolution of bfloat16, and so is its KL: that alone would not tell."""
    module = _module(base, 1e-4)
    with pytest.warns(UserWarning, match=r"loses \d+ % of what was learned"):
        form, card = _export(module, tmp_path / "export")
    assert form == "adapter" and "only a LoRA adapter" in card
    assert "The adapter merged into the base in bfloat16 loses" in card
    assert "all are the same, token for token" in card
    again = build_network(NetworkSpec(path=str(tmp_path / "export"), dtype="bfloat16"), TOKENIZER)
    assert torch.equal(logits(again), logits(module.network))


def test_a_large_change_is_merged_in_the_precision_of_its_base(base, tmp_path):
    form, card = _export(_module(base, 3.0), tmp_path / "export")
    assert form == "merged" and _precisions(tmp_path / "export") == {torch.bfloat16}
    assert "mean KL divergence" in card and "The trained adapter is merged" in card


@pytest.mark.parametrize("size", [1e-4, 3.0])
def test_float32_keeps_every_change(base, size, tmp_path):
    for name, settings in {"16": {"dtype": "float32"}, "32": {}}.items():
        module = _module(base, size, "bfloat16" if name == "16" else "float32")
        form, card = _export(module, tmp_path / name, **settings)
        assert form == "merged" and _precisions(tmp_path / name) == {torch.float32}
        assert "all are the same, token for token" in card


def test_a_merge_that_is_asked_for_obeys_max_kl(base, tmp_path):
    module = _module(base, 0.05)
    line = error_line(lambda: _export(module, tmp_path / "no", merge=True, max_kl=0.0))
    assert "the adapter merged into the base in bfloat16 has a mean KL of" in line
    assert line.endswith("set dtype=float32, merge=false, or max_kl=0.02")
    assert not (tmp_path / "no").exists()
    form, card = _export(module, tmp_path / "told", merge=True, max_kl=0.02)
    assert form == "merged" and "between the networks before and after training" in card


def test_the_divergence_is_that_of_a_plain_computation(base, tmp_path):
    module = _module(base, 0.5)
    _, card = _export(module, tmp_path / "export", merge=True, max_kl=9.0)
    found = float(card.split("mean KL divergence ")[1].split()[0])
    run = module.network.float().eval()
    rounded = merged_copy(_module(base, 0.5).network).float().eval()
    prompts = [[(8 * i + j) % len(TOKENIZER) for j in range(8)] for i in range(16)]
    total, n = 0.0, 0
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < 16 and (len(ids) == 8 or ids[-1] != 2):
                ids.append(int(run(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            p, q = (m(input_ids=torch.tensor([ids])).logits[0, 7:-1] for m in (run, rounded))
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        n += len(p)
    assert found == pytest.approx(total / n, rel=0.05)


def test_without_a_check_what_rounds_is_not_merged(base, tmp_path, monkeypatch):
    module = _module(base, 3.0)
    form, card = _export(module, tmp_path / "off", check=False)
    assert form == "adapter" and "Not checked against the trained network: the check is" in card
    form, card = _export(module, tmp_path / "asked", check=False, merge=True)
    assert form == "merged" and "Not checked" in card
    monkeypatch.setattr(export_check, "free_memory", lambda device: 2.0**10)
    form, card = _export(module, tmp_path / "full")
    assert form == "adapter" and "Not checked" in card and "a second copy takes 0.0 GiB" in card
    form, card = _export(_module(base, 3.0, "float32"), tmp_path / "exact")
    assert form == "merged" and "Not checked" in card


def test_a_small_change_on_a_base_without_folder_is_merged_in_float32(base, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    save_adapter(_module(base, 0.5, "float32").network, first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = NetworkSpec(str(first), dtype="bfloat16", adapter="merge", lora=LoRASpec(rank=2))
        network = disturb(build_network(spec, TOKENIZER))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1e-3)
    module = SimpleNamespace(network=network, network_spec=spec)
    with pytest.warns(UserWarning, match="loses"):
        form, card = _export(module, tmp_path / "export")
    assert form == "merged" and _precisions(tmp_path / "export") == {torch.float32}
    assert "all are the same, token for token" in card


def test_an_export_that_answers_otherwise_is_refused(base, tmp_path, monkeypatch):
    module = SimpleNamespace(network=build(base), network_spec=NetworkSpec(path=str(base)))
    save = run_export.write_export

    def damage(network, tokenizer, folder, *rest):
        save(network, tokenizer, folder, *rest)
        other = build(base)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1)
        other.save_pretrained(folder)

    export_network(module.network, TOKENIZER, tmp_path / "x", merge=True)
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    monkeypatch.setattr(run_export, "write_export", damage)
    line = error_line(lambda: export_module(module, DATA, tmp_path / "x"))
    assert "the network in float32 does not answer as the trained network: " in line
    assert "greedy answers are the same, mean KL" in line and "check=false" in line
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before


def test_an_export_that_cannot_be_loaded_is_refused(base, tmp_path, monkeypatch):
    module = SimpleNamespace(network=build(base), network_spec=NetworkSpec(path=str(base)))

    def damage(network, tokenizer, folder, *rest):
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(run_export, "write_export", damage)
    line = error_line(lambda: export_module(module, DATA, tmp_path / "x"))
    assert line.startswith("export: the written folder cannot be loaded again: ")


def test_a_cast_of_all_weights_is_measured(tmp_path):
    shape = ShapeSpec(hidden_size=32, n_layers=1, n_heads=2, intermediate_size=32)
    module = SimpleNamespace(
        network=build_network(NetworkSpec(shape=shape), TOKENIZER),
        network_spec=NetworkSpec(shape=shape),
    )
    form, card = _export(module, tmp_path / "half", dtype="bfloat16")
    assert form == "whole" and "mean KL divergence" in card
    line = error_line(lambda: _export(module, tmp_path / "no", dtype="bfloat16", max_kl=0.0))
    assert "the network in bfloat16 has a mean KL" in line and "set dtype=null, or max_kl=" in line


def test_the_network_is_left_as_it_was(base, tmp_path):
    module = _module(base, 0.5, "float32")
    module.network.train()
    weights = {name: value.clone() for name, value in module.network.state_dict().items()}
    trained = {name: p.requires_grad for name, p in module.network.named_parameters()}
    generator = torch.get_rng_state()
    _export(module, tmp_path / "export")
    assert module.network.training and torch.equal(torch.get_rng_state(), generator)
    assert {name: p.requires_grad for name, p in module.network.named_parameters()} == trained
    state = module.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())


def test_a_kept_adapter_says_how_to_load_it(base, tmp_path):
    module = _module(base, 0.5, "float32")
    keep_adapter(module.network, tmp_path / "adapter", module.network_spec, "flag")
    assert "AutoPeftModelForCausalLM" in (tmp_path / "adapter" / "README.md").read_text()
    again = build_network(NetworkSpec(path=str(tmp_path / "adapter")), TOKENIZER)
    assert torch.equal(logits(again), logits(module.network))
    nowhere = build(lora=LoRASpec(rank=2))
    keep_adapter(nowhere, tmp_path / "nowhere", None, "flag")
    assert "Its base model is in no folder" in (tmp_path / "nowhere" / "README.md").read_text()


# -- prompts


def test_prompts_are_taken_evenly_from_the_evaluation_set():
    n = 40
    rows = {"input_ids": torch.arange(3 * n).view(n, 3), "attention_mask": torch.ones(n, 3)}
    rows["attention_mask"][:, 0] = 0
    prompts = prompts_of(SimpleNamespace(tokenizer=TOKENIZER, eval_rows=rows, max_new_tokens=99))
    assert len(prompts.ids) == 16 and prompts.max_new_tokens == 64
    assert prompts.ids[0] == [1, 2] and prompts.ids[-1] == [112, 113]
    assert prompts.source == "evaluation prompts"


@pytest.mark.parametrize("pairs", [False, True])
def test_without_evaluation_prompts_training_rows_begin_answers(pairs):
    ids = torch.arange(40).view(4, 10)
    labels = ids.clone()
    labels[:, :6] = -100
    if pairs:
        ids, labels = torch.stack([ids, ids + 1], 1), torch.stack([labels, labels], 1)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    source = SimpleNamespace(batches_per_pass=2, batch=lambda number: batch)
    empty = {"input_ids": torch.zeros(0, 0)}
    data = SimpleNamespace(tokenizer=TOKENIZER, eval_rows=empty, sources={"train": source})
    prompts = prompts_of(data)
    assert prompts.source == "beginnings of training rows" and len(prompts.ids) == 8
    assert prompts.ids[1] == list(range(10, 16))


def test_prompts_fit_the_positions_of_the_network(base):
    config = build(base).config
    prompts = prompts_of(SimpleNamespace(tokenizer=TOKENIZER))
    long = export_check.replace(prompts, ids=[list(range(99))], max_new_tokens=64)
    fitted = long.fitted(config)
    assert len(fitted.ids[0]) + fitted.max_new_tokens == config.max_position_embeddings == 32
    assert fitted.ids[0] == list(range(99))[-16:]


def test_agreement_in_words():
    agreement = Agreement(16, 15, 3e-6, 0.04, "evaluation prompts", 64)
    assert agreement.is_exact and agreement.lost == pytest.approx(0.00866, abs=1e-5)
    assert "15 of 16 are the same, token for token; mean KL divergence 3e-06" in (
        agreement.describe()
    )
    assert not Agreement(16, 15, 3e-3, None, "x", 8).is_exact
    assert Agreement(16, 15, 3e-3, None, "x", 8).lost is None


def test_free_memory_is_that_of_the_host():
    free = export_check.free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50
    with pytest.raises(NotChecked, match="a second copy takes"):
        export_check._check_memory(build(), torch.device("meta"))


def test_without_memory_to_load_it_again_it_is_not_checked(base, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nsecond line")

    monkeypatch.setattr(run_export, "compare", fail)
    form, card = _export(_module(base, 3.0), tmp_path / "16")
    assert form == "adapter" and "in bfloat16 loses was not measured: CUDA out of memory" in card
    assert "Not checked against the trained network: CUDA out of memory." in card
    form, card = _export(_module(base, 3.0), tmp_path / "asked", merge=True)
    assert form == "merged" and "Not checked" in card
    form, card = _export(_module(base, 3.0, "float32"), tmp_path / "exact")
    assert form == "merged" and "Not checked" in card


def test_a_network_that_does_not_answer_can_be_written(base, tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("forward() got an unexpected keyword\nsecond line")

    monkeypatch.setattr(run_export, "answer", fail)
    line = error_line(lambda: _export(_module(base, 3.0), tmp_path / "export"))
    assert "does not answer (TypeError: forward() got an unexpected keyword)" in line
    assert line.endswith("check=false writes it all the same")
    form, _ = _export(_module(base, 3.0), tmp_path / "export", check=False, merge=True)
    assert form == "merged"


def test_a_copy_must_fit_on_the_host_too(monkeypatch):
    """It is made and loaded there, on its way to a device."""
    free = {"cuda": 2.0**40, "cpu": 2.0**10}
    monkeypatch.setattr(export_check, "free_memory", lambda device: free[device.type])
    with pytest.raises(NotChecked, match=r"0\.0 GiB are free \(cpu\)"):
        export_check._check_memory(build(), torch.device("cuda", 0))
    free["cpu"] = 2.0**40
    export_check._check_memory(build(), torch.device("cuda", 0))


def test_bad_limits_are_refused():
    assert "max_kl=-1: give a number >= 0" in error_line(lambda: ExportSettings(max_kl=-1))
    assert IDS.shape == (2, 5)
