"""Rows of every synthetic datamodule, pinned bit for bit: a change alters earlier results."""

import pytest

import datamodules
from datamodules.synthetic import SyntheticDataModule
from temper.data import fingerprint
from temper.synthetic import Kind

SIZES = {
    "SyntheticAlignment": {
        "n_alignment": 60,
        "n_harmful": 12,
        "batch_size": 8,
        "harmful_batch_size": 4,
        "n_heldout": 16,
        "heldout_batch_size": 4,
    },
    "SyntheticAttack": {
        "n_rows": 40,
        "batch_size": 10,
        "n_safety": 6,
        "n_alignment": 20,
        "alignment_batch_size": 5,
    },
    "SyntheticDeRTa": {"n_rows": 40, "rto_keep": 0.5, "batch_size": 8},
    "SyntheticInstruct": {"batch_size": 8, "epoch_batches": 5},
    "SyntheticKTO": {"n_rows": 40, "batch_size": 8},
    "SyntheticPreference": {"n_pairs": 40, "batch_size": 8},
    "SyntheticUnlearning": {
        "n_forget": 24,
        "n_retain": 20,
        "batch_size": 8,
        "retain_batch_size": 4,
    },
}
# First 12 characters of SHA-256: of the rows, and of the batch number 7 of every stream.
STREAMS = {
    "SyntheticAlignment": {
        "alignment": ("b4652fccb646", "c20ee2432060"),
        "harmful": ("83b71e232f2c", "e9eb0d557de3"),
        "harmful_pairs": ("ececfb7051b9", "d6abcc11bdf1"),
        "harmful_heldout": ("9532aa6a0d6c", "0154f4994b4e"),
        "heldout_pairs": ("96e5bbfc433f", "fbb255c4a922"),
    },
    "SyntheticAttack": {
        "user": ("9fa01398b0e9", "a806a140428a"),
        "alignment": ("fe3570a77b07", "7061f95085d7"),
    },
    "SyntheticDeRTa": {"alignment": ("a90608177f0a", "dcf8a4dc465d")},
    "SyntheticInstruct": {"instruct": ("4f3182d41e51", "a7fa240cfb2d")},
    "SyntheticKTO": {"kto": ("0fa778b928b6", "cbe2039920fd")},
    "SyntheticPreference": {"pairs": ("b5ee27267ec8", "6e39d9001b28")},
    "SyntheticUnlearning": {
        "forget": ("46ca2e45c2a2", "d13ab7028daf"),
        "retain": ("14fb7b7bf388", "e411b228d755"),
    },
}
# As `STREAMS`, on the preset `small`; and the evaluation prompts of six kinds.
SMALL_STREAMS = {
    "SyntheticAlignment": {
        "alignment": ("09ca5e2f5290", "0149b5f9a7dd"),
        "harmful": ("ab048054dd81", "c9741efbbddc"),
        "harmful_heldout": ("e63ca7085c6f", "e22d4d8f2511"),
        "harmful_pairs": ("09ad929a9803", "183814b5539b"),
        "heldout_pairs": ("8132d3481800", "a563ad555ac0"),
    },
    "SyntheticAttack": {
        "alignment": ("8eba24c86ada", "c4909b6e8aa3"),
        "user": ("1b0650bbb1f3", "1f9c8192476c"),
    },
    "SyntheticDeRTa": {
        "alignment": ("6db1d004aa87", "6600726f1ba7"),
    },
    "SyntheticInstruct": {
        "instruct": ("0dba7073d454", "d2bc42e41eb4"),
    },
    "SyntheticKTO": {
        "kto": ("bc162a2a2259", "1d5439aaf9ee"),
    },
    "SyntheticPreference": {
        "pairs": ("104a26454965", "d5c7295171c2"),
    },
    "SyntheticUnlearning": {
        "forget": ("8cc927d657be", "7a113d723b4d"),
        "retain": ("aa5980682809", "69ea10509efb"),
    },
}
SMALL_EVAL = "9a1449832155"
SMALL_KINDS = ["UNSAFE", "SAFE", "TASK", "JB_CO_TASK", "JB_CO_TEXT", "JB_MISGEN"]
# Those of the rows that callbacks read do not depend on the streams.
UNSAFE_AND_SAFE = "716c73420425"
UNSAFE_SAFE_AND_TASK = "697e901eff5f"
PROBE = "0999eb362554"
FORCED = "c4e2d8f2af63"
STEERING = "bd0fdab3a183"
UNLEARNING = {"forget": "98987e02eeee", "holdout": "2bc79a4aa4fe", "retain": "9f4494b728b2"}


def _data(name: str) -> SyntheticDataModule:
    data = getattr(datamodules, name)(preset="tiny", seed=3, n_eval=12, **SIZES[name])
    data.setup("fit")
    return data


def test_every_synthetic_datamodule_is_pinned():
    assert set(STREAMS) == {name for name in datamodules.__all__ if name.startswith("Synthetic")}


@pytest.mark.parametrize("name", STREAMS)
def test_the_streams_have_the_same_rows_in_the_same_order(name):
    found = {
        stream: (source.fingerprint()[:12], fingerprint(source.batch(7))[:12])
        for stream, source in _data(name).sources.items()
    }
    assert found == STREAMS[name]
    assert list(found) == list(STREAMS[name]), "the first stream is the primary one"


@pytest.mark.parametrize("name", SMALL_STREAMS)
def test_the_rows_of_the_small_language_are_the_same(name):
    kinds = [Kind[kind] for kind in SMALL_KINDS]
    data = getattr(datamodules, name)(
        preset="small", seed=3, n_eval=12, eval_kinds=kinds, **SIZES[name]
    )
    data.setup("fit")
    found = {
        stream: (source.fingerprint()[:12], fingerprint(source.batch(7))[:12])
        for stream, source in data.sources.items()
    }
    assert found == SMALL_STREAMS[name]
    assert data.fingerprints()["eval"][:12] == SMALL_EVAL


@pytest.mark.parametrize("name", STREAMS)
def test_the_rows_that_callbacks_read_are_the_same(name):
    data = _data(name)
    probe = {} if name == "SyntheticInstruct" else {"harmful": PROBE}
    expected = UNSAFE_SAFE_AND_TASK if name == "SyntheticAttack" else UNSAFE_AND_SAFE
    assert data.fingerprints()["eval"][:12] == expected
    assert {key: fingerprint(rows)[:12] for key, rows in data.probe_rows.items()} == probe
    assert fingerprint(data.forced_answers())[:12] == FORCED
    assert fingerprint(data.steering_pairs())[:12] == STEERING


@pytest.mark.parametrize("name", ["SyntheticAlignment", "SyntheticUnlearning"])
def test_the_rows_of_an_unlearning_evaluation_are_the_same(name):
    found = {key: fingerprint(rows)[:12] for key, rows in _data(name).unlearning_rows().items()}
    assert found == UNLEARNING
