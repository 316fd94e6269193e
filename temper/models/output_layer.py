"""A causal LM's output layer: what it is made of, and which rows it is given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from temper.errors import TemperError


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


def dense_last_positions(network: nn.Module) -> Any:
    """Give the output layer dense rows meanwhile, as a context manager.

    The last position of every prompt is a strided view of all positions, which ``matmul`` does not fold into one product: it takes the
    output weights once per row of the batch, and in bfloat16 on CPUs copies them for it (`benchmarks/generation.md`).
    """
    return _given(network, Tensor.contiguous)


def only_positions(network: nn.Module, index_N: Tensor) -> Any:
    """Compute the logits of ``N`` chosen positions meanwhile, as a context manager: ``1 x N x V`` in place of ``B x T x V``.

    Args:
        network: A causal LM of transformers, or PEFT's wrapper around one.
        index_N: Places in the flattened batch, ``B * T`` of them.
    """
    return _given(network, lambda hidden_BTD: hidden_BTD.flatten(0, 1).index_select(0, index_N)[None])


@contextmanager
def _given(network: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what the output layer is given; what the network does to logits afterwards (caps, scales) stays."""
    head: nn.Module = network.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
