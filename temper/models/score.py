"""From a network and rows to `Scores`: the one forward pass behind every objective."""

from typing import Any

import torch
from torch import nn

from temper.errors import TemperError
from temper.losses import Scores, hidden_logps, token_logps

Rows = dict[str, torch.Tensor]


def score(network: nn.Module, rows: Rows, logits: bool = False, hidden: bool = False, fused: bool = False) -> Scores:
    """Log-probabilities of the labels of rows, and what else is asked for.

    Rows of two sequences (``B x 2 x T``: chosen and rejected, original and substitute, ...) go through
    the network as one batch of ``2 B``.

    Args:
        network: A causal LM of transformers, or PEFT's wrapper around one.
        rows: ``input_ids``, ``attention_mask`` and ``labels``, all ``... x T``, padded on the right. (On the left is
            the same for rotary and ALiBi positions, not for GPT-2's absolute ones.)
        logits: Give the logits too.
        hidden: Give all hidden states too.
        fused: Compute log-probabilities without ever holding the logits (`hidden_logps`).

    Raises:
        TemperError: ``fused`` for a network whose logits are more than one product, or together with logits.
    """
    leading = rows["input_ids"].shape[:-1]
    ids, attention = rows["input_ids"].flatten(0, -2), rows["attention_mask"].flatten(0, -2)
    labels = rows["labels"].flatten(0, -2)
    if fused and logits:
        raise TemperError("model.init_args.fused_loss=true: this loss needs the logits themselves; set it to false")
    if fused:
        decoder, head = output_layer(network)
        out = decoder(input_ids=ids, attention_mask=attention, output_hidden_states=hidden, use_cache=False)
        logps, mask = hidden_logps(out.last_hidden_state, head.weight, labels, head.bias)
    else:
        out = network(input_ids=ids, attention_mask=attention, output_hidden_states=hidden, use_cache=False)
        logps, mask = token_logps(out.logits, labels)
    unflatten: Any = lambda tensor: tensor.unflatten(0, leading)  # noqa: E731
    return Scores(
        logps=unflatten(logps),
        mask=unflatten(mask),
        logits=unflatten(out.logits[:, :-1]) if logits else None,
        hidden=tuple(map(unflatten, out.hidden_states)) if hidden else None,
        attended=unflatten(attention.bool()) if hidden else None,
        labels=rows["labels"][..., 1:] if logits else None,
    )


def output_layer(network: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The decoder below the output layer, and the output layer, of a causal LM.

    Raises:
        TemperError: the logits are not simply ``hidden @ weight.T + bias``: an adapter on the output
            layer, or logits that are capped or scaled (Gemma 2, Cohere, Granite, ...).
    """
    lm: Any = network
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    config, head = lm.config, lm.get_output_embeddings()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise TemperError(
                f"model.init_args.fused_loss=true: {type(lm).__name__} changes its logits ({name}={getattr(config, name)}); set it to false"
            )
    if type(head) is not nn.Linear:
        raise TemperError(
            f"model.init_args.fused_loss=true: the output layer is a {type(head).__name__}, not a plain Linear; set it to false"
        )
    return getattr(lm, lm.base_model_prefix), head
