"""Objectives that act at other stages than alignment."""

import shlex

import pytest

from temper.errors import TemperError
from temper.study import edit_command, fit_command, load_study, report_inputs, route

SFT = {"label": "SFT", "config": ["configs/objective/sft.yaml"]}
OBJECTIVES = {
    "sft": SFT,
    "further": {"aligned_by": "sft", "edit": ["interpolate", "--a", 1.5]},
    "gentle": {"aligned_by": "sft", "attack": {"set": {"model.init_args.max_grad_norm": 0.1}}},
    "mended": {
        "aligned_by": "sft",
        "repair": {
            "config": ["configs/objective/sft.yaml"],
            "set": {"trainer.max_steps": 7, "model.init_args.x": "{aligned}+{base}"},
        },
    },
    "watched": {"aligned_by": "sft", "repair": {"verb": "validate"}},
}


@pytest.fixture
def study(write_study) -> dict:
    return load_study(
        write_study(
            objectives=OBJECTIVES,
            headline={"attack": "mild", "baseline": "sft", "method": "gentle"},
        )
    )


def test_routes_say_whose_models_are_used():
    routes = {name: route(OBJECTIVES, name) for name in OBJECTIVES}
    assert {name: each.aligned for name, each in routes.items()} == {
        "sft": ["align/sft"],
        "further": ["align/sft", "align/further"],
        "gentle": ["align/sft"],
        "mended": ["align/sft"],
        "watched": ["align/sft"],
    }
    assert {name: each.attacked("mild", "0.20") for name, each in routes.items()} == {
        "sft": ["attack/sft/mild/p0.2"],
        "further": ["attack/further/mild/p0.2"],
        "gentle": ["attack/gentle/mild/p0.2"],
        "mended": ["attack/sft/mild/p0.2", "repair/mended/mild/p0.2"],
        "watched": ["attack/sft/mild/p0.2", "repair/watched/mild/p0.2"],
    }


def words(command: str) -> list[str]:
    return shlex.split(command)


def test_an_objective_may_change_the_attack_stage(study):
    names = {"attack": "mild", "ratio": "0.2"}
    theirs = words(fit_command(study, "f", "0", "attack", "m", objective="gentle", **names))
    plain = words(fit_command(study, "f", "0", "attack", "m", objective="sft", **names))
    assert set(theirs) - set(plain) == {"--model.init_args.max_grad_norm=0.1"}
    assert set(plain) <= set(theirs)


def test_a_repair_is_a_stage_of_its_own(study):
    names = {"attack": "mild", "ratio": "0.2"}
    fit = words(
        fit_command(
            study,
            "f",
            "0",
            "repair",
            "m",
            objective="mended",
            aligned="a/export",
            base="b",
            **names,
        )
    )
    assert "--model.init_args.x=a/export+b" in fit
    assert fit[1:3] == ["train.py", "fit"]
    assert {
        "--trainer.max_steps=7",
        "--trainer.val_check_interval=7",
        "--model.init_args.network.path=m",
    } <= set(fit)
    look = words(fit_command(study, "f", "0", "repair", "m", objective="watched", **names))
    assert look[1:3] == ["train.py", "validate"] and not any(
        "val_check_interval" in word for word in look
    )


def test_an_edit_is_followed_by_an_evaluation_in_the_alignment_s_data(study):
    edit, look = edit_command(study, "runs/f", "3", "runs/b", "runs/a", "further").split(" && ")
    assert words(edit)[1:] == [
        "-m",
        "temper.edit",
        "interpolate",
        "--base",
        "runs/b",
        "--aligned",
        "runs/a",
        "--out",
        "runs/f/export",
        "--a",
        "1.5",
    ]
    assert words(look)[1:3] == ["train.py", "validate"]
    assert {
        "configs/data/alignment.yaml",
        "--data.init_args.seed=3",
        "--model.init_args.network.path=runs/f/export",
    } <= set(words(look))


def test_the_report_waits_for_the_last_folder_of_every_route(study):
    inputs = {
        path.removeprefix("r/seed0/").removesuffix("/evaluation.json")
        for path in report_inputs(study, "r")
    }
    assert {place for place in inputs if not place.endswith("/p0")} == {
        "instruct",
        "align/sft",
        "align/further",
        "attack/sft/mild/p0.2",
        "attack/further/mild/p0.2",
        "attack/gentle/mild/p0.2",
        "repair/mended/mild/p0.2",
        "repair/watched/mild/p0.2",
    }


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"aligned_by": "none", "attack": {}}, "aligned_by is 'none'"),
        ({"aligned_by": "further", "attack": {}}, "aligned_by is 'further'"),
        ({"aligned_by": "sft"}, "say what differs"),
        (
            {"aligned_by": "sft", "config": ["configs/objective/sft.yaml"], "attack": {}},
            "say what differs",
        ),
        ({"edit": ["interpolate"]}, "edit needs aligned_by"),
        ({"aligned_by": "sft", "edit": "interpolate"}, "such as [interpolate"),
        ({"aligned_by": "sft", "edit": ["remove-harm"]}, "such as [interpolate"),
        ({"aligned_by": "sft", "repair": {"verb": "fitt"}}, "choose fit or validate"),
        (
            {"aligned_by": "sft", "repair": {"config": ["configs/objective/sft.yaml"]}},
            "needs trainer.max_steps",
        ),
        ({"aligned_by": "sft", "attack": {"sett": {}}}, "did you mean 'set'"),
        (
            {"aligned_by": "sft", "repair": {"config": ["configs/none.yaml"], "verb": "validate"}},
            "does not exist",
        ),
    ],
)
def test_a_route_that_leads_nowhere_is_refused(write_study, part, words):
    path = write_study(
        objectives=OBJECTIVES | {"wrong": part},
        headline={"attack": "mild", "baseline": "sft", "method": "gentle"},
    )
    with pytest.raises(TemperError) as mistake:
        load_study(path)
    assert words in str(mistake.value) and "objectives.wrong" in str(mistake.value)


def test_snakemake_plans_every_route_once(study, write_study, tmp_path, capfd):
    from temper.study.run import main

    assert (
        main(
            [
                str(tmp_path / "study.yaml"),
                "--runs",
                str(tmp_path / "runs"),
                "--cores",
                "1",
                "--dry-run",
            ]
        )
        == 0
    )
    shown = "".join(capfd.readouterr())
    counts = {
        line.split()[0]: int(line.split()[1])
        for line in shown.splitlines()
        if len(line.split()) == 2 and line.split()[1].isdigit()
    }
    assert {name: counts.get(name) for name in ("align", "edit", "attack", "repair")} == {
        "align": 1,
        "edit": 1,
        "attack": 6,
        "repair": 4,
    }
