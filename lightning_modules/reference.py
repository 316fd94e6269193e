"""Objectives that compare the policy with a reference model: the policy before training."""

from collections.abc import Sequence
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
#: Outputs of the reference that a loss reads: none, sums of log-probabilities, or also logits and
#: hidden states.
Needs = Literal["nothing", "sums", "everything"]


class ReferenceModule(ObjectiveModule):
    """Base of objectives with a reference model. Their constructors call `read_reference`.

    Args:
        network: Where the network comes from.
        reference: Where reference log-probabilities come from. ``adapter_off``: the policy's own
            network with its LoRA adapter switched off (no memory); ``frozen``: a copy of the
            network (one more set of weights); ``cached``: computed once for every row and kept on
            disk, keyed by model, rows and tokenizer, and used again by later runs (no memory, no
            passes; sums of log-probabilities only). ``auto``: ``adapter_off`` with a new LoRA
            adapter, else ``frozen``.
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
                " (without a continued adapter, the network is its base, not the policy before"
                " training); set network.lora, or reference=frozen"
            )
        self.chosen_reference = reference
        self.reference_source = reference
        if reference == "auto":
            self.reference_source = "frozen" if network.lora is None else "adapter_off"
        self.reference_cache = Path(reference_cache)
        self.reference_needs: Needs = "nothing"
        self.reference_streams: tuple[str, ...] = ()
        self._reference: Reference | None = None

    def read_reference(self, needs: Needs, streams: Sequence[str]) -> None:
        """State what the loss reads of the reference model; for constructors of objectives.

        Args:
            needs: Outputs that it reads.
            streams: Streams whose rows the reference scores.

        Raises:
            TemperError: the chosen source cannot give these outputs.
        """
        self.reference_needs = needs
        self.reference_streams = tuple(streams)
        if self.chosen_reference != "auto" and needs == "nothing":
            raise TemperError(
                f"model.init_args.reference={self.chosen_reference}: this loss has no reference"
                " model; set it to auto"
            )
        if self.chosen_reference == "cached" and needs == "everything":
            raise TemperError(
                "model.init_args.reference=cached: this loss reads logits or hidden states of the"
                " reference, and a cache keeps sums of log-probabilities; use reference=frozen, or"
                " adapter_off with LoRA"
            )

    # -- for `cost`

    def reference_copies(self) -> int:
        """Copies of the network that the reference keeps in memory."""
        return int(self.reference_needs != "nothing" and self.reference_source == "frozen")

    def reference_passes(self, *passes: Pass) -> tuple[Pass, ...]:
        """These passes as forward passes of the reference model; none where it is cached or not
        read.
        """
        if self.reference_needs == "nothing" or self.reference_source == "cached":
            return ()
        return tuple(replace(each, gradient="none") for each in passes)

    # -- construction

    def configure_model(self) -> None:
        """Build the network, and the reference from it while it is still as before training.

        Lightning restores checkpoints after this, so a resumed run has the same reference.
        """
        super().configure_model()
        is_fit = self.trainer.state.fn == "fit"
        if self._reference is None and is_fit and self.reference_needs != "nothing":
            self._reference = self._build_reference()

    def _build_reference(self) -> Reference:
        if self.reference_source == "adapter_off":
            if not hasattr(self.policy, "disable_adapter"):
                raise TemperError(
                    "model.init_args.reference=adapter_off: the network holds no adapter; use"
                    " reference=frozen"
                )
            return AdapterOff(self.policy, self.fused_loss)
        if self.reference_source == "frozen":
            return FrozenCopy(self.policy, self.fused_loss)
        # As training will have it: Lightning moves and converts the network later than this.
        on_device = self.policy.to(self.trainer.strategy.root_device)
        self.network = self.trainer.precision_plugin.convert_module(on_device)
        tables = {}
        for stream in self.reference_streams:
            if stream not in self.datamodule.sources:
                continue
            # One rank computes missing sums; the others find them on disk.
            for turn in (True, False):
                if self.trainer.is_global_zero is turn:
                    tables[stream] = self._sums(stream)
                self.trainer.strategy.barrier("reference_cache")
        return CachedSums(tables)

    def _sums(self, stream: str) -> Tensor:
        """Sums of a stream's rows, computed in the precision of training, or read from disk."""
        data = self.datamodule
        plugin = self.trainer.precision_plugin
        with plugin.forward_context():
            return reference_sums(
                self.policy,
                data.sources[stream],
                data.tokenizer,
                self.reference_cache,
                stream,
                self.micro_batch_size,
                self.fused_loss,
                str(plugin.precision),
            )

    def networks(self) -> list[nn.Module]:
        """The policy, and the frozen copy of it if there is one."""
        copies = [self._reference.network] if isinstance(self._reference, FrozenCopy) else []
        return super().networks() + copies

    def on_fit_start(self) -> None:
        """Move a frozen copy to the policy's device, in the precision of the Trainer."""
        if isinstance(self._reference, FrozenCopy):
            plugin = self.trainer.precision_plugin
            plugin.convert_module(self._reference.network).to(self.device)

    # -- training

    def reference_scores(
        self, rows: Batch, stream: str, logits: bool = False, hidden: bool = False
    ) -> Scores | SequenceScores:
        """The reference's scores of rows of a stream, without gradient."""
        assert self._reference is not None, "configure_model builds it for a fit"
        if not isinstance(self._reference, CachedSums):
            self.work.count_forward(rows)
        return self._reference.score(rows, stream, logits, hidden)


class PreferenceModule(ReferenceModule):
    """Base of objectives that compare log-probabilities of two models or two answers: without
    dropout, which would be noise in the comparison.

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
        """Build network and reference; switch dropout off."""
        super().configure_model()
        disable_dropout(self.policy)
