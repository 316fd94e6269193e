"""Several configs and flags as one config: lists, null, the order of flags, and what is dropped."""

import json
from typing import get_origin

import pytest
import yaml

from temper.cli.parser import TemperParser
from temper.judges import Judge

SFT = ["configs/trainer/cpu.yaml", "configs/objective/sft.yaml"]
TINY = ["configs/model/tiny.yaml", "configs/data/instruct.yaml"]
JUDGE = "{class_path: temper.judges.KeywordRefusal, init_args: {%s}}"
NAMED: list[dict[str, object]] = [{"name": "recipe", "opening": 7}, {"min_distinct": 0.5}]


@pytest.fixture
def files(tmp_path):
    """Config files with these texts."""

    def write(*texts: str) -> list[str]:
        paths = [tmp_path / f"{number}.yaml" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return [str(path) for path in paths]

    return write


def _judges(*judges: str) -> str:
    return (
        "trainer: {callbacks: [{class_path: SafetyEvaluation,"
        f" init_args: {{judges: [{', '.join(judges)}]}}}}]}}\n"
    )


# -- lists of classes


def test_a_later_list_inherits_nothing(files, print_config):
    later = files(
        "trainer: {callbacks: [SafetyEvaluation, Throughput, RunCard, HFExport,"
        " {class_path: lightning.pytorch.callbacks.ModelCheckpoint,"
        " init_args: {monitor: eval/harmful_score, mode: min}}]}\n"
    )
    saver = print_config(["configs/trainer/gpu.yaml", *later, SFT[1], *TINY])["trainer"][
        "callbacks"
    ][-1]["init_args"]
    assert (saver["save_last"], saver["save_top_k"], saver["every_n_train_steps"]) == (
        None,
        1,
        None,
    )
    assert saver["monitor"] == "eval/harmful_score"


@pytest.mark.parametrize("how", ["files", "flag", "saved"])
def test_a_later_list_of_judges_inherits_nothing(files, print_config, how):
    first = _judges(JUDGE % "name: recipe, compliance: [stir], min_distinct: 0")
    second = _judges(JUDGE % "")
    words: list[str] = []
    configs = files(first, second)
    if how == "flag":
        configs, words = configs[:1], [f"--trainer.callbacks.judges=[{JUDGE % ''}]"]
    if how == "saved":
        saved = print_config([*SFT, *TINY, configs[0]])
        configs = files(yaml.safe_dump(saved), second)
    (callback,) = print_config([*SFT, *TINY, *configs], *words)["trainer"]["callbacks"]
    (judge,) = callback["init_args"]["judges"]
    kept = {key: judge["init_args"][key] for key in ("name", "compliance", "min_distinct")}
    assert kept == {"name": "keyword_refusal", "compliance": [], "min_distinct": 0.3}


def test_a_later_list_of_loggers_inherits_nothing(files, print_config):
    kind = "class_path: lightning.pytorch.loggers.CSVLogger"
    first, second = (
        f"trainer: {{logger: [{{{kind}, init_args: {{{arguments}}}}}]}}\n"
        for arguments in ("save_dir: a, name: mine, flush_logs_every_n_steps: 3", "save_dir: b")
    )
    (logger,) = print_config([*SFT, *TINY, *files(first, second)])["trainer"]["logger"]
    kept = [logger["init_args"][key] for key in ("save_dir", "name", "flush_logs_every_n_steps")]
    assert kept == ["b", "lightning_logs", 100]


@pytest.mark.parametrize("kind", [dict[str, Judge], list[Judge], dict[str, list[Judge]]])
def test_a_later_collection_of_classes_inherits_nothing(kind):
    parser = TemperParser()
    parser.add_argument("--judges", type=kind)
    judges = [{"class_path": "temper.judges.KeywordRefusal", "init_args": a} for a in NAMED]
    nested = {list: lambda one: [one], dict: lambda one: {"a": one}}
    wrap = nested[get_origin(kind)]
    if kind == dict[str, list[Judge]]:
        judges = [[judge] for judge in judges]
    words = [f"--judges={json.dumps(wrap(judge))}" for judge in judges]
    found = parser.parse_args(words).judges
    while not hasattr(found, "init_args"):
        found = found["a"] if isinstance(found, dict) else found[0]
    assert (found.init_args.name, found.init_args.min_distinct) == ("keyword_refusal", 0.5)


def test_a_plus_appends_to_a_list(files, print_config):
    more = "trainer: {callbacks+: [{class_path: ProbeLoss}, {class_path: SampleGenerations}]}\n"
    found = print_config([*SFT, *TINY, *files(more)], "--trainer.callbacks+=ForcedPrefix")
    names = [one["class_path"].rpartition(".")[2] for one in found["trainer"]["callbacks"]]
    assert names[-4:] == ["HFExport", "ProbeLoss", "SampleGenerations", "ForcedPrefix"]
    assert names[0] == "SafetyEvaluation" and len(names) == 7


def test_flags_set_the_last_element_and_keep_the_rest(print_config):
    found = print_config(
        [*SFT, *TINY],
        "--trainer.callbacks.merge=false",
        "--trainer.callbacks+=ProbeLoss",
        "--trainer.callbacks.every_n_steps=7",
    )["trainer"]["callbacks"]
    assert found[-2]["init_args"]["merge"] is False and found[-1]["init_args"]["every_n_steps"] == 7


# -- null and other values keep their meaning on the way down


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--model.init_args.network.lora=null", "model.init_args.network.lora"),
        ("--model.network.lora=null", "model.init_args.network.lora"),
        ("--model.lr_scheduler=null", "model.init_args.lr_scheduler"),
        ("--model.max_grad_norm=null", "model.init_args.max_grad_norm"),
        ("--trainer.callbacks=null", "trainer.callbacks"),
        ("--trainer.val_check_interval=null", "trainer.val_check_interval"),
        ("--trainer.callbacks.dtype=null", "trainer.callbacks.3.init_args.dtype"),
        ("--ckpt_path=null", "ckpt_path"),
    ],
)
def test_null_is_nothing(print_config, flag, key):
    given = [
        "--model.network.lora.rank=4",
        "--model.max_grad_norm=3",
        "--trainer.val_check_interval=3",
        "--trainer.callbacks.dtype=float32",
        "--ckpt_path=a.ckpt",
    ]
    configs = ["configs/trainer/cpu.yaml", "configs/objective/booster.yaml"]
    found = print_config([*configs, TINY[0], "configs/data/alignment.yaml"], *given, flag)
    for part in key.split("."):
        found = found[int(part)] if part.isdecimal() else found[part]
    assert found is None


