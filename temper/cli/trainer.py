"""The Trainer, with the verbs that are Temper's own."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from temper.checkpoint_file import check_weights, load_checkpoint, load_file
from temper.errors import TemperError
from temper.models.export import Dtype
from temper.models.export_check import MAX_KL
from temper.models.folder import first_line
from temper.sharded_checkpoint import COMMON, ShardedCheckpoint, is_sharded

# Trainer settings of the verbs that compute nothing on a device, whatever the config says: they run
# on a login node too.
OFF_DEVICE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "logger": False,
    "callbacks": None,
}
# What `export` has written.
WRITTEN = {
    "whole": "the whole network",
    "merged": "the network with its adapter merged",
    "adapter": "the adapter, to be loaded on its base model",
}


class SafetyTrainer(L.Trainer):
    """The Trainer: how, where and how long.

    Lightning's, with `preview`, `export` and `plan`: verbs of the command line beside fit,
    validate, test and predict.
    """

    #: The config as it was given, before `OFF_DEVICE`; set by the command line.
    given: Any = None

    def preview(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        rows: int = 5,
        html: str | None = None,
        limit: int = 20_000,
    ) -> None:
        """Show the data as the model will see them, without loading weights.

        Rows as tokens with their masks, lengths, repeated rows, and overlap of training and
        evaluation data.

        Args:
            model: The objective; it says which streams are read.
            datamodule: The data.
            rows: Number of rows to show of each stream, and of evaluation prompts of each kind.
                Text is shown as it is, unsafe text included. 0 shows counts only.
            html: Also write the preview as an HTML page to this file.
            limit: Number of rows of each stream, from the first pass, over which lengths, repeats
                and overlaps are counted.

        Raises:
            TemperError: the objective reads a stream that these data do not have, or a number is
                out of range.
        """
        from rich.console import Console

        from temper.preview import build_preview, print_preview, render_page
        from temper.run_folder import write_text

        data = self._attach(model, datamodule)
        for flag, value, least in (("rows", rows, 0), ("limit", limit, 1)):
            if value < least:
                raise TemperError(f"--{flag}={value}: give a whole number >= {least}")
        if hasattr(data, "overlap"):
            data.overlap = "report"  # overlaps are shown here, not refused
        data.prepare_data()
        data.setup("fit")
        streams = getattr(model, "streams", None) or tuple(data.sources)[:1]
        for name in streams:
            if name not in data.sources:
                raise TemperError(
                    f"model={type(model).__name__} reads the stream {name!r}, and"
                    f" data={type(data).__name__} has {', '.join(map(repr, data.sources))}; choose"
                    " data that have it"
                )
        title = f"{type(data).__name__} for {type(model).__name__}"
        micro_batch_size = getattr(model, "micro_batch_size", None)
        width = _packed_width(model)
        shown = build_preview(data, streams, title, rows, limit, micro_batch_size, width)
        print_preview(shown, Console())
        if html is not None:
            write_text(Path(html), render_page(shown))
            print(f"written to {html}")

    def export(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        folder: str = "export",
        ckpt_path: str | None = None,
        merge: bool | None = None,
        dtype: Dtype | None = None,
        check: bool = True,
        max_kl: float = MAX_KL,
    ) -> None:
        """Write a model, or a checkpoint of it, as a Hugging Face folder.

        The written folder is loaded again, and its answers are compared with the model's.

        Args:
            model: The objective; its network is built.
            datamodule: The data; their tokenizer is saved with the network.
            folder: Folder to write, relative to the current one: new, or an earlier export.
            ckpt_path: Checkpoint whose weights are exported, a file or a sharded one (a folder);
                null: of a run, by its own config.yaml, its last checkpoint; otherwise the network
                as it is before training, for example to merge an adapter.
            merge: Merge adapters into the weights (true), or write the adapter alone (false); null
                merges where that keeps what was learned (see `HFExport`).
            dtype: Precision of the exported weights (an adapter that is not merged keeps its own);
                null: that of the network.
            check: Compare the answers.
            max_kl: Largest mean KL divergence, in nats per token of the model's answers, of an
                export that rounds weights.

        Raises:
            TemperError: the checkpoint does not belong to this model; the folder holds files that
                are of no earlier export; or what is written answers otherwise than the model.
        """
        from temper.models.export import WRITER
        from temper.models.run_export import ExportSettings, export_module
        from temper.output_folder import check_target

        check_target(Path(folder), "--folder", WRITER)
        data = self._attach(model, datamodule)
        model.configure_model()
        run = None
        step = 0
        if ckpt_path is not None:
            run = Path(self.default_root_dir)
            step = _load(model, ckpt_path)
        settings = ExportSettings(merge, dtype, check, max_kl)
        if check:
            _read_prompts(data)
        form = export_module(model, data, Path(folder), settings, run, step)
        print(f"written to {folder}: {WRITTEN[form]}")

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        device_gib: float = 80.0,
        tflops: float = 312.0,
        mfu: float = 0.4,
        sequence_length: int | None = None,
        devices_total: int | None = None,
        json: str | None = None,
    ) -> None:
        """Estimate memory and time of a run, without loading weights or data.

        Memory by kind (weights, gradients, optimizer state, activations), communication, floating
        point operations and time per step. No device is needed.

        Args:
            model: The objective.
            datamodule: The data; only their batch sizes and length limit are used, and no file is
                read.
            device_gib: Memory of a device, in GiB.
            tflops: Peak rate of a device, in 10^12 dense operations per second in the precision of
                the run (an A100 in bfloat16: 312).
            mfu: Model FLOPs utilization: the share of the peak rate that training reaches.
            sequence_length: Tokens in a row; null: the data's limit.
            devices_total: Number of devices; null: trainer.devices times trainer.num_nodes.
            json: Also write the plan, in more detail, to this file; sizes are in bytes.

        Raises:
            TemperError: a setting for which there is no estimate, or a number out of range.
        """
        from rich.console import Console

        from temper.cli.plan import plan_of
        from temper.plan.report import Device
        from temper.plan.terminal import print_plan
        from temper.run_folder import write_json

        numbers: dict[str, float | None] = {"device_gib": device_gib, "tflops": tflops, "mfu": mfu}
        numbers |= {"sequence_length": sequence_length, "devices_total": devices_total}
        for flag, value in numbers.items():
            if value is not None and not value > 0:
                raise TemperError(f"--{flag}={value}: give a number > 0")
        device = Device(device_gib, tflops, mfu)
        found = plan_of(model, datamodule, self.given, device, sequence_length, devices_total)
        print_plan(found, Console())
        if json is not None:
            write_json(Path(json), found.as_json())
            print(f"written to {json}")

    def _attach(self, model: L.LightningModule, datamodule: L.LightningDataModule | None) -> Any:
        """Attach module and data to the Trainer, as Lightning does before it runs a loop."""
        if datamodule is None:
            raise TemperError("--data: give the data; the tokenizer is theirs")
        self.strategy.connect(model)
        self._data_connector.attach_data(model, datamodule=datamodule)
        return datamodule


def _read_prompts(data: Any) -> None:
    """Read the evaluation prompts, on which an export is checked; a warning if they are gone."""
    if not hasattr(data, "setup_evaluation"):
        return  # data of another kind
    try:
        data.setup_evaluation()
    except (TemperError, OSError) as error:
        warnings.warn(
            f"export: no evaluation prompts ({first_line(error)}); it is checked on rows of"
            " arbitrary tokens",
            stacklevel=2,
        )


def _packed_width(model: L.LightningModule) -> int | None:
    """Hidden size of a network that packs rows; None if it does not pack, or is not available: a
    preview does not need it.
    """
    from temper.models.load import hidden_size

    spec: Any = getattr(model, "network_spec", None)
    packing: Any = getattr(model, "packing", None)
    if spec is None or packing is None or packing.choice is False:
        return None
    try:
        return hidden_size(spec)
    except TemperError:
        return None


def _load(model: L.LightningModule, ckpt_path: str) -> int:
    """Load the network's weights from a checkpoint, which may hold the trained ones only.

    Returns:
        The step of the checkpoint.

    Raises:
        TemperError: a trained weight is missing, or there are weights that the network does not
            have.
    """
    folder = Path(ckpt_path)
    if is_sharded(folder):
        checkpoint = load_file(folder / COMMON)
        saved = ShardedCheckpoint(folder).weights()
    else:
        checkpoint = load_checkpoint(folder)
        saved = checkpoint["state_dict"]
    network: Any = model.network
    weights = {
        name.removeprefix("network."): value
        for name, value in saved.items()
        if name.startswith("network.")
    }
    check_weights(ckpt_path, weights, network)
    network.load_state_dict(weights, strict=False)
    return int(checkpoint["global_step"])
