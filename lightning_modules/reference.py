"""Objectives that compare the policy with a reference model: the policy as training found it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_modules.base import ObjectiveModule
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import Scores, SequenceScores
from temper.models import AdapterOff, CachedSums, FrozenCopy, NetworkSpec, Reference
from temper.models.lora import check_no_lora_dropout, disable_dropout
from temper.models.reference import reference_sums
from temper.plan.cost import Pass

Source = Literal["auto", "adapter_off", "frozen", "cached"]


class ReferenceModule(ObjectiveModule):
    """Base of objectives with a reference model. Subclasses say what they read of it in
    `reference_needs`.

    Args:
        network: Where the network comes from.
        reference: Where reference log-probabilities come from. ``adapter_off``: the policy's own
            network with its LoRA adapter switched off (no memory); ``frozen``: a copy of the
            network (one more set of weights); ``cached``: computed once for every row and kept on
            disk, keyed by model, rows and tokenizer, and used again by later runs (no memory, no
            passes; sums of log-probabilities only). ``auto``: ``adapter_off`` with a new LoRA
            adapter, ``frozen`` else.
        reference_cache: Folder of the disk cache.
        kwargs: See `ObjectiveModule`.

    Raises:
        TemperError: the source cannot serve this network or this loss; before anything is loaded.
    """

    def __init__(
        self,
        network: NetworkSpec,
        reference: Source = "auto",
        reference_cache: str = "runs/reference_cache",
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if reference == "adapter_off" and network.lora is None:
            raise TemperError(
                "model.init_args.reference=adapter_off: there is no new adapter to switch off"
                " (without one that is continued, the network is its base, not what training starts"
                " from); set network.lora, or reference=frozen"
            )
        if reference != "auto" and self.reference_needs() == "nothing":
            raise TemperError(
                f"model.init_args.reference={reference}: this loss has no reference model; set it"
                " to auto"
            )
        if reference == "cached" and self.reference_needs() == "everything":
            raise TemperError(
                "model.init_args.reference=cached: this loss reads logits or hidden states of the"
                " reference, and a cache keeps sums of log-probabilities; use reference=frozen, or"
                " adapter_off with LoRA"
            )
        self.reference_source = (
            ("adapter_off" if network.lora is not None else "frozen")
            if reference == "auto"
            else reference
        )
        self.reference_cache = Path(reference_cache)
        self._reference: Reference | None = None

    def reference_copies(self) -> int:
        """Copies of the network that the reference keeps in memory, for `cost`."""
        return int(self.reference_needs() != "nothing" and self.reference_source == "frozen")

    def reference_passes(self, *passes: Pass) -> tuple[Pass, ...]:
        """Forward passes of the reference model; none where it is cached, or not needed. For
        `cost`.
        """
        asked = self.reference_needs() != "nothing" and self.reference_source != "cached"
        return tuple(replace(each, gradient="none") for each in passes) if asked else ()

    def reference_needs(self) -> Literal["nothing", "sums", "everything"]:
        """What the loss reads of the reference model."""
        return "sums"

    def reference_streams(self) -> tuple[str, ...]:
        """The streams whose rows the reference scores."""
        return self.streams or ()

    def configure_model(self) -> None:
        """Build the network, and the reference from it while it is still what training starts from.

        Lightning restores checkpoints after this, so a resumed run has the same reference.
        """
        super().configure_model()
        if (
            self._reference is None
            and self.trainer.state.fn == "fit"
            and self.reference_needs() != "nothing"
        ):
            self._reference = self._build_reference()

    def _build_reference(self) -> Reference:
        assert self.network is not None
        if self.reference_source == "adapter_off":
            if not hasattr(self.network, "disable_adapter"):
                raise TemperError(
                    "model.init_args.reference=adapter_off: the network holds no adapter; use"
                    " reference=frozen"
                )
            return AdapterOff(self.network, self.fused_loss)
        if self.reference_source == "frozen":
            return FrozenCopy(self.network, self.fused_loss)
        # As training will have it: Lightning moves and converts the network later than this.
        self.network = self.trainer.precision_plugin.convert_module(
            self.network.to(self.trainer.strategy.root_device)
        )
        tables = {}
        for stream in (
            name for name in self.reference_streams() if name in self.trainer.datamodule.sources
        ):
            # One rank computes what is missing; the others find it on disk.
            for turn in (True, False):
                if self.trainer.is_global_zero is turn:
                    tables[stream] = self._table(stream)
                self.trainer.strategy.barrier("reference_cache")
        return CachedSums(tables)

    def _table(self, stream: str) -> Tensor:
        """Sums of a stream's rows, computed in the precision that training computes in."""
        assert self.network is not None
        data, plugin = self.trainer.datamodule, self.trainer.precision_plugin
        with plugin.forward_context():
            return reference_sums(
                self.network,
                data.sources[stream],
                data.tokenizer,
                self.reference_cache,
                stream,
                self.micro_batch_size,
                self.fused_loss,
                str(plugin.precision),
            )

    def networks(self) -> list[nn.Module]:
        """The policy, and a frozen copy of it where there is one."""
        return super().networks() + (
            [self._reference.network] if isinstance(self._reference, FrozenCopy) else []
        )

    def on_fit_start(self) -> None:
        """Put a frozen copy where the policy is, in the precision that the Trainer has given the
        policy.
        """
        if isinstance(self._reference, FrozenCopy):
            self.trainer.precision_plugin.convert_module(self._reference.network).to(self.device)

    def reference_scores(
        self, rows: Batch, stream: str, logits: bool = False, hidden: bool = False
    ) -> Scores | SequenceScores:
        """What the reference says about rows of a stream; no gradient."""
        assert self._reference is not None
        if not isinstance(self._reference, CachedSums):
            self.count(rows, backward=False)
        return self._reference.score(rows, stream, logits, hidden)


# MERGED from lightning_modules.reference: What preference objectives share: no dropout.


class PreferenceModule(ReferenceModule):
    """Base of objectives that compare log-probabilities of two models, or of two answers: dropout
    would be noise in it.

    Args:
        network: Where the network comes from.
        kwargs: See `ReferenceModule`.

    Raises:
        TemperError: a new adapter with dropout.
    """

    def __init__(self, network: NetworkSpec, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        check_no_lora_dropout(network)

    def configure_model(self) -> None:
        """As always, and without dropout."""
        super().configure_model()
        assert self.network is not None
        disable_dropout(self.network)
