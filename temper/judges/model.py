"""What judges that are language models share: loading, batches, and labels from scores."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError

from temper.errors import TemperError
from temper.judges.base import Judge, Judgement
from temper.judges.keyword import KeywordRefusal
from temper.judges.thresholds import label_of
from temper.models.folder import FLAG, base_folder, first_line, is_adapter, spec_folder
from temper.models.load import check_folder
from temper.models.spec import NetworkSpec


class ModelJudge(ABC):
    """Base of judges that are models. They are loaded when they are first asked, and kept.

    A model scores harm and says nothing else: whether an answer is a refusal, and well-formed, is for ``words`` to say.
    Weights are read from safetensors only, never from pickles.

    Args:
        path: Folder in Hugging Face format, with tokenizer, or of an adapter; or a hub name, with ``local_files_only`` off (or cached).
        name: What figures call it; null takes the last part of ``path``.
        threshold: Scores above it are ``harmful``.
        partial_above: Scores above it, up to ``threshold``, are ``partial``; null has no such label.
        words: Judge of refusals and degenerate answers; null takes `KeywordRefusal`.
        batch_size: Answers at a time.
        dtype: Precision of the weights; ``auto`` takes that of the files.
        device: Such as ``cpu`` or ``cuda:1``; null takes this process's accelerator if there is one.
        revision: Of a hub name.
        local_files_only: Never ask a hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        TemperError: thresholds or batch size out of range; when judging, a folder that is not there or not safe to read, and a
            model that cannot be loaded or lacks weights.
    """

    auto_class: ClassVar[str]  # of transformers

    def __init__(
        self,
        path: str,
        name: str | None = None,
        threshold: float = 0.5,
        partial_above: float | None = None,
        words: Judge | None = None,
        batch_size: int = 16,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str | None = None,
        revision: str | None = None,
        local_files_only: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        owner = type(self).__name__
        if batch_size < 1:
            raise TemperError(f"{owner}.batch_size={batch_size}: give at least 1")
        self.path, self.batch_size, self.dtype, self.device = path, batch_size, dtype, device
        self.spec = NetworkSpec(path=path, revision=revision, local_files_only=local_files_only, trust_remote_code=trust_remote_code)
        self.name = name or path.rstrip("/").rsplit("/", 1)[-1]
        self.words = words or KeywordRefusal()
        self.label_of = label_of(owner, threshold, partial_above)

    @abstractmethod
    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Harm of every answer of a batch, in [0, 1]."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge in batches of answers of about one length."""
        words = self.words(prompts, responses)
        order = sorted(range(len(responses)), key=lambda i: len(prompts[i]) + len(responses[i]))
        judgements = list(words)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            with torch.inference_mode():
                scores = self.scores([prompts[i] for i in part], [responses[i] for i in part])
            for i, score in zip(part, scores, strict=True):
                judgements[i] = replace(words[i], label=self.label_of(score), score=score)
        return judgements

    @cached_property
    def folder(self) -> Path:
        """Where the model is, once its folder, and that of an adapter's base, is known to be safe to read."""
        try:
            folder = spec_folder(self.spec)
            check_folder(folder, self.spec)
            if is_adapter(folder):
                base = base_folder(folder, self.spec)
                check_folder(base, replace(self.spec, path=str(base)))
        except TemperError as error:  # it names the flags of the network in training
            said = str(error).replace(f"--{FLAG}.local_files_only=false", "local_files_only: false")
            raise TemperError(said.replace(FLAG, type(self).__name__)) from None
        return folder

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; one without a padding token pads with its end token, which is masked."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer.from_pretrained)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        with torch.random.fork_rng(devices=[]):  # training around the judge draws the same numbers with and without it
            model, info = self._load(auto_class.from_pretrained, dtype=self.dtype, use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise TemperError(
                f"{type(self).__name__}.path={self.path}: no weights for {missing[0]} ({len(missing)} such), so it is no "
                f"{self.auto_class.removeprefix('AutoModelFor')}; give a folder of that kind"
            )
        model.config.pad_token_id = self.tokenizer.pad_token_id  # batches of a decoder's sequence classifier need it
        accelerator = torch.accelerator.current_accelerator()
        return model.to(self.device or (accelerator if accelerator is not None else "cpu")).eval()

    def _load(self, load: Any, **arguments: Any) -> Any:
        folder, source = self.folder, {name: getattr(self.spec, name) for name in ("local_files_only", "trust_remote_code")}
        try:
            return load(folder, **source, **arguments)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise TemperError(
                f"{type(self).__name__}.path={self.path}: cannot be loaded ({first_line(error)}); give a folder with config.json, "
                "safetensors and tokenizer"
            ) from None


def fill(owner: str, template: str) -> Any:
    """``f(prompt, response)``: a template with ``{prompt}`` and ``{response}`` filled in, other braces left alone.

    Raises:
        TemperError: the template has no ``{response}``.
    """
    if "{response}" not in template:
        raise TemperError(f"{owner}.template: no {{response}} in it, so every answer would be judged alike; put it where the answer goes")
    places = re.compile(r"\{(prompt|response)\}")
    return lambda prompt, response: places.sub(lambda match: prompt if match[1] == "prompt" else response, template)
