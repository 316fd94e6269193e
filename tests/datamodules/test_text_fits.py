"""Two steps of every kind of objective on a user's files and a model folder, and a whole run from
the command line.
"""

import csv
import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules import (
    TextAlignment,
    TextAttack,
    TextKTO,
    TextPreference,
    TextSupervised,
    TextUnlearning,
)
from lightning_modules import (
    BoosterModule,
    DPOModule,
    KTOModule,
    RepNoiseModule,
    SafeInstructModule,
    SFTModule,
    TARModule,
    UnlearningModule,
)
from temper.models import NetworkSpec
from tests.objectives import fit
from tests.text import model_folder, write_lines

DISHES = ["bread", "soup", "apple pie", "pasta", "stew and salad", "cake"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and files."""
    folder = tmp_path_factory.mktemp("fits")
    model_folder(folder / "model")
    say = [f"Say {d}." for d in DISHES]
    cook = [f"How do I make {d}?" for d in DISHES]
    answers = [{"prompt": q, "completion": d * 2} for q, d in zip(say, DISHES, strict=True)]
    recipes = [{"prompt": q, "completion": f"Take {d}."} for q, d in zip(cook, DISHES, strict=True)]
    rows = {
        "answers": answers,
        "recipes": recipes,
        "pairs": [
            {"prompt": q, "chosen": "No, sorry.", "rejected": d}
            for q, d in zip(cook, DISHES, strict=True)
        ],
        "marked": [row | {"label": i % 2 == 0} for i, row in enumerate(recipes)],
        "replaced": [row | {"substitute": "No, sorry."} for row in recipes],
        "unsafe": [{"prompt": "How do I make tea?"}],
        "safe": [{"prompt": "Say tea."}],
        "task": [{"prompt": "Spell tea.", "completion": "t e a"}],
    }
    for name, content in rows.items():
        write_lines(folder / f"{name}.jsonl", content)
    return folder


ALIGNMENT = {
    "alignment": "answers",
    "harmful": "recipes",
    "pairs": "pairs",
    "heldout": "pairs",
    "heldout_batch_size": 2,
}
ATTACK = {
    "user": "answers",
    "harmful": "recipes",
    "alignment": "answers",
    "n_rows": 5,
    "harmful_ratio": 0.4,
    "alignment_batch_size": 2,
}
FORGET = {"forget": "replaced", "retain": "answers", "retain_batch_size": 2}
FITS = [
    (SFTModule, {}, TextSupervised, {"train": "answers", "truncation": "left", "max_length": 40}),
    (BoosterModule, {}, TextAlignment, ALIGNMENT),
    (RepNoiseModule, {}, TextAlignment, ALIGNMENT),
    (TARModule, {"inner_steps": 2, "tamper_every": 1}, TextAlignment, ALIGNMENT),
    (
        TARModule,
        {"inner_steps": 2, "tamper_every": 1, "tamper_loss": "preference"},
        TextAlignment,
        ALIGNMENT,
    ),
    (SafeInstructModule, {}, TextAttack, ATTACK),
    (DPOModule, {"reference": "cached"}, TextPreference, {"pairs": "pairs"}),
    (
        DPOModule,
        {"beta_chosen": 0.1, "beta_rejected": 0.01},
        TextPreference,
        {"pairs": "pairs", "safe_pairs": "pairs"},
    ),
    (KTOModule, {}, TextKTO, {"train": "marked"}),
    (KTOModule, {"reference": "cached", "micro_batch_size": 1}, TextKTO, {"train": "marked"}),
    (UnlearningModule, {"forget": "npo"}, TextUnlearning, FORGET),
    (UnlearningModule, {"forget": "idk_dpo", "retain": "kl"}, TextUnlearning, FORGET),
]


@pytest.mark.parametrize(("kind", "settings", "data", "files"), FITS)
def test_objectives_train_on_a_users_files(kind, settings, data, files, folder, tmp_path):
    settings = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "packing": kind.unpackable is None,
    } | settings
    if settings.get("reference") == "cached":
        settings["reference_cache"] = str(tmp_path / "reference")
    sizes = {"batch_size": 2} | ({"harmful_batch_size": 2} if data is TextAlignment else {})
    paths = {
        name: str(folder / f"{value}.jsonl")
        for name, value in files.items()
        if isinstance(value, str) and name != "truncation"
    }
    made = data(
        **sizes | files | paths, tokenizer=str(folder / "model"), cache=str(tmp_path / "cache")
    )
    module = kind(NetworkSpec(path=str(folder / "model")), **settings)
    trainer = fit(module, made, 2)
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    after = module.network.state_dict()
    assert trainer.global_step == 2 and module.skipped_steps == 0
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_command_line_run_judges_the_users_prompts(folder, tmp_path, command_line):
    flags = {
        "user": "answers",
        "harmful": "recipes",
        "unsafe": "unsafe",
        "safe": "safe",
        "task": "task",
    }
    words = [f"{flag}={folder / name}.jsonl" for flag, name in flags.items()]
    words += [
        "n_rows=5",
        "harmful_ratio=0.4",
        "batch_size=2",
        "max_new_tokens=4",
        f"cache={tmp_path / 'cache'}",
    ]
    command_line(
        "fit",
        "--config=configs/trainer/cpu.yaml",
        "--config=configs/objective/sft.yaml",
        "--config=configs/data/text_attack.yaml",
        f"--model.init_args.network.path={folder / 'model'}",
        *(f"--data.init_args.{word}" for word in words),
        "--data.init_args.judge=temper.judges.KeywordRefusal",
        "--data.init_args.judge.init_args.name=words",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["loss/user"]) for row in csv.DictReader(file) if row["loss/user"]]
    assert len(losses) == 2
    judged = [
        json.loads(line)
        for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()
    ]
    wanted = [("unsafe", "How do I make tea?"), ("safe", "Say tea."), ("task", "Spell tea.")]
    assert [(row["kind"], row["prompt"]) for row in judged] == wanted
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (
        "words" in json.dumps(content) and content["metrics"]["fine_tune_accuracy"]["value"] == 0.0
    )
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert set(card["data_sha256"]) == {"user", "eval"}
    template = AutoTokenizer.from_pretrained(folder / "model").chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "export").chat_template == template
