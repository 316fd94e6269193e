"""From a network and rows to `Scores`: the one forward pass behind every objective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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

# MERGED from temper.models.score: A causal LM's output layer: what it is made of, and which rows it
# is given.


def output_layer(network: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The decoder below the output layer, and the output layer, of a causal LM.

    Raises:
        TemperError: the logits are not simply ``hidden @ weight.T + bias``: an adapter on the
            output layer, or logits that are capped or scaled (Gemma 2, Cohere, Granite, ...).
    """
    lm: Any = network
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    config, head = lm.config, lm.get_output_embeddings()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise TemperError(
                f"model.init_args.fused_loss=true: {type(lm).__name__} changes its logits"
                f" ({name}={getattr(config, name)}); set it to false"
            )
    if type(head) is not nn.Linear:
        raise TemperError(
            f"model.init_args.fused_loss=true: the output layer is a {type(head).__name__}, not a"
            " plain Linear; set it to false"
        )
    return getattr(lm, lm.base_model_prefix), head


def contiguous_head_inputs(network: nn.Module) -> Any:
    """Give the output layer dense rows meanwhile, as a context manager.

    The last position of every prompt is a strided view of all positions, which ``matmul`` does not
    fold into one product: it takes the output weights once per row of the batch, and in bfloat16 on
    CPUs copies them for it (`benchmarks/generation.md`).
    """
    return _given(network, Tensor.contiguous)


def select_head_inputs(network: nn.Module, index_N: Tensor) -> Any:
    """Compute the logits of ``N`` chosen positions meanwhile, as a context manager: ``1 x N x V``
    in place of ``B x T x V``.

    Args:
        network: A causal LM of transformers, or PEFT's wrapper around one.
        index_N: Places in the flattened batch, ``B * T`` of them.
    """
    return _given(
        network, lambda hidden_BTD: hidden_BTD.flatten(0, 1).index_select(0, index_N)[None]
    )


@contextmanager
def _given(network: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what the output layer is given; what the network does to logits afterwards (caps,
    scales) stays.
    """
    head: nn.Module = network.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


Rows = dict[str, Any]


def score(
    network: nn.Module, rows: Rows, logits: bool = False, hidden: bool = False, fused: bool = False
) -> Scores:
    """Log-probabilities of the labels of rows, and what else is asked for.

    Rows of two sequences (``B x 2 x T``: chosen and rejected, original and substitute, ...) go
    through the network as one batch of ``2 B``. Rows that carry ``lengths`` (numpy, ``B`` or
    ``B x 2``) are packed for the forward pass where that saves tokens: the scores are those of the
    rows as they came. Unless they are asked for, logits are computed only where they predict a
    label.

    Args:
        network: A causal LM of transformers, or PEFT's wrapper around one.
        rows: ``input_ids``, ``attention_mask`` and ``labels``, all ``... x T``, padded on the
            right. (On the left is the same for rotary and ALiBi positions, not for GPT-2's absolute
            ones; never with ``lengths``.)
        logits: Give the logits too.
        hidden: Give all hidden states too; where a row is padding they are anything.
        fused: Compute log-probabilities without ever holding the logits (`hidden_logps`).

    Raises:
        TemperError: ``fused`` for a network whose logits are more than one product, or together
            with logits.
    """
    leading = rows["input_ids"].shape[:-1]
    ids, attention = rows["input_ids"].flatten(0, -2), rows["attention_mask"].flatten(0, -2)
    labels = rows["labels"].flatten(0, -2)
    if fused and logits:
        raise TemperError(
            "model.init_args.fused_loss=true: this loss needs the logits themselves; set it to"
            " false"
        )
    plan = _plan(network, rows, ids.shape[1])
    if plan is None:
        inputs, targets = {"input_ids": ids, "attention_mask": attention}, labels
    else:
        inputs = {"input_ids": ids.flatten()[plan.source_PC], "position_ids": plan.positions_PC}
        targets = labels.flatten()[plan.source_PC].masked_fill(plan.begins_PC, IGNORE_INDEX)
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
    if plan is not None:
        mask = labels[:, 1:] != IGNORE_INDEX
        logps = _unpack(nn.functional.pad(logps, (0, 1)), plan)[:, :-1].where(mask, 0.0)
    unflatten: Any = lambda tensor: tensor.unflatten(0, leading)  # noqa: E731
    back: Any = lambda tensor: unflatten(tensor if plan is None else _unpack(tensor, plan))  # noqa: E731
    return Scores(
        logps=unflatten(logps),
        mask=unflatten(mask),
        logits=back(out.logits)[..., :-1, :] if logits else None,
        hidden=tuple(map(back, out.hidden_states)) if hidden else None,
        attended=rows["attention_mask"].bool() if hidden else None,
        labels=rows["labels"][..., 1:] if logits else None,
    )


def isolates_packed_sequences(network: nn.Module) -> bool:
    """Whether packed sequences do not see each other in this network, by trying: two short ones,
    alone and packed.

    Two full attention masks would let the second sequence read the first; the packed result has to
    be far nearer to the separate one than to that, in whatever precision the network computes.
    """
    device = next(network.parameters()).device
    size = min(int(getattr(network.config, "vocab_size", 64)), 64)
    first, second = (
        torch.arange(start, start + 6, device=device).remainder(size)[None] for start in (1, 9)
    )
    positions = torch.arange(6, device=device)[None]
    both, together = torch.cat([first, second], dim=1), torch.cat([positions, positions], dim=1)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            alone = network(input_ids=second, use_cache=False).logits[0].float()
            packed = (
                network(input_ids=both, position_ids=together, use_cache=False)
                .logits[0, 6:]
                .float()
            )
            seen = network(input_ids=both, use_cache=False).logits[0, 6:].float()
    except TypeError:  # it takes no positions
        return False
    finally:
        network.train(was_training)
    return bool((packed - alone).norm() < 0.1 * (seen - alone).norm())


def _plan(network: nn.Module, rows: Rows, width: int) -> Packing | None:
    lengths = rows.get(LENGTHS)
    if lengths is None or lengths.min() < 1:
        return None
    # Kernels for unequal lengths find the boundaries in a single row only.
    in_one_row = "flash" in str(getattr(network.config, "_attn_implementation", ""))
    hidden_size = network.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    plan = plan_packing(lengths.reshape(-1), width, hidden_size, in_one_row)
    return None if plan is None else plan.to(rows["input_ids"].device)


def _unpack(packed: Tensor, plan: Packing) -> Tensor:
    """``P x C x ...`` back to ``R x T x ...``."""
    return packed.flatten(0, 1)[plan.slots_RT]
