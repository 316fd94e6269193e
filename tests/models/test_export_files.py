"""Files of an export beside the weights: generation config, chat template, card, adapter."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network, export_network
from temper.models.export import check_savable
from temper.synthetic import build_tokenizer, language_spec
from tests.errors import error_line
from tests.models.networks import IDS, TOKENIZER, logits


@pytest.fixture
def adapted(base):
    """The base with an adapter of random weights."""
    network = build_network(NetworkSpec(path=str(base), lora=LoRASpec(rank=2)), TOKENIZER)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return network.eval()


def _answers(network) -> torch.Tensor:
    return network.eval().generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=2,
    )


def test_adapter_and_base_in_plain_peft_are_the_merged_network(adapted, tmp_path):
    export_network(adapted, TOKENIZER, tmp_path / "adapter", merge=False)
    export_network(adapted, TOKENIZER, tmp_path / "merged", merge=True)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(alone), logits(adapted))
    assert torch.allclose(logits(alone), logits(merged), rtol=0, atol=1e-5)
    for loaded in (alone, merged):
        assert torch.equal(_answers(loaded), _answers(adapted))


def test_an_adapter_names_its_base_as_it_was_given(adapted, base, tmp_path):
    export_network(adapted, TOKENIZER, tmp_path / "adapter", merge=False)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)


@pytest.mark.parametrize("merge", [True, False])
def test_readme_is_the_card_and_nothing_else(adapted, base, tmp_path, merge):
    export_network(adapted, TOKENIZER, tmp_path / "without", merge)
    assert not (tmp_path / "without" / "README.md").exists(), (
        "PEFT's own README names local folders"
    )
    export_network(adapted, TOKENIZER, tmp_path / "with", merge, card="# A card\n")
    assert (tmp_path / "with" / "README.md").read_text() == "# A card\n"


@pytest.mark.parametrize("merge", [True, False])
def test_the_tokens_that_end_an_answer_are_those_of_training(adapted, tmp_path, merge):
    before = adapted.generation_config.to_dict()
    export_network(adapted, TOKENIZER, tmp_path / "export", merge, stop_ids=[2, 5])
    saved = GenerationConfig.from_pretrained(tmp_path / "export")
    assert (saved.eos_token_id, saved.pad_token_id) == ([2, 5], TOKENIZER.pad_token_id)
    assert adapted.generation_config.to_dict() == before, "the network in training has not changed"


@pytest.mark.parametrize(
    ("own", "stop_ids", "written"),
    [
        ([9, 5], [5], [9, 5]),
        ([9, 5], [7, 5], [9, 5, 7]),
        (2, [2], 2),
        (2, None, 2),
        (2, [5, 2], [2, 5]),
        (None, [7], [7]),
    ],
)
def test_end_tokens_are_exported_as_they_were_and_ours(base, tmp_path, own, stop_ids, written):
    network = build_network(NetworkSpec(path=str(base)), TOKENIZER)
    network.generation_config.eos_token_id = own
    network.config.eos_token_id = own
    export_network(network, TOKENIZER, tmp_path / "export", merge=True, stop_ids=stop_ids)
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == written


def test_other_settings_of_a_generation_config_are_kept(base, tmp_path):
    network = build_network(NetworkSpec(path=str(base)), TOKENIZER)
    kept = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "num_beams": 4}
    network.generation_config.update(**kept)
    export_network(network, TOKENIZER, tmp_path / "export", merge=True)
    saved = GenerationConfig.from_pretrained(tmp_path / "export").to_dict()
    assert {name: saved[name] for name in kept} == kept


def test_what_cannot_be_saved_is_found_before_training(adapted, monkeypatch):
    check_savable(adapted, TOKENIZER, [2, 5])
    adapted.generation_config.num_beams = object()
    line = error_line(lambda: check_savable(adapted, TOKENIZER, None))
    assert line.startswith("HFExport: the generation config of this model cannot be saved, so")
    adapted.generation_config.num_beams = 1
    adapted.config.extra = object()
    line = error_line(lambda: check_savable(adapted, TOKENIZER, None))
    assert line.startswith("HFExport: the config of this model cannot be saved")


def test_a_greedy_config_with_sampling_settings_can_be_exported(base, tmp_path):
    network = build_network(NetworkSpec(path=str(base)), TOKENIZER)
    network.generation_config.temperature = 0.6
    network.generation_config.top_p = 0.9
    export_network(network, TOKENIZER, tmp_path / "export", merge=True)
    assert not GenerationConfig.from_pretrained(tmp_path / "export").do_sample
    assert network.generation_config.temperature == 0.6


def test_sampling_settings_of_the_base_are_kept(base, tmp_path):
    network = build_network(NetworkSpec(path=str(base)), TOKENIZER)
    network.generation_config.do_sample = True
    network.generation_config.temperature = 0.6
    export_network(network, TOKENIZER, tmp_path / "export", merge=True)
    saved = GenerationConfig.from_pretrained(tmp_path / "export")
    assert saved.do_sample and saved.temperature == 0.6


@pytest.mark.parametrize("merge", [True, False])
def test_the_chat_template_goes_with_the_tokenizer(adapted, tmp_path, merge):
    tokenizer = build_tokenizer(language_spec("tiny"))
    tokenizer.chat_template = "{% for m in messages %}<bos> {{ m.content }}{% endfor %}"
    export_network(adapted, tokenizer, tmp_path / "export", merge)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == tokenizer.chat_template
    )


def test_an_adapter_without_a_base_folder_is_not_exported(tmp_path):
    shape = ShapeSpec(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=24)
    network = build_network(NetworkSpec(shape=shape, lora=LoRASpec(rank=2)), TOKENIZER)
    with pytest.raises(TemperError, match="in no folder"):
        export_network(network, TOKENIZER, tmp_path / "export", merge=False)
    assert list(tmp_path.iterdir()) == []
