"""Export of the network of a run: in which form, checked against the run, with its model card."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.card import adapter_note, model_card
from temper.models.end_tokens import end_tokens
from temper.models.export import WRITER, Dtype, Form, precision_of, write_export
from temper.models.export_check import (
    MAX_KL,
    Agreement,
    Answers,
    NotChecked,
    answer,
    compare,
    prompts_of,
)
from temper.models.folder import NetworkSpec, first_line
from temper.models.generate import set_aside
from temper.models.lora import base_model_name, check_base_name, is_adapted, save_adapter
from temper.models.merge import CannotMergeError
from temper.models.quantize import is_quantized
from temper.output_folder import staging_folder

MAX_LOST = 0.1  # share of what was learned that a merge may lose where nobody asked for it


@dataclass(frozen=True)
class ExportSettings:
    """How the network of a run is exported.

    Args:
        merge: Merge the trained adapter into the weights, or export it alone; None: merge where
            that loses nothing that matters, else export it alone.
        dtype: Precision of the written weights, unless only an adapter is; None: the network's.
        check: Compare the answers of the written folder with those of the network.
        max_kl: Largest mean KL divergence in nats per token that rounding may cause.
    """

    merge: bool | None = None
    dtype: Dtype | None = None
    check: bool = True
    max_kl: float = MAX_KL

    def __post_init__(self) -> None:
        if not self.max_kl >= 0:
            raise TemperError(f"max_kl={self.max_kl}: give a number >= 0, in nats per token")


def keep_adapter(network: nn.Module, folder: Path, spec: NetworkSpec | None, flag: str) -> None:
    """Write the adapter of a network to a folder, with how to load it.

    Args:
        network: A PEFT model; it does not change.
        folder: Target: new, or an earlier one.
        spec: Settings of the network; None: unknown.
        flag: Option that gave the folder, for errors.

    Raises:
        TemperError: the target holds files that Temper did not write.
    """
    with staging_folder(folder, flag, WRITER) as staging:
        save_adapter(network, staging)
        note = adapter_note(spec, base_model_name(network))
        (staging / "README.md").write_text(note, encoding="utf-8")


def export_module(
    module: Any,
    data: Any,
    folder: Path,
    settings: ExportSettings | None = None,
    run: Path | None = None,
    step: int = 0,
    network: nn.Module | None = None,
    device: torch.device | None = None,
    flag: str = "--folder",
) -> Form:
    """Export the network of an objective, with the tokenizer of its data and a model card.

    The written folder is loaded again, and its greedy answers are compared with the network's.
    Where nothing was rounded they must be the same; where weights were (a merge into 16 bits, a 4-
    or 8-bit base), the mean KL divergence per token along the network's answers is measured. What
    was found is on the card, as is that there was no memory for a second copy.

    Args:
        module: Has ``network``, and a ``network_spec`` for the card; without that there is no card.
        data: Has ``tokenizer``, and maybe ``stop_ids``, the tokens that end an answer, and prompts
            (`prompts_of`).
        folder: Target.
        settings: Form, precision and check; None: the defaults.
        run: Run folder that the card is written from; None: the network was not trained.
        step: Optimizer steps that the weights were trained for.
        network: Network to export instead of ``module.network``, whose weights may be sharded over
            ranks.
        device: Where the check computes; None: on the CPU.
        flag: Option that gave the folder, for errors.

    Returns:
        What was written: the whole network, the merged one, or the adapter.

    Raises:
        TemperError: the folder does not answer as the network does, or rounding changes more than
            ``max_kl``; the adapter alone is asked for, and its base is in no folder; the target
            holds files that Temper did not write.
    """
    spec: NetworkSpec | None = getattr(module, "network_spec", None)
    export = _Export(
        module.network if network is None else network,
        spec or NetworkSpec(),
        data,
        ExportSettings() if settings is None else settings,
        torch.device("cpu") if device is None else device,
    )
    for one in export.tries():
        try:
            with staging_folder(folder, flag, WRITER) as staging:
                note = export.write(one, staging)
                if spec is not None:
                    card = model_card(spec, one.form, run, step, note, export.decoding())
                    (staging / "README.md").write_text(card, encoding="utf-8")
            return one.form
        except _LosesTooMuch as found:
            export.notes.append(str(found))
            warnings.warn(f"export: {found}; exported otherwise (see README.md)", stacklevel=2)
    raise AssertionError("the last try is written or raises")


class _LosesTooMuch(Exception):  # noqa: N818 - an outcome, and no error
    """What a form that nobody asked for would lose, in words; another form is next."""


@dataclass(frozen=True)
class _Try:
    """A way to write a network.

    Args:
        form: What is written.
        dtype: Precision of whole weights; None: their own.
        exact: Whether nothing is rounded.
        last: Whether this form is written or refused; otherwise another one follows.
    """

    form: Form
    dtype: torch.dtype | None
    exact: bool
    last: bool


class _Export:
    """The export of one network; the network answers once, whatever is tried."""

    def __init__(
        self,
        network: nn.Module,
        spec: NetworkSpec,
        data: Any,
        settings: ExportSettings,
        device: torch.device,
    ) -> None:
        self.network = network
        self.spec = spec
        self.data = data
        self.settings = settings
        self.device = device
        self.stop_ids: list[int] = getattr(data, "stop_ids", None) or []
        self.notes: list[str] = []
        self.unchecked = ""
        self.answers = self._answer()

    def tries(self) -> Iterator[_Try]:
        """What to write, the best first.

        Raises:
            TemperError: the adapter alone is asked for, and its base is in no folder.
        """
        name = self.settings.dtype
        dtype: torch.dtype | None = None if name is None else getattr(torch, name)
        own = precision_of(self.network)
        kept = dtype in (None, own, torch.float32)
        if not is_adapted(self.network):
            yield _Try("whole", dtype, exact=kept, last=True)
            return
        quantized = is_quantized(self.network)
        exact = not quantized and (dtype or own) == torch.float32
        if self.settings.merge is False:
            check_base_name(self.network)
            yield _Try("adapter", None, exact=not quantized, last=True)
            return
        if self.settings.merge is True:
            yield _Try("merged", dtype, exact, last=True)
            return
        placed = bool(base_model_name(self.network))
        if exact or self.answers is not None:
            yield _Try("merged", dtype, exact, last=exact and not placed)
        else:
            self.notes.append(f"merging rounds, what it loses was not measured: {self.unchecked}")
        if placed:
            yield _Try("adapter", None, exact=not quantized, last=True)
        else:  # on random weights, or on a base that an adapter was merged into
            yield _Try("merged", torch.float32, exact=not quantized, last=True)

    def write(self, one: _Try, folder: Path) -> str:
        """Write a folder, and check it; return what the card says about it.

        Raises:
            TemperError: the folder answers otherwise than the network, or loses too much.
            _LosesTooMuch: it loses too much, and another form is next.
        """
        tokenizer = self.data.tokenizer
        try:
            write_export(self.network, tokenizer, folder, one.form, self.stop_ids, one.dtype)
        except CannotMergeError as error:
            if one.last:
                raise
            raise _LosesTooMuch(str(error)) from error
        said = [f"{_capitalised(note)}." for note in self.notes]
        if is_quantized(self.network) and one.form == "merged":
            said.append("The base model was quantized; its weights were dequantized to merge.")
        if self.answers is None:
            return " ".join([*said, f"Not checked against the trained network: {self.unchecked}."])
        try:
            found = self._compare(self.answers, folder)
        except (NotChecked, torch.OutOfMemoryError) as error:
            if not (one.last or one.exact):
                what = f"what {_words(one, self.network)} loses was not measured"
                raise _LosesTooMuch(f"{what}: {first_line(error)}") from error
            said.append(f"Not checked against the trained network: {first_line(error)}.")
            return " ".join(said)
        if problem := self._problem(found, one):
            what = f"{_words(one, self.network)} {problem}"
            if not one.last:
                raise _LosesTooMuch(what)
            raise TemperError(f"export: {what}; {self._way_out(found, one)}")
        return " ".join([*said, found.describe()])

    def decoding(self) -> str:
        """A sentence for the card on what greedy evaluation leaves unused; empty if nothing."""
        network: Any = self.network
        ignored = set_aside(network.generation_config)
        if not ignored:
            return ""
        return (
            f"The generation config also has {', '.join(ignored)}: Temper sets them aside, and"
            " `generate` uses them unless they are overridden."
        )

    def _answer(self) -> Answers | None:
        """The answers of the network; None, and `unchecked` says why, if there are none."""
        if not self.settings.check:
            self.unchecked = "the check is switched off"
            return None
        ends = end_tokens(self.network, self.stop_ids)
        try:
            prompts = prompts_of(self.data)
            return answer(self.network, self.spec, prompts, ends, self.device)
        except (NotChecked, torch.OutOfMemoryError) as error:
            self.unchecked = first_line(error)
            return None
        except Exception as error:  # a network that answers in a way of its own, most likely
            raise TemperError(
                f"export: the trained network does not answer ({type(error).__name__}:"
                f" {first_line(error)}), so it cannot be compared; check=false writes it all the"
                " same"
            ) from error

    def _compare(self, answers: Answers, folder: Path) -> Agreement:
        """How the written folder compares.

        Raises:
            TemperError: it cannot be loaded.
        """
        try:
            return compare(answers, folder, self.spec, self.device)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise TemperError(
                f"export: the written folder cannot be loaded again: {first_line(error)}"
            ) from error

    def _problem(self, found: Agreement, one: _Try) -> str | None:
        """What is wrong with a written folder, in words; None if nothing is."""
        if one.exact:
            if found.is_exact:
                return None
            return (
                f"does not answer as the trained network: {found.same} of {found.n} greedy answers"
                f" are the same, mean KL {found.kl:.2g} nats per token"
            )
        if not found.kl <= self.settings.max_kl:
            return (
                f"has a mean KL of {found.kl:.2g} nats per token of the trained network's answers,"
                f" above max_kl={self.settings.max_kl}"
            )
        chosen = self.settings.merge is None and one.form == "merged"  # by nobody
        if chosen and found.lost is not None and found.lost > MAX_LOST:
            return (
                f"loses {100 * found.lost:.0f} % of what was learned (mean KL {found.kl:.2g} nats"
                f" per token; {found.trained_kl:.2g} of the network before training)"
            )
        return None

    def _way_out(self, found: Agreement, one: _Try) -> str:
        """Settings with which the export works."""
        if one.exact:
            return "check=false writes it all the same"
        larger = (
            f"max_kl={math.ceil(found.kl * 100 + 1) / 100}" if found.kl < 1e6 else "check=false"
        )
        if one.form == "merged" and not is_quantized(self.network):
            return f"set dtype=float32, merge=false, or {larger}"
        if one.form == "merged":
            return f"set merge=false, or {larger}"
        return f"set dtype=null, or {larger}" if one.form == "whole" else f"set {larger}"


def _words(one: _Try, network: nn.Module) -> str:
    """A written form in words, as the subject of a sentence."""
    precision = str(one.dtype or precision_of(network)).removeprefix("torch.")
    if one.form == "adapter":
        return "the adapter on its base model"
    if one.form == "whole":
        return f"the network in {precision}"
    base = "dequantized base" if is_quantized(network) else "base"
    return f"the adapter merged into the {base} in {precision}"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