def test_a_commit_like_a_number_stays_text(print_config):
    found = print_config([*SFT, *TINY], "--model.network.revision=12e4567")
    assert found["model"]["init_args"]["network"]["revision"] == "12e4567"


# -- the order of flags


def test_an_argument_may_come_before_its_class(print_config):
    found = print_config([], "--model.rho=0.3", "--model=TVaccineModule", *_configs(TINY))
    assert found["model"]["init_args"]["rho"] == 0.3


def test_a_model_config_may_come_before_the_objective(print_config):
    one, other = (
        print_config([], *_configs(order), "--trainer.max_steps=3")
        for order in ([*SFT, *TINY], [*reversed(TINY), *reversed(SFT)])
    )
    assert one == other


def test_the_class_of_an_argument_may_come_after_it(print_config):
    words = ("--model.optimizer.momentum=0.9", "--model.optimizer=torch.optim.SGD")
    one, other = (
        print_config(["configs/model/tiny.yaml"], *order, "--model=SFTModule", *_configs(TINY[1:]))
        for order in (words, words[::-1])
    )
    assert one == other and one["model"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.9


def test_data_settings_may_come_before_their_class(print_config):
    found = print_config([*SFT, TINY[0]], "--data.n_eval=3", "--data", "SyntheticInstruct")
    assert found["data"]["init_args"]["n_eval"] == 3


def test_arguments_of_no_class_are_refused_in_one_line(command_line, capsys):
    with pytest.raises(SystemExit):
        command_line("fit", *_configs(TINY), "--model.max_grad_norm=3")
    line = capsys.readouterr().err
    assert line.startswith("error: --model: ") and "--model=CLASS" in line
    assert line.count("\n") == 1


def _configs(paths):
    return [f"--config={path}" for path in paths]


# -- a class that is replaced


def test_a_replaced_class_says_what_is_dropped(print_config, command_line, capsys):
    words = [*_configs([*SFT, *TINY]), "--model=BoosterModule", "--model.lam=7"]
    with pytest.raises(SystemExit):
        command_line("fit", *words, "--model=DPOModule", "--print_config")
    said = capsys.readouterr().err
    assert "BoosterModule was replaced by DPOModule" in said and "lam=7" in said


def test_a_new_class_has_its_own_defaults(print_config):
    found = print_config(
        ["configs/model/tiny.yaml"],
        *_configs(TINY[1:]),
        "--model=SFTModule",
        "--model.optimizer=torch.optim.SGD",
    )
    assert found["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0


# -- errors in lists


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (JUDGE % "nme: x", ["'nme'", "did you mean 'name'?"]),
        (JUDGE % "name: [1]", ["name=[1]", "give a text"]),
        (JUDGE % "min_distinct: many", ["min_distinct=many", "give a number"]),
        ("temper.judges.KeywordRefusl", ["did you mean 'temper.judges.KeywordRefusal'?"]),
        ("{class_path: temper.errors.TemperError}", ["TemperError' is no Judge"]),
        ("{class_path: temper.judges.KeywordRefusal, name: x}", ["init_args"]),
        ("{class: temper.judges.KeywordRefusal}", ["class_path", "init_args"]),
    ],
)
def test_an_error_inside_a_list_is_a_short_line(refused, files, judge, words):
    line = refused(f"--config={files(_judges(judge))[0]}")
    assert all(word in line for word in words) and len(line) < 200


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "--trainer.callbacks.dtype=float3",
            "dtype=float3: give float32, bfloat16, float16 or null",
        ),
        ("--model.network.dtype=null", "network.dtype=null: give float32, bfloat16"),
        ("--data.n_eval=many", "n_eval=many: give a whole number"),
        ("--trainer.callbacks+=lightning.pytorch.callbacks.Timr", "Timer'?"),
    ],
)
def test_a_value_of_another_type_is_a_short_line(refused, word, said):
    assert said in refused(word)
