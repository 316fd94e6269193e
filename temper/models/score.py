"""The forward pass behind every objective: from a network and rows to `Scores`.

It changes the inputs of the output layer, so the helpers for that come first.

Shapes: `B` rows, `T` time, `D` width, `V` vocabulary, `N` chosen positions; `R` sequences, packed
into `P` rows of `C` tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from temper.data.packing import Packing, plan_packing
from temper.data.rows import LENGTHS
from temper.errors import TemperError
from temper.losses import (
    IGNORE_INDEX,
    Scores,
    hidden_logps,
    labelled_logps,
    labelled_positions,
    token_logps,
)
from temper.models.tries import changed_logits

# -- the output layer

TRIED = "_temper_changed_logits"  # attribute of a causal LM: what `changed_logits` found


def output_layer(network: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the decoder and the output layer of a causal LM.

    The first call for a network tries it (`changed_logits`): all ranks must take part.

    Raises:
        TemperError: the logits are not simply ``hidden @ weight.T + bias``: an adapter on the
            output layer, or logits that are capped or scaled (Gemma 2, Cohere, Granite, ...).
    """
    lm: Any = network
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TemperError(
            f"model.init_args.fused_loss=true: the output layer is a {type(head).__name__}, not a"
            " plain Linear; set it to false"
        )
    decoder = getattr(lm, lm.base_model_prefix)
    if not hasattr(lm, TRIED):
        setattr(lm, TRIED, changed_logits(lm, decoder, head) or "")
    if changes := getattr(lm, TRIED):
        raise TemperError(
            f"model.init_args.fused_loss=true: {type(lm).__name__} {changes}; set it to false"
        )
    return decoder, head


def contiguous_head_inputs(network: nn.Module) -> Any:
    """Make the inputs of the output layer contiguous inside a ``with`` block.

    `generate` gives the output layer the last position of every row, a strided view. ``matmul``
    does not fold that into one product: it reads the output weights once per row of the batch, and
    in bfloat16 on CPUs copies them each time (`benchmarks/generation.md`).
    """
    return _transform_head_inputs(network, Tensor.contiguous)


def select_head_inputs(network: nn.Module, index_N: Tensor) -> Any:
    """Compute logits only at chosen positions inside a ``with`` block.

    The logits are ``1 x N x V`` instead of ``B x T x V``.

    Args:
        network: A transformers causal LM, or PEFT's wrapper around one.
        index_N: Positions in the flattened batch of ``B * T`` tokens.
    """
    return _transform_head_inputs(
        network, lambda hidden_BTD: hidden_BTD.flatten(0, 1).index_select(0, index_N)[None]
    )


