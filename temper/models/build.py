"""From a `NetworkSpec` and a tokenizer to a causal LM, or a clear refusal."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.models.spec import LoRASpec, NetworkSpec, ShapeSpec

FLAG = "model.init_args.network"


def check_network(spec: NetworkSpec) -> None:
    """Refuse what can be refused without loading anything.

    Raises:
        TemperError: neither or both of path and shape; a folder that is missing or holds no model;
            a new adapter asked for on top of one that is to be continued.
    """
    if (spec.path is None) == (spec.shape is None):
        found = "both" if spec.path else "neither"
        raise TemperError(f"{FLAG}: {found} of path and shape given; set exactly one, for example --{FLAG}.path=runs/demo/base/export")
    if spec.path is None:
        return
    folder = Path(spec.path)
    if not folder.is_dir():
        raise TemperError(f"{FLAG}.path={spec.path}: no such folder; give a folder with config.json, such as a run's export/")
    if not (folder / "config.json").exists() and not _is_adapter(folder):
        raise TemperError(f"{FLAG}.path={spec.path}: neither config.json nor adapter_config.json in it; give a run's export/ folder")
    if _is_adapter(folder) and spec.lora is not None and spec.adapter == "continue":
        raise TemperError(
            f"{FLAG}.lora is set and path={spec.path} already holds an adapter: set {FLAG}.adapter=merge to merge it "
            "and train a new one, or drop lora to continue it"
        )


def build_network(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Build or load the network, check that it speaks the tokenizer's vocabulary, add adapters.

    Raises:
        TemperError: as `check_network`; or the vocabulary of the folder is not the data's; or the
            tokenizer has no token for padding.
    """
    check_network(spec)
    if tokenizer.pad_token_id is None:
        raise TemperError(
            "the tokenizer has no pad token: set one, for example tokenizer.pad_token = tokenizer.eos_token, and save it beside the model "
            "(tokenizer.save_pretrained)"
        )
    network = _from_shape(spec.shape, tokenizer) if spec.shape else _from_folder(spec, tokenizer)
    network.to(getattr(torch, spec.dtype))
    network.generation_config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if spec.lora is not None:
        return _add_lora(network, spec.lora)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return network


def _from_shape(shape: ShapeSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    if shape.hidden_size % shape.n_heads:
        raise TemperError(f"{FLAG}.shape: n_heads={shape.n_heads} does not divide hidden_size={shape.hidden_size}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # On the CPU, wherever training will be: a seed is one network, and no device's generator is touched.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(shape.seed)
        return LlamaForCausalLM(config)


def _from_folder(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    folder = Path(str(spec.path))
    _check_vocabulary(folder, tokenizer)
    dtype = getattr(torch, spec.dtype)
    if not _is_adapter(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not base or not Path(base).is_dir():
        raise TemperError(
            f"{FLAG}.path={spec.path}: its adapter_config.json names the base {base}, which is no folder; "
            "put it back or edit base_model_name_or_path"
        )
    network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    adapted = PeftModel.from_pretrained(network, folder, is_trainable=spec.adapter == "continue")
    # PEFT froze the base around the adapter; merged, all of it is trained unless a new adapter is added.
    return adapted.merge_and_unload().requires_grad_(True) if spec.adapter == "merge" else adapted


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if not (folder / "tokenizer.json").exists():
        raise TemperError(f"{FLAG}.path={folder}: no tokenizer.json in it; save the tokenizer beside the model (tokenizer.save_pretrained)")
    stored = json.loads((folder / "tokenizer.json").read_text())
    found = stored["model"]["vocab"]
    if isinstance(found, list):  # Unigram: (token, score) pairs in id order
        found = {token: i for i, (token, _score) in enumerate(found)}
    wanted = tokenizer.get_vocab()
    # Added tokens (special ones) may live outside the model's own table.
    found = {**found, **{entry["content"]: entry["id"] for entry in stored.get("added_tokens", [])}}
    if found != wanted:
        different = sorted(set(found.items()) ^ set(wanted.items()), key=lambda item: item[1])[0]
        raise TemperError(
            f"{FLAG}.path={folder}: its vocabulary ({len(found)} tokens) is not the data's ({len(wanted)} tokens), first at token "
            f"{different[0]!r}; use the same data.init_args.preset and language_seed in every stage"
        )


def _add_lora(network: nn.Module, lora: LoRASpec) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    unknown = set(lora.targets) - names
    if unknown:
        raise TemperError(f"{FLAG}.lora.targets: no linear layer is named {sorted(unknown)[0]!r}; choose from {', '.join(sorted(names))}")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=lora.dropout, task_type="CAUSAL_LM")
    adapted = get_peft_model(network, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
