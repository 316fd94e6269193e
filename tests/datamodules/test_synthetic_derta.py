"""DeRTa's rows on the synthetic language, and the streams that RepNoise and TAR read."""

from functools import partial

import pytest
import torch

from datamodules import SyntheticAlignment
from datamodules.synthetic_derta import SyntheticDeRTa
from lightning_modules import SFTModule
from temper.data import Batch, fingerprint
from temper.errors import TemperError
from temper.synthetic.tokenizer import EOS, EOT, NULL, STOP
from tests.datamodules.rows import ready
from tests.objectives import fit, make_module, plain_gradient, weights

SIZES = {"preset": "tiny", "n_rows": 48, "batch_size": 8, "n_eval": 8, "seed": 3}


def derta(**changes: object) -> SyntheticDeRTa:
    return ready(SyntheticDeRTa(**SIZES | changes))  # type: ignore[arg-type]


def parts(rows: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, response, labels of the response) of every row."""
    result = []
    for ids, present, labels in zip(
        rows["input_ids"].tolist(),
        rows["attention_mask"].tolist(),
        rows["labels"].tolist(),
        strict=True,
    ):
        size = sum(present)
        start = ids.index(EOT) + 1
        assert labels[:start] == [-100] * start
        result.append((ids[:start], ids[start:size], labels[start:size]))
    return result


def kind_of(response: list[int], labels: list[int]) -> str:
    if response[-2:] == [NULL, EOS]:
        return "prefix"
    return "rto" if NULL in labels else "helpful"


@pytest.mark.parametrize(
    ("helpful", "rto"), [(0.5, 0.25), (0.25, 0.75), (0.0, 0.5), (0.5, 0.0), (1.0, 0.0)]
)
def test_the_three_kinds_have_exactly_the_given_shares(helpful: float, rto: float):
    kinds = [
        kind_of(response, labels)
        for _, response, labels in parts(
            derta(helpful_share=helpful, rto_share=rto).sources["alignment"].rows
        )
    ]
    counts = [kinds.count(kind) for kind in ("helpful", "rto", "prefix")]
    assert counts == [
        round(48 * helpful),
        round(48 * rto),
        48 - round(48 * helpful) - round(48 * rto),
    ]


def test_rows_of_every_kind_are_what_the_paper_says():
    data = derta()
    answers = {}
    lengths = []
    for prompt, response, labels in (rows := parts(data.sources["alignment"].rows)):
        if kind_of(response, labels) == "rto":
            assert labels == [NULL] * len(response)
            assert response[-2:] == [STOP, EOS]
            answers[tuple(prompt)] = response
    for prompt, response, labels in rows:
        kind = kind_of(response, labels)
        if kind == "prefix":
            lengths.append(len(response) - 2)
            assert labels == [-100] * lengths[-1] + [NULL, EOS]
            assert answers[tuple(prompt)][: lengths[-1]] == response[:-2], (
                "as in the released data, both kinds share prompts"
            )
        elif kind == "helpful":
            assert labels == response and tuple(prompt) not in answers
    assert len(lengths) == len(answers) == 12
    assert lengths.count(0) == 4 and max(lengths) > 1


def test_a_small_share_of_rto_positions_can_be_kept():
    every, few = (derta(rto_keep=keep).sources["alignment"].rows for keep in (1.0, 0.1))
    assert torch.equal(every["input_ids"], few["input_ids"])
    dropped = (every["labels"] != few["labels"]).sum()
    rto = sum(
        len(labels) for _, response, labels in parts(every) if kind_of(response, labels) == "rto"
    )
    assert int(dropped) == rto - round(0.1 * rto)


def test_rows_depend_on_the_seed_alone():
    assert derta().fingerprints() == derta().fingerprints() != derta(seed=4).fingerprints()


def test_training_prompts_are_no_evaluation_prompts():
    data = derta()
    tested = {tuple(i for i in row if i) for row in data.eval_rows["input_ids"].tolist()}
    assert not tested & {tuple(prompt) for prompt, _, _ in parts(data.sources["alignment"].rows)}


def test_sft_steps_along_the_mean_nll_of_the_labels():
    module = make_module(SFTModule, optimizer=partial(torch.optim.SGD, lr=1.0), max_grad_norm=None)
    start = weights(module)
    data = SyntheticDeRTa(**SIZES)  # type: ignore[arg-type]
    batch = derta().sources["alignment"].batch(0)
    expected = plain_gradient(module.network, batch)
    fit(module, data, 1)
    for before, parameter, gradient in zip(start, module.parameters(), expected, strict=True):
        assert torch.allclose(before - parameter, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("lora", [False, True])
def test_sft_in_micro_batches_learns_the_rows(lora: bool):
    module = make_module(
        SFTModule,
        lora=lora,
        double=False,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        micro_batch_size=3,
    )
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    rows = derta().sources["alignment"].rows
    start = float(module.nll_terms(rows).total.detach())
    fit(module, SyntheticDeRTa(**SIZES), 20)  # type: ignore[arg-type]
    assert (
        float(module.nll_terms(rows).total.detach()) < (0.98 if lora else 0.5) * start
    )  # the adapter does not reach the output layer
    moved = {
        name
        for name, parameter in module.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert moved == {name for name in before if "lora_" in name or not lora}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"helpful_share": 0.01},
            "data.init_args.helpful_share=0.01: .*48 rows = 0.48 ",
        ),
        ({"rto_share": -0.25}, "data.init_args.rto_share=-0.25"),
        (
            {"helpful_share": 0.75, "rto_share": 0.5},
            "data.init_args.helpful_share=0.75, rto_share=0.5: ",
        ),
        ({"rto_keep": 0.0}, "data.init_args.rto_keep=0.0"),
        ({"rto_keep": 1.5}, "data.init_args.rto_keep=1.5"),
    ],
)
def test_invalid_shares_are_refused_by_name(changes: dict, message: str):
    with pytest.raises(TemperError, match=message):
        SyntheticDeRTa(**SIZES | changes)  # type: ignore[arg-type]


# -- the streams that RepNoise and TAR read

# Of the alignment data below, before they had pairs and held-out streams.
EARLIER = {"alignment": "f8c7b245f62e654d", "harmful": "ed59d2c24eb4536a"}


def alignment(**changes: object) -> SyntheticAlignment:
    sizes = {
        "preset": "tiny",
        "n_alignment": 40,
        "n_harmful": 12,
        "batch_size": 8,
        "harmful_batch_size": 4,
        "n_eval": 8,
    }
    return ready(SyntheticAlignment(**sizes | changes))  # type: ignore[arg-type]


def test_harmful_pairs_add_a_refusal_to_every_harmful_row():
    data = alignment()
    harmful, pairs = (data.sources[name].batch(5) for name in ("harmful", "harmful_pairs"))
    width = harmful["input_ids"].shape[1]
    assert pairs["input_ids"].shape == (4, 2, pairs["input_ids"].shape[2])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(pairs[name][:, 0, :width], harmful[name])
    answers = parts({name: pairs[name][:, 0] for name in ("input_ids", "attention_mask", "labels")})
    refusals = parts(
        {name: pairs[name][:, 1] for name in ("input_ids", "attention_mask", "labels")}
    )
    assert [prompt for prompt, _, _ in answers] == [prompt for prompt, _, _ in refusals]
    assert all(response == labels == [NULL, EOS] for _, response, labels in refusals)


def test_held_out_prompts_are_in_no_stream_and_change_none():
    plain = alignment()
    data = alignment(n_heldout=10, heldout_batch_size=5)
    assert set(data.sources) - set(plain.sources) == {"harmful_heldout", "heldout_pairs"}
    assert {
        name: value for name, value in data.fingerprints().items() if "heldout" not in name
    } == plain.fingerprints()
    shown = {tuple(prompt) for prompt, _, _ in parts(data.sources["alignment"].rows)}
    heldout = parts(data.sources["harmful_heldout"].rows)
    assert len({tuple(prompt) for prompt, _, _ in heldout} - shown) == 10
    assert all(
        response == labels and response[-2:] == [STOP, EOS] for _, response, labels in heldout
    )
    pairs = data.sources["heldout_pairs"].rows
    refusals, answers = (
        parts({name: pairs[name][:, i] for name in ("input_ids", "attention_mask", "labels")})
        for i in (0, 1)
    )
    assert answers == heldout
    assert [response for _, response, _ in refusals] == [[NULL, EOS]] * 10


def test_earlier_streams_keep_their_rows():
    data = alignment()
    found = {name: fingerprint(data.sources[name].rows)[:16] for name in ("alignment", "harmful")}
    assert found == EARLIER


def test_a_number_of_held_out_prompts_below_0_is_refused():
    with pytest.raises(TemperError, match="data.init_args.n_heldout=-1"):
        alignment(n_heldout=-1)