@contextmanager
def _transform_head_inputs(
    network: nn.Module, function: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Apply a function to the hidden states that the output layer gets.

    The forward pass is still the network's own, so caps and scales of its logits apply.
    """
    head: nn.Module = network.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


# -- scoring

Rows = dict[str, Any]


def score(
    network: nn.Module, rows: Rows, logits: bool = False, hidden: bool = False, fused: bool = False
) -> Scores:
    """Compute log-probabilities of the labels of rows, and logits or hidden states if requested.

    Rows of two sequences (``B x 2 x T``: chosen and rejected, original and substitute, ...) go
    through the network as one batch of ``2 B``. Rows with ``lengths`` (numpy, ``B`` or ``B x 2``)
    are packed for the forward pass where that saves tokens; the scores are unpacked. Unless all
    logits are requested, they are computed only where they predict a label.

    Args:
        network: A transformers causal LM, or PEFT's wrapper around one.
        rows: ``input_ids``, ``attention_mask`` and ``labels``, all ``... x T``, padded on the
            right. Padding on the left gives the same scores with rotary and ALiBi positions, but
            not with GPT-2's absolute positions, and is not allowed together with ``lengths``.
        logits: Return the logits too.
        hidden: Return all hidden states too; they are undefined at padding.
        fused: Compute log-probabilities in chunks, without all logits at once (`hidden_logps`).

    Raises:
        TemperError: ``fused`` for a network whose logits are not one matrix product, or together
            with ``logits``.
    """
    if fused and logits:
        raise TemperError(
            "model.init_args.fused_loss=true: this loss needs the logits themselves; set it to"
            " false"
        )
    leading = rows["input_ids"].shape[:-1]
    labels = rows["labels"].flatten(0, -2)
    plan = _plan_packing(network, rows)
    inputs, targets = _model_inputs(rows, plan)
    out, logps, mask = _forward(network, inputs, targets, logits, hidden, fused)
    if plan is not None:
        mask = labels[:, 1:] != IGNORE_INDEX
        logps = _unpack(nn.functional.pad(logps, (0, 1)), plan)[:, :-1].where(mask, 0.0)

    def unflatten(tensor: Tensor) -> Tensor:
        return tensor.view(leading + tensor.shape[1:])

    def restore(tensor: Tensor) -> Tensor:
        return unflatten(tensor if plan is None else _unpack(tensor, plan))

    return Scores(
        logps=unflatten(logps),
        mask=unflatten(mask),
        logits=restore(out.logits)[..., :-1, :] if logits else None,
        hidden=tuple(map(restore, out.hidden_states)) if hidden else None,
        attended=rows["attention_mask"].bool() if hidden or logits else None,
        labels=rows["labels"][..., 1:] if logits else None,
    )


def _model_inputs(rows: Rows, plan: Packing | None) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the forward pass, and the labels of its tokens; packed if there is a plan."""
    ids = rows["input_ids"].flatten(0, -2)
    labels = rows["labels"].flatten(0, -2)
    if plan is None:
        attention = rows["attention_mask"].flatten(0, -2)
        return {"input_ids": ids, "attention_mask": attention}, labels
    inputs = {"input_ids": ids.flatten()[plan.source_PC], "position_ids": plan.positions_PC}
    # The first token of a sequence is not predicted by the last one of the sequence before it.
    targets = labels.flatten()[plan.source_PC].masked_fill(plan.begins_PC, IGNORE_INDEX)
    return inputs, targets


def _forward(
    network: nn.Module,
    inputs: dict[str, Tensor],
    targets: Tensor,
    logits: bool,
    hidden: bool,
    fused: bool,
) -> tuple[Any, Tensor, Tensor]:
    """Run the network; return its output, log-probabilities of the targets, and their mask."""
    if fused:
        decoder, head = output_layer(network)
        out = decoder(**inputs, output_hidden_states=hidden, use_cache=False)
        logps, mask = hidden_logps(out.last_hidden_state, head.weight, targets, head.bias)
    elif logits:
        out = network(**inputs, output_hidden_states=hidden, use_cache=False)
        logps, mask = token_logps(out.logits, targets)
    else:
        index = labelled_positions(targets)
        with select_head_inputs(network, index):
            out = network(**inputs, output_hidden_states=hidden, use_cache=False)
        logps, mask = labelled_logps(out.logits[0], targets, index)
    return out, logps, mask


def _plan_packing(network: nn.Module, rows: Rows) -> Packing | None:
    """The plan to pack rows; None if they have no lengths or packing would not save enough."""
    lengths = rows.get(LENGTHS)
    if lengths is None or lengths.min() < 1:
        return None
    # Attention kernels for unequal lengths find the sequence boundaries only in a single row.
    in_one_row = "flash" in str(getattr(network.config, "_attn_implementation", ""))
    hidden_size = network.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    width = rows["input_ids"].shape[-1]
    plan = plan_packing(lengths.reshape(-1), width, hidden_size, in_one_row)
    return None if plan is None else plan.to(rows["input_ids"].device)


def _unpack(packed: Tensor, plan: Packing) -> Tensor:
    """``P x C x ...`` back to ``R x T x ...``."""
    return packed.flatten(0, 1)[plan.slots_RT]
