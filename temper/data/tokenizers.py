"""The tokenizer of a user's model."""

import hashlib

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from temper.errors import TemperError


def load_tokenizer(name: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a hub name in the local cache; one without pad token pads with its eos token.

    Args:
        name: Folder or hub name.
        trust_remote_code: Run code that comes with it.

    Raises:
        TemperError: none is named, there is none of that name, or it comes with code that was not trusted.
    """
    if name is None:
        raise TemperError("data.init_args.tokenizer is not set: give the folder of the model, or of its tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):  # transformers names the flag where code would have to be run
            raise TemperError(
                f"data.init_args.tokenizer={name}: it comes with code of its own: set data.init_args.trust_remote_code=true if you trust "
                "its authors"
            ) from error
        raise TemperError(
            f"data.init_args.tokenizer={name}: no folder with a tokenizer, and no tokenizer of that name in the local hub cache; "
            "give the folder of the model"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules} {sorted(tokenizer.special_tokens_map.items())}".encode()).hexdigest()
