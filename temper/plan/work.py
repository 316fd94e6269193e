"""Tokens, floating-point operations and time of an optimizer step."""

from dataclasses import dataclass

from temper.plan.cost import Pass
from temper.plan.memory import Memory
from temper.plan.shapes import adapted


@dataclass(frozen=True)
class Work:
    """Of one optimizer step, over all devices; every token of a row is counted, padding too.

    Attributes:
        passes: Forward and backward passes over a batch, and forward passes alone.
        tokens: Tokens of all passes.
        flops: Floating-point operations: 2 per weight and token in a product, forward; the same for gradients of inputs, and of
            weights that learn; one forward pass more with activation checkpointing; causal attention ``2 T`` per channel.
    """

    passes: float
    tokens: float
    flops: float

    def seconds(self, devices: int, tflops: float, mfu: float) -> float:
        """Time at a rate: ``tflops`` per device, of which the share ``mfu`` is reached. Communication is taken to be hidden."""
        return self.flops / (devices * tflops * 1e12 * mfu)


def work(memory: Memory) -> Work:
    """Work of a step."""
    cost = memory.cost
    tokens = [each.times * memory.rows(each)[0] * each.sequences * memory.setup.sequence_length for each in cost.passes]
    everywhere = [n * memory.setup.devices for n in tokens]
    flops = sum(n * flops_per_token(memory, each) for n, each in zip(everywhere, cost.passes, strict=True))
    return Work(sum(each.times for each in cost.passes), sum(everywhere), flops)


def flops_per_token(memory: Memory, each: Pass) -> float:
    """Operations of a pass per token."""
    shape, setup = memory.shape, memory.setup
    layers = 2.0 * sum(x.inputs * x.outputs for x in shape.linears if x.place != "head")
    attention = 2.0 * setup.sequence_length * sum(x.inputs for x in shape.linears if x.place == "attention_out")
    head = 2.0 * sum(x.inputs * x.outputs for x in shape.linears if x.place == "head") * (shape.layers + 1 if each.lens else 1)
    # A and B are two more products, of inputs x rank and rank x outputs.
    adapters = 2.0 * sum(setup.lora.rank * (x.inputs + x.outputs) for x in adapted(shape, setup.lora)) if setup.lora else 0.0
    forward = layers + attention + head + adapters
    if each.gradient == "none":
        return forward
    backward = layers + 2 * attention + head + adapters
    if each.gradient == "weights":
        trained = {weight.name for weight in memory.trained}
        backward += adapters + sum(2.0 * x.inputs * x.outputs for x in shape.linears if f"{x.name}.weight" in trained)
    again = layers + attention + adapters if setup.activation_checkpointing else 0.0
    return forward + backward + again + (head if setup.fused_loss else 0.0)
