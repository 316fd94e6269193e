"""Weights are all there, are numbers, and come from safetensors, or the load is one line."""

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from temper.models import NetworkSpec
from temper.models.load import check_network, check_vocabulary
from temper.models.lora import save_adapter
from tests.errors import error_line
from tests.models.networks import LORA, TOKENIZER, build, disturb, logits
from tests.pickles import Bomb

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of a network's folder."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def adapted(adapter: Path, tmp_path: Path) -> Path:
    """A copy of an adapter's folder; its base is another folder."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a safetensors file, or the content of a JSON file."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})


def refused(folder: Path, message: str, **settings: object) -> None:
    line = error_line(lambda: build(folder, **settings))
    assert re.search(message, line), line
    assert "path=" in line and str(folder) in line


def shard(folder: Path) -> dict[str, str]:
    """Store the weights in several files; which file holds which weight."""
    network = build(folder)
    (folder / WEIGHTS).unlink()
    network.save_pretrained(folder, max_shard_size="40KB")
    return json.loads((folder / INDEX).read_text())["weight_map"]


# -- weights of a network

K = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_weight_is_refused(folder):
    edit(folder / WEIGHTS, lambda tensors: tensors.pop(K))
    refused(folder, rf"files lack 1 weight \({re.escape(K)}, .*random numbers")


def test_the_refusal_is_the_only_line(folder, caplog):
    edit(folder / WEIGHTS, lambda tensors: tensors.pop(K))
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)  # its records do not reach the root logger
    try:
        refused(folder, "files lack 1 weight")
    finally:
        transformers.removeHandler(caplog.handler)
    assert caplog.records == []


def test_fewer_layers_than_configured_are_refused(folder):
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=3))
    refused(folder, r"files lack 9 weights \(model\.layers\.2\.")


def test_more_layers_than_configured_are_refused(folder):
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=1))
    refused(folder, r"files hold 9 weights \(model\.layers\.1\..* does not have and would lose")


def test_weights_of_another_architecture_are_refused(folder):
    other = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=len(TOKENIZER))
    GPT2LMHeadModel(other).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / WEIGHTS, folder / WEIGHTS)
    refused(folder, "files lack [0-9]+ weights .* of LlamaForCausalLM as config.json describes")


def test_a_file_without_weights_is_refused(folder):
    edit(folder / WEIGHTS, dict.clear)
    refused(folder, "files lack 21 weights")


def test_weights_of_another_shape_are_refused(folder):
    edit(folder / "config.json", lambda config: config.update(intermediate_size=32))
    refused(folder, "transformers cannot load it: .*do not fit its config.json")


def test_a_head_that_config_says_is_not_tied_is_refused(folder):
    edit(folder / WEIGHTS, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, r"files lack 1 weight \(lm_head\.weight")
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    tied = build(folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_weights_without_a_use_are_refused_unless_harmless(folder, base):
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "v_head.summary.weight": torch.zeros(1, 64),
    }
    edit(folder / WEIGHTS, lambda tensors: tensors.update(harmless))
    assert torch.equal(logits(build(folder)), logits(build(base)))
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}
    edit(folder / WEIGHTS, lambda tensors: tensors.update(extra))
    refused(folder, r"files hold 1 weight \(model\.layers\.0\.self_attn\.q_norm")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(folder, value, dtype):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[K][3, 5] = value

    edit(folder / WEIGHTS, spoil)
    refused(folder, rf"the weight {re.escape(K)} holds NaN or infinity")


# -- their files


def test_a_missing_shard_is_named(folder):
    file = sorted(set(shard(folder).values()))[1]
    (folder / file).unlink()
    refused(folder, f"{file} is missing")
    assert f"{file} is missing" in error_line(
        lambda: check_network(NetworkSpec(path=str(folder)))
    ), "without loading anything"


def test_a_shard_that_lacks_what_the_index_says_is_named(folder):
    holders = shard(folder)
    edit(folder / holders[K], lambda tensors: tensors.pop(K))
    refused(folder, rf"{holders[K]} lacks 1 weight \({re.escape(K)}")


def test_an_index_that_leaves_weights_out_is_refused(folder):
    holders = shard(folder)
    gone = [name for name, holder in holders.items() if holder == holders[K]]
    edit(folder / INDEX, lambda index: [index["weight_map"].pop(name) for name in gone])
    refused(folder, f"files lack {len(gone)} weight")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.pt", "model.safetensors.pkl"])
def test_an_index_that_names_a_pickle_is_refused_unread(folder, tmp_path, file):
    holders = shard(folder)
    (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    edit(folder / INDEX, lambda index: index["weight_map"].update({K: file}))
    refused(folder, f"{INDEX} names {file}, and only safetensors are read")
    edit(folder / INDEX, lambda index: index.update(weight_map=dict.fromkeys(holders, file)))
    refused(folder, f"{INDEX} names {file}, and only safetensors are read")
    assert not (tmp_path / "marker").exists()


def test_a_pickle_named_as_safetensors_is_refused_unread(folder, tmp_path):
    holders = shard(folder)
    (folder / holders[K]).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    refused(folder, "no safetensors file, or a damaged one")
    assert not (tmp_path / "marker").exists()


def test_config_cannot_name_other_weights(folder, tmp_path):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    name = {"transformers_weights": "adapter_model.bin"}
    edit(folder / "config.json", lambda config: config.update(name))
    refused(folder, "config.json names a file of weights .*adapter_model.bin.*remove that line")
    assert not (tmp_path / "marker").exists()


def test_two_sets_of_weights_are_refused(folder):
    shutil.copy(folder / WEIGHTS, folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / WEIGHTS)
    refused(folder, f"two sets of weights, {WEIGHTS} and the files of {INDEX}; delete one")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_weights_is_refused(folder, content):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    refused(folder, "names no weights|is not inside the folder")


def test_an_empty_shard_and_other_layouts_are_refused(folder):
    holders = shard(folder)
    whole = (folder / holders[K]).read_bytes()
    (folder / holders[K]).write_bytes(b"")
    refused(folder, "no safetensors file, or a damaged one")
    (folder / holders[K]).write_bytes(whole)
    shutil.copy(folder / holders[K], folder / "shard-00000-model-00001-of-00001.safetensors")
    refused(folder, "distributed checkpoint, which is not read")


def test_weights_of_a_variant_alone_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    refused(folder, "no model.safetensors in it")


# -- adapters

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def rename_keys(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.", "encoder.")] = tensors.pop(name)


SPOILT_ADAPTERS = {
    "no matching key": (ADAPTER, rename_keys, "adapter lacks 8 weights"),
    "no key at all": (ADAPTER, dict.clear, "adapter lacks 8 weights"),
    "a missing key": (ADAPTER, lambda t: t.pop(A), r"adapter lacks 1 weights \(.*lora_A"),
    "a key too many": (
        ADAPTER,
        lambda t: t.update({A.replace("q_proj", "k_proj"): torch.ones(2, 64)}),
        "adapter holds, unused, 1 weights",
    ),
    "another rank": ("adapter_config.json", lambda c: c.update(r=4), "size mismatch"),
    "more targets": (
        "adapter_config.json",
        lambda c: c.update(target_modules=["q_proj", "v_proj", "o_proj"]),
        "adapter lacks 4 weights",
    ),
    "fewer targets": (
        "adapter_config.json",
        lambda c: c.update(target_modules=["q_proj"]),
        "adapter holds, unused, 4 weights",
    ),
    "targets of another architecture": (
        "adapter_config.json",
        lambda c: c.update(target_modules=["c_attn"]),
        "does not fit its base model: .*c_attn",
    ),
    "a saved module that is not stored": (
        "adapter_config.json",
        lambda c: c.update(modules_to_save=["lm_head"]),
        "does not fit its base model: lacks .*lm_head",
    ),
    "an unknown type": (
        "adapter_config.json",
        lambda c: c.update(peft_type="MAGIC"),
        "does not fit its base model",
    ),
    "NaN": (ADAPTER, lambda t: t[A].fill_(torch.nan), f"the weight {re.escape(A)} holds NaN"),
    "embeddings of another size": (
        ADAPTER,
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(99, 64)}),
        r"size mismatch|trained with 99 rows in lm_head, and its base has",
    ),
}


@pytest.mark.parametrize("case", SPOILT_ADAPTERS)
@pytest.mark.parametrize("policy", ["continue", "merge"])
def test_an_adapter_that_does_not_fit_is_refused(adapted, case, policy):
    file, change, message = SPOILT_ADAPTERS[case]
    edit(adapted / file, change)
    refused(adapted, message, adapter=policy)


def test_an_adapter_of_another_base_model_is_refused(adapted, folder):
    edit(adapted / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(folder)))
    assert torch.isfinite(logits(build(adapted))).all()
    network = build(folder)
    network.config.num_hidden_layers = 3
    LlamaForCausalLM(network.config).save_pretrained(folder)
    refused(adapted, "adapter lacks 4 weights .*put the base model back")
    network.config.num_hidden_layers = 2
    network.config.hidden_size = 32
    LlamaForCausalLM(network.config).save_pretrained(folder)
    refused(adapted, "does not fit its base model: size mismatch")


def test_an_incomplete_base_of_an_adapter_is_refused(adapted, folder):
    edit(adapted / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(folder)))
    edit(folder / WEIGHTS, lambda tensors: tensors.pop(K))
    refused(adapted, "files lack 1 weight")


def test_an_adapter_on_an_adapter_is_refused(adapted, tmp_path):
    second = Path(shutil.copytree(adapted, tmp_path / "second"))
    edit(second / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(adapted)))
    refused(second, f"its base model {adapted} is itself an adapter; merge that one")


def test_an_adapter_with_a_saved_module_loads_whole(base, tmp_path):
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        network.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    network.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert torch.equal(logits(build(tmp_path / "adapter")), logits(network))


# -- tokens without an embedding


@pytest.fixture
def more_tokens():
    """The tokenizer with another token, special or not, and how to refuse it."""

    def check(base: Path, token: AddedToken, **roles: str) -> None:
        tokenizer = type(TOKENIZER)(
            tokenizer_object=TOKENIZER.backend_tokenizer, **TOKENIZER.special_tokens_map
        )
        tokenizer.chat_template = TOKENIZER.chat_template
        tokenizer.add_tokens([token])
        for role, content in roles.items():
            setattr(tokenizer, role, content)
        tokenizer.save_pretrained(base)
        check_vocabulary(NetworkSpec(path=str(base)), base, tokenizer)

    return check


def test_a_token_without_an_embedding_is_refused(folder, more_tokens):
    line = error_line(lambda: more_tokens(folder, AddedToken("word", special=False)))
    assert "the tokenizer has 26 tokens and the network 25 embeddings: 'word' has the id" in line


def test_a_role_or_template_token_without_embedding_is_refused(folder, more_tokens):
    end = AddedToken("<end>", special=True)
    assert "'<end>'" in error_line(lambda: more_tokens(folder, end, eos_token="<end>"))
    template = {"chat_template": "{{ messages[0].content }}<end>"}
    assert "'<end>'" in error_line(lambda: more_tokens(folder, end, **template))


def test_a_special_token_that_nothing_writes_needs_no_embedding(folder, more_tokens):
    more_tokens(folder, AddedToken("<image>", special=True))


# -- links


def test_a_link_out_of_a_model_folder_is_refused(folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, f"{WEIGHTS} is a symbolic link to .*elsewhere.safetensors, out of the folder")
    (folder / WEIGHTS).unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / "weights")
    (folder / WEIGHTS).symlink_to("weights")
    assert torch.isfinite(logits(build(folder))).all()
    (folder / "chat").symlink_to("..")
    refused(folder, "chat is a symbolic link")


def test_a_linked_folder_and_a_hub_snapshot_are_read(base, tmp_path):
    (tmp_path / "linked").symlink_to(base)
    assert torch.equal(logits(build(tmp_path / "linked")), logits(build(base)))
    model = tmp_path / "models--org--name"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, model / "blobs" / str(number))
        (model / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    assert torch.equal(logits(build(model / "snapshots" / "abc")), logits(build(base)))
    (model / "snapshots" / "abc" / "notes.txt").symlink_to("../../../other/blobs/0")
    refused(model / "snapshots" / "abc", "notes.txt is a symbolic link")


def test_a_complete_adapter_gives_what_it_was_trained_to(base, tmp_path):
    network = disturb(build(base, lora=LORA))
    (tmp_path / "adapter").mkdir()
    save_adapter(network, tmp_path / "adapter")
    assert torch.equal(logits(build(tmp_path / "adapter")), logits(network))
    assert not torch.equal(logits(network), logits(build(base)))
