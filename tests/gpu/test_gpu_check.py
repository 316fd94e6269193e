"""Checks that need GPUs, one or several; about ten minutes: ``make gpu-check``.

``CHECK_ACCELERATOR=cpu`` runs those that can run without one, to test the checks themselves.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.strategy_runs import (
    ACCELERATOR,
    ROOT,
    largest_difference,
    run_cases,
    train_py,
)

DEVICE = os.environ.get(ACCELERATOR, "gpu")
RANKS = 2 if DEVICE == "cpu" else min(torch.cuda.device_count(), 4)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "gpu" and not torch.cuda.is_available(),
        reason="no CUDA device; CHECK_ACCELERATOR=cpu tests the checks",
    ),
]
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
# Tolerances: rounding differs between one device and several, and some CUDA kernels add in no fixed
# order.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "booster, fp32": ({}, 1e-5),
    "booster, micro-batches": ({"micro_batch_size": 1}, 1e-5),
    "booster, lora, checkpointing": ({"lora": True, "checkpointing": True}, 1e-5),
    "vaccine": ({"objective": "VaccineModule"}, 1e-5),
    "booster, bf16-mixed": ({"precision": "bf16-mixed"}, 1e-3),
    "booster, bf16 base, fp32 lora": ({"lora": True, "dtype": "bfloat16"}, 1e-3),
}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("gpu")
    one = run_cases(
        folder,
        [{"name": name, "strategy": "auto", **variant} for name, (variant, _) in VARIANTS.items()],
        1,
        DEVICE,
    )
    cases = []
    for strategy in STRATEGIES:
        own = {"strategy": strategy, "launch": True}
        cases += [
            {"name": f"{strategy}: {name}", **own, **variant}
            for name, (variant, _) in VARIANTS.items()
        ]
        path = str(folder / f"{strategy}.ckpt")
        run = own | {"objective": "HeldBoosterModule", "settings": {"refresh_every": 3}}
        cases += [
            {"name": f"{strategy} uninterrupted", **run, "steps": 6},
            {"name": f"{strategy} interrupted", **run, "steps": 4, "save": path},
            {"name": f"{strategy} resumed", **run, "steps": 6, "resume": path},
        ]
    return one, run_cases(folder, cases, RANKS, DEVICE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_all_devices_together_equal_one(runs, strategy: str, name: str):
    one, all_devices = runs
    found = largest_difference(all_devices[f"{strategy}: {name}"], one[name])
    print(f"\n{RANKS} x {strategy}, {name}: largest difference {found:.1e}", end="")
    assert found < VARIANTS[name][1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_equals_uninterrupted(runs, strategy: str):
    found = largest_difference(runs[1][f"{strategy} resumed"], runs[1][f"{strategy} uninterrupted"])
    print(f"\n{strategy}: resumed and uninterrupted differ by {found:.1e}", end="")
    assert found < 1e-5


def small_run(folder: Path, *words: str) -> list[str]:
    trainer = "gpu" if DEVICE == "gpu" else "cpu"
    files = [
        f"configs/trainer/{trainer}.yaml",
        "configs/objective/booster.yaml",
        "configs/model/tiny.yaml",
        "configs/data/alignment.yaml",
    ]
    sizes = {
        "n_eval": 16,
        "n_alignment": 64,
        "n_harmful": 32,
        "batch_size": 16,
        "harmful_batch_size": 16,
    }
    return [
        "fit",
        *(f"--config={file}" for file in files),
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
        *(f"--data.init_args.{name}={value}" for name, value in sizes.items()),
        f"--trainer.default_root_dir={folder}",
        *words,
    ]


@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "zero3"])
def test_the_command_line_trains_evaluates_and_exports(tmp_path: Path, strategy: str):
    from transformers import AutoModelForCausalLM

    devices = (
        []
        if strategy == "auto"
        else [f"--trainer.strategy={strategy}", f"--trainer.devices={RANKS}"]
    )
    train_py(*small_run(tmp_path, *devices))
    assert (tmp_path / "evaluation.json").is_file() and (tmp_path / "card.json").is_file()
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert all(parameter.isfinite().all() for parameter in network.parameters())


@needs_gpu
@pytest.mark.parametrize(
    "words",
    [
        ["--model.init_args.network.compile=true"],
        ["--config=configs/optimizer/paged_adamw8bit.yaml"],
    ],
    ids=str,
)
def test_compiled_layers_and_paged_optimizers_run(tmp_path: Path, words: list[str]):
    train_py(*small_run(tmp_path, *words))
    assert (tmp_path / "evaluation.json").is_file()


@needs_gpu
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.skipif(
    not (ROOT / "models" / "smollm2-135m-instruct").is_dir(),
    reason="make smollm2 fetches the model",
)
def test_an_adapter_on_quantized_weights_gets_gradients(quantization: str):
    from transformers import AutoTokenizer

    from temper.models import LoRASpec, NetworkSpec, build_network

    path = str(ROOT / "models" / "smollm2-135m-instruct")
    network = build_network(
        NetworkSpec(path=path, quantization=quantization, lora=LoRASpec(rank=4)),
        AutoTokenizer.from_pretrained(path),
    ).cuda()
    ids = torch.arange(1, 33, device="cuda")[None]
    network(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert gradients and all(
        gradient is not None and gradient.isfinite().all() for gradient in gradients
    )
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@needs_gpu
@pytest.mark.skipif(
    not (ROOT / "models" / "smollm2-135m-instruct").is_dir(),
    reason="make smollm2 fetches the model",
)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_packed_sequences_are_kept_apart(attention: str):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    from transformers import AutoTokenizer

    from temper.models import NetworkSpec, build_network
    from temper.models.tries import isolates_packed_sequences

    path = str(ROOT / "models" / "smollm2-135m-instruct")
    spec = NetworkSpec(path=path, dtype="bfloat16", attention=attention)
    assert isolates_packed_sequences(
        build_network(spec, AutoTokenizer.from_pretrained(path)).cuda()
    )


def test_devices_and_versions_are_printed():
    """To be sent with the differences printed above, or with a report of a failure."""
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    print(
        f"\ndevices: {names or 'no GPU'}; torch {torch.__version__}, CUDA {torch.version.cuda},"
        f" NCCL {nccl}",
        end="",
    )
    assert RANKS >= 1
