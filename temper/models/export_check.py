"""Does a written export answer as the network of the run did?

Greedy answers of both in float32 are compared token for token, and their next-token distributions
along the run's answers by the mean KL divergence per token.

Shapes: `B` prompts, `P` prompt tokens, `R` answer tokens, `V` vocabulary.
"""

import copy
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from temper.data.rows import pad_left, sequence
from temper.models.end_tokens import cut_at_end
from temper.models.folder import NetworkSpec, base_folder, is_adapter
from temper.models.generate import generate_greedy
from temper.models.lora import disable_trained_adapter, is_adapted
from temper.models.quantize import is_quantized, prepare_quantized, quantization_settings

N_PROMPTS = 16
N_TOKENS = 64
MAX_KL = 0.02  # nats per token
# Two networks that differ in the order of float32 sums alone stay far below; their answers may
# still part where two tokens are equally likely up to rounding.
ROUNDING_KL = 1e-4
ROOM = 1.25  # memory of a copy with its activations, over that of its weights

# -- prompts


@dataclass(frozen=True)
class Prompts:
    """Prompts that both networks answer.

    Args:
        ids: Token ids of every prompt.
        source: What they are, in words.
        max_new_tokens: Longest answer.
    """

    ids: list[list[int]]
    source: str
    max_new_tokens: int

    def padded(self, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, padded on the left: ``B x P`` each."""
        width = max(map(len, self.ids))
        ids_BP = torch.tensor([[*row, *[-1] * (width - len(row))] for row in self.ids])
        rows = pad_left(ids_BP, ids_BP != -1, pad_id)
        return rows["input_ids"].to(device), rows["attention_mask"].to(device)

    def fitted(self, config: Any) -> "Prompts":
        """Prompts and answers within the positions of a network."""
        text_config = config.get_text_config()
        places = getattr(text_config, "max_position_embeddings", None) or 10**9
        new = max(1, min(self.max_new_tokens, places // 2))
        return replace(self, ids=[row[-(places - new) :] for row in self.ids], max_new_tokens=new)


def prompts_of(data: Any) -> Prompts:
    """Prompts for a check: evaluation prompts of every kind, else the beginnings of training rows,
    else tokens in the order of the vocabulary.

    Args:
        data: A datamodule; what it has been set up for is used.
    """
    longest = min(N_TOKENS, getattr(data, "max_new_tokens", N_TOKENS))
    evaluated = getattr(data, "eval_rows", None)
    if evaluated and len(evaluated["input_ids"]):
        n = len(evaluated["input_ids"])
        chosen = sorted({i * n // N_PROMPTS for i in range(N_PROMPTS)})
        rows = zip(evaluated["input_ids"][chosen], evaluated["attention_mask"][chosen], strict=True)
        ids = [row[present.bool()].tolist() for row, present in rows]
        return Prompts(ids, "evaluation prompts", longest)
    if sources := getattr(data, "sources", None):
        ids = _beginnings(next(iter(sources.values())))
        return Prompts(ids, "beginnings of training rows", longest)
    n = len(data.tokenizer)
    ids = [[(8 * i + j) % n for j in range(8)] for i in range(N_PROMPTS)]
    return Prompts(ids, "rows of arbitrary tokens", longest)


def _beginnings(source: Any) -> list[list[int]]:
    """Prompts of the first training rows: what comes before the first trained token."""
    ids: list[list[int]] = []
    for number in range(min(N_PROMPTS, source.batches_per_pass)):
        batch = source.batch(number)
        if batch["input_ids"].dim() == 3:  # of several sequences
            batch = sequence(batch, 0)
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            trained = next((n for n, label in enumerate(labels) if label != -100), 1)
            ids.append(row[: max(1, trained)])
        if len(ids) >= N_PROMPTS:
            break
    return ids[:N_PROMPTS]


# -- comparing


@dataclass(frozen=True)
class Agreement:
    """How a written export compares with the network of the run.

    Args:
        n: Number of answers.
        same: Number of answers that are the same, token for token.
        kl: Mean KL divergence of the export's next tokens from the run's, in nats per token of the
            run's answers.
        trained_kl: The same of the network before training (the trained adapter switched off);
            None where that network is not at hand.
        source: What the prompts are.
        max_new_tokens: Longest answer.
    """

    n: int
    same: int
    kl: float
    trained_kl: float | None
    source: str
    max_new_tokens: int

    @property
    def is_exact(self) -> bool:
        """Whether the answers are the same, ties that rounding breaks aside."""
        return self.same == self.n or self.kl <= ROUNDING_KL

    @property
    def lost(self) -> float | None:
        """Share of what was learned that the export lacks, about; None where that is not known.

        A small divergence grows with the square of a change, so it is the root of the export's over
        that of the network before training. (Merged into bfloat16, 5 steps of DPO lost 51 % of
        their margins, and 20 steps 27 %; this gives 46 % and 23 %.)
        """
        return (self.kl / self.trained_kl) ** 0.5 if self.trained_kl else None

    def describe(self) -> str:
        """A sentence for the model card."""
        of = f"greedy answers to {self.n} {self.source}, of at most {self.max_new_tokens} tokens"
        kl = f"mean KL divergence {self.kl:.2g} nats per token of the trained network's answers"
        if self.trained_kl is not None:
            kl += f" ({self.trained_kl:.2g} between the networks before and after training)"
        if self.same == self.n:
            found = "all are the same, token for token"
        else:
            found = f"{self.same} of {self.n} are the same, token for token"
        return f"Checked by {of}, of this folder and of the trained network: {found}; {kl}."


@dataclass(frozen=True)
class Answers:
    """What the network of a run answered.

    Args:
        prompts: The prompts.
        ends: Tokens that end an answer.
        ids: Token ids of every answer, with its end token.
        logps: Log-probabilities of every next token along it, ``R x V`` on the host.
        trained_kl: See `Agreement`.
    """

    prompts: Prompts
    ends: list[int]
    ids: list[list[int]]
    logps: list[Tensor]
    trained_kl: float | None


class NotChecked(Exception):  # noqa: N818 - an outcome, and no error
    """Why an export cannot be checked, in words."""


@torch.no_grad()
def answer(
    network: Any, spec: NetworkSpec, prompts: Prompts, ends: list[int], device: torch.device
) -> Answers:
    """Answers of the network of a run, in float32 (a quantized one in the precision of its own).

    The network does not change.

    Args:
        network: The network.
        spec: Settings that it was loaded with.
        prompts: The prompts; they are cut to the positions of the network.
        ends: Tokens that end an answer.
        device: Where to compute.

    Raises:
        NotChecked: the device has no memory for a copy.
    """
    _check_memory(network, device)
    with torch.random.fork_rng(devices=[]):
        run = _in_float32(network, spec, device)
        was_training = run.training
        run.eval()
        try:
            prompts = prompts.fitted(run.config)
            ids = _greedy(run, prompts, ends)
            logps = _logps(run, prompts, ids)
            before = None
            if is_adapted(run):
                with disable_trained_adapter(run):
                    before = _mean_kl(logps, _logps(run, prompts, ids))
        finally:
            run.train(was_training)
    return Answers(prompts, ends, ids, logps, before)


@torch.no_grad()
def compare(answers: Answers, folder: Path, spec: NetworkSpec, device: torch.device) -> Agreement:
    """Load a written folder in float32 and compare its answers with those of the run.

    An adapter is loaded on the base model that its config names, quantized as in the run.
    """
    prompts = answers.prompts
    with torch.random.fork_rng(devices=[]):
        loaded = _load(folder, spec).to(device).eval()
        ids = _greedy(loaded, prompts, answers.ends)
        kl = _mean_kl(answers.logps, _logps(loaded, prompts, answers.ids))
    same = sum(a == b for a, b in zip(ids, answers.ids, strict=True))
    n = len(prompts.ids)
    return Agreement(n, same, kl, answers.trained_kl, prompts.source, prompts.max_new_tokens)


def _greedy(network: Any, prompts: Prompts, ends: list[int]) -> list[list[int]]:
    """Greedy answers with their end tokens, without padding."""
    pad_id = network.generation_config.pad_token_id or 0
    ids_BP, mask_BP = prompts.padded(pad_id, network.device)
    found = generate_greedy(network, ids_BP, mask_BP, prompts.max_new_tokens, ends)
    return [row[: len(cut_at_end(row, ends)) + 1] for row in found.tolist()]


def _logps(network: Any, prompts: Prompts, answers: list[list[int]]) -> list[Tensor]:
    """Log-probabilities along answers, a row at a time: ``R x V`` each, on the host."""
    found = []
    kept = "logits_to_keep" in inspect.signature(_plain(network).forward).parameters
    for prompt, answer_ids in zip(prompts.ids, answers, strict=True):
        ids_1T = torch.tensor([[*prompt, *answer_ids[:-1]]], device=network.device)
        arguments = {"logits_to_keep": len(answer_ids)} if kept else {}
        logits = network(input_ids=ids_1T, use_cache=False, **arguments).logits[0]
        found.append(logits[-len(answer_ids) :].float().log_softmax(-1).cpu())
    return found


def _mean_kl(logps: list[Tensor], others: list[Tensor]) -> float:
    """Mean over tokens of the KL divergence of other next tokens from the first, in nats."""
    total = 0.0
    for logps_RV, other_RV in zip(logps, others, strict=True):
        ours = logps_RV.double()
        total += float((ours.exp() * (ours - other_RV.double())).sum())
    return max(total, 0.0) / sum(map(len, logps))


# -- both networks in float32


def _plain(network: Any) -> Any:
    return network.get_base_model() if is_adapted(network) else network


def _in_float32(network: Any, spec: NetworkSpec, device: torch.device) -> Any:
    """The network itself if it is in float32 on the device, else a copy that is."""
    quantized = is_quantized(network)
    attention = _attention(spec)
    there = all(
        tensor.device == device and (quantized or tensor.dtype == torch.float32)
        for tensor in network.parameters()
        if tensor.is_floating_point() or quantized
    )
    if there and attention == spec.attention:
        return network
    copied = copy.deepcopy(network).to(device)
    if not quantized:
        copied = copied.float()
    if attention != spec.attention:
        _plain(copied).set_attn_implementation(attention)
    return copied


def _attention(spec: NetworkSpec) -> Any:
    """Attention that computes in float32 everywhere."""
    own = spec.attention
    return "sdpa" if own in ("flash_attention_2", "flex_attention") else own


def _load(folder: Path, spec: NetworkSpec) -> Any:
    """The network of a written folder, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {
        "use_safetensors": True,
        "local_files_only": True,
        "trust_remote_code": spec.trust_remote_code,
        "attn_implementation": _attention(spec),
    }
    if not is_adapter(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
    settings = quantization_settings(spec)
    # In the precision of training first: the base's files may have another.
    base = AutoModelForCausalLM.from_pretrained(
        base_folder(folder, spec), dtype=getattr(torch, spec.dtype), **settings, **arguments
    )
    if settings:
        return PeftModel.from_pretrained(prepare_quantized(base), folder)
    plain: Any = base
    return PeftModel.from_pretrained(plain.float(), folder)


# -- memory


def _check_memory(network: nn.Module, device: torch.device) -> None:
    """Check that a float32 copy fits on a device, and on the host, where it is made and loaded.

    Raises:
        NotChecked: it does not.
    """
    needed = ROOM * sum(4 * weight.numel() for weight in network.parameters())
    for place in dict.fromkeys((device, torch.device("cpu"))):
        free = free_memory(place)
        if needed > free:
            raise NotChecked(
                f"a second copy takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
                f" ({place.type})"
            )


def free_memory(device: torch.device) -> float:
    """Free memory of a device in bytes; on the host, within the limit of a container."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0.0  # unknown
    free = float("inf")
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        free = 1024.0 * int(lines.get("MemAvailable", lines["MemFree"]).split()[0])
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        used = float((group / "memory.current").read_text())
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, float(most) - used + float(counted.get("inactive_file", 0)))
    return free
