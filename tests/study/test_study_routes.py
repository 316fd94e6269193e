"""Objectives that act at other stages than alignment."""

import shlex

import pytest

from temper.errors import TemperError
from temper.study import Study
from temper.study.stages import Stage, evaluations

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
    "watched": {
        "aligned_by": "sft",
        "repair": {"verb": "validate", "config": ["configs/trainer/steering.yaml"]},
    },
}


@pytest.fixture
def study(write_study) -> Study:
    return Study.load(
        write_study(
            objectives=OBJECTIVES,
            headline={"attack": "mild", "baseline": "sft", "method": "gentle"},
        )
    )


def test_routes_say_whose_models_are_used(study):
    routes = study.routes
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
    theirs, plain = (
        set(words(Stage(study, "r", 0, f"attack/{one}/mild/p0.2").fit_command))
        for one in ("gentle", "sft")
    )
    assert theirs - plain == {
        "--model.init_args.max_grad_norm=0.1",
        "--trainer.default_root_dir=r/seed0/attack/gentle/mild/p0.2",
    }


def test_a_repair_that_trains_is_a_stage_of_its_own(study):
    repair = Stage(study, "r", 0, "repair/mended/mild/p0.2")
    fit = words(repair.fit_command)
    assert "--model.init_args.x=r/seed0/align/sft/export+r/seed0/instruct/export" in fit
    assert fit[1:3] == ["train.py", "fit"]
    attacked = "r/seed0/attack/sft/mild/p0.2/export"
    assert {"--trainer.max_steps=7", f"--model.init_args.network.path={attacked}"} <= set(fit)
    aligned = "r/seed0/align/sft/export"
    base = "r/seed0/instruct/export"
    assert repair.inputs == [attacked, base, aligned]
    assert repair.answers_from == ["r/seed0/repair/mended/mild/p0.2/export"]


def test_a_repair_without_training_uses_attacked_weights(study):
    watched = Stage(study, "r", 0, "repair/watched/mild/p0.2")
    answer = words(watched.answer_command)
    assert not watched.trained and answer[1:3] == ["train.py", "predict"]
    attacked = "r/seed0/attack/sft/mild/p0.2/export"
    assert f"--model.init_args.network.path={attacked}" in answer
    assert "configs/trainer/steering.yaml" in answer, "what is switched on"
    assert watched.answers_from == [attacked]


def test_an_edit_answers_to_the_alignment_s_prompts(study):
    edited = Stage(study, "runs", 3, "align/further")
    base = "runs/seed3/instruct/export"
    aligned = "runs/seed3/align/sft/export"
    folders = ["--base", base, "--aligned", aligned, "--out", "runs/seed3/align/further/export"]
    assert words(edited.edit_command)[1:] == [
        "-m",
        "temper.edit",
        "interpolate",
        *folders,
        "--a",
        "1.5",
    ]
    assert edited.inputs == [aligned, base] and not edited.trained
    look = words(edited.answer_command)
    assert look[1:3] == ["train.py", "predict"]
    assert {
        "configs/data/alignment.yaml",
        "--data.init_args.seed=3",
        "--model.init_args.network.path=runs/seed3/align/further/export",
    } <= set(look)


def test_the_report_waits_for_the_last_folder_of_every_route(study):
    inputs = {
        path.removeprefix("r/seed0/").removesuffix("/evaluation.json")
        for path in evaluations(study, "r")
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
        ({"aligned_by": "none", "attack": {}}, "aligned_by: found 'none'"),
        ({"aligned_by": "further", "attack": {}}, "aligned_by: found 'further'"),
        ({"aligned_by": "sft"}, "say what differs"),
        (
            {"aligned_by": "sft", "config": ["configs/objective/sft.yaml"], "attack": {}},
            "say what differs",
        ),
        ({"edit": ["interpolate"]}, "edit: found without aligned_by"),
        ({"aligned_by": "sft", "edit": "interpolate"}, "edit: found 'interpolate'; accepted"),
        ({"aligned_by": "sft", "edit": ["remove-harm"]}, "such as [interpolate"),
        ({"aligned_by": "sft", "repair": {"verb": "fitt"}}, "accepted: 'fit' or 'validate'"),
        (
            {"aligned_by": "sft", "repair": {"config": ["configs/objective/sft.yaml"]}},
            "trainer.max_steps is missing",
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
        Study.load(path)
    assert words in str(mistake.value) and "objectives.wrong" in str(mistake.value)


@pytest.mark.slow
def test_snakemake_plans_every_route_once(study, write_study, tmp_path, capfd):
    from temper.cli.verbs.study import main

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
    jobs = {"align": 1, "edit": 1, "attack": 6, "repair": 2, "answers": 1 + 2 + 6 + 4, "judge": 1}
    assert {name: counts.get(name) for name in jobs} == jobs
