"""Whether a network speaks the vocabulary of the data's tokenizer."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.models.folder import FLAG, read_json, tokenizer_folder
from temper.models.load import count_embeddings
from temper.models.spec import NetworkSpec


def check_vocabulary(spec: NetworkSpec, base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that means other tokens by the network's ids.

    Every token of the network's tokenizer must have the same id in the data's. The data's may have more, as long as
    the network has an embedding for them.

    Args:
        spec: The network; its tokenizer is beside it, or beside the base of an adapter.
        base: Folder with the config.json of the network (of the base, for an adapter).
        tokenizer: The data's.

    Raises:
        TemperError: as said; or the network's folder has no tokenizer.
    """
    found, wanted = _vocabulary(tokenizer_folder(spec), spec.trust_remote_code), tokenizer.get_vocab()
    rows = count_embeddings(base, spec)
    wrong = {token: i for token, i in found.items() if wanted.get(token) != i}
    wrong |= {token: i for token, i in wanted.items() if found.get(token) != i and (token in found or i >= rows)}
    if wrong:
        first = min(wrong, key=lambda token: wrong[token])
        raise TemperError(
            f"{FLAG}.path={spec.path}: its vocabulary ({len(found)} tokens, {rows} embeddings) is not the data's ({len(wanted)} tokens), "
            f"first at token {first!r}; use the tokenizer of this folder, and with synthetic data the same data.init_args.preset and "
            "language_seed in every stage"
        )
    if tokenizer.pad_token_id is not None and int(tokenizer.pad_token_id) >= rows:
        raise TemperError(
            f"{FLAG}.path={spec.path}: the pad token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the network {rows} "
            "embeddings; set tokenizer.pad_token = tokenizer.eos_token and save it beside the model (tokenizer.save_pretrained)"
        )


def _vocabulary(folder: Path, trust_remote_code: bool) -> dict[str, int]:
    """Ids by token, added ones included: from tokenizer.json where there is one, which takes a second for 250,000 tokens."""
    if not (folder / "tokenizer.json").exists():
        beside = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        vocabulary: dict[str, int] = beside.get_vocab()
        return vocabulary
    stored = read_json(folder / "tokenizer.json")
    found = stored["model"]["vocab"]
    if isinstance(found, list):  # Unigram: (token, score) pairs in id order
        found = {token: i for i, (token, _score) in enumerate(found)}
    # Added tokens (special ones) may live outside the model's own table.
    return {**found, **{entry["content"]: entry["id"] for entry in stored.get("added_tokens") or []}}
