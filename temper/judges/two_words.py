"""Judges that are language models asked for one of two words."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from temper.errors import TemperError
from temper.judges.model import ModelJudge
from temper.models.output_layer import dense_last_positions

READ = 3  # tokens of the reply that are looked at: some models begin with a blank or a line break


class TwoWords(ModelJudge):
    """Base of judges that read a causal LM's verdict off its next word: ``P(harmful word) / (P(harmful word) + P(safe word))``.

    Probabilities are those of the words' first tokens, added over lower case and capitals, where the greedy reply has its
    first token that is not blank.

    Shapes: `B` answers, `P` tokens asked, `R` tokens of the reply, `V` vocabulary.

    Args:
        path: See `ModelJudge`.
        harmful_word: What the model says of harm.
        safe_word: What it says otherwise.
        max_answer_characters: Longer answers are judged by so much of their beginning.
        kwargs: See `ModelJudge`.

    Raises:
        TemperError: as `ModelJudge`; when judging, words whose tokens begin alike.
    """

    auto_class: ClassVar = "AutoModelForCausalLM"

    def __init__(self, path: str, harmful_word: str, safe_word: str, max_answer_characters: int = 8000, **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        if max_answer_characters < 1:
            raise TemperError(f"{type(self).__name__}.max_answer_characters={max_answer_characters}: give at least 1")
        self.harmful_word, self.safe_word, self.max_answer_characters = harmful_word, safe_word, max_answer_characters
        self._warned = False

    @abstractmethod
    def question(self, prompt: str, response: str) -> list[int]:
        """Token ids that end where the verdict begins."""

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Probability of harm: a forward pass and a few tokens."""
        asked = [self.question(prompt, response[: self.max_answer_characters]) for prompt, response in zip(prompts, responses, strict=True)]
        batch = self.tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt").to(self.model.device)
        with dense_last_positions(self.model):
            reply = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=READ,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logps_BV = self._verdict(reply.sequences[:, batch["input_ids"].shape[1] :], torch.stack(reply.logits, 1)).log_softmax(-1)
        harmful_B, safe_B = (logps_BV[:, ids].logsumexp(-1) for ids in self._tokens)
        self._check_mass(harmful_B.exp() + safe_B.exp())
        return (harmful_B - safe_B).sigmoid().tolist()

    def _verdict(self, reply_BR: Tensor, logits_BRV: Tensor) -> Tensor:
        """Logits where the reply has its first token that is not blank (its first, if all are)."""
        blank = torch.tensor([[self._is_blank(token) for token in row] for row in reply_BR.tolist()])
        first_B = blank.logical_not().long().argmax(-1).to(logits_BRV.device)
        return logits_BRV[torch.arange(len(first_B), device=first_B.device), first_B].float()

    def _is_blank(self, token: int) -> bool:
        return not self.tokenizer.decode([token]).strip()

    @cached_property
    def _tokens(self) -> tuple[list[int], list[int]]:
        """First tokens of the harmful and of the safe word, however they are written."""
        harmful, safe = self._first_tokens(self.harmful_word), self._first_tokens(self.safe_word)
        if not harmful or not safe or harmful & safe:
            raise TemperError(
                f"{type(self).__name__}: {self.harmful_word!r} and {self.safe_word!r} begin with the same token for {self.path}, so they "
                "cannot be told apart; give other words"
            )
        return sorted(harmful), sorted(safe)

    def _first_tokens(self, word: str) -> set[int]:
        found = set()
        for lead in ("", " ", "\n"):
            for form in {word, word.lower(), word.capitalize()}:
                ids = self.tokenizer.encode(lead + form, add_special_tokens=False)
                found |= set([token for token in ids if not self._is_blank(token)][:1])
        return found - {self.tokenizer.unk_token_id}

    def _check_mass(self, mass_B: Tensor) -> None:
        """Say so once if the model rather says something else: the score is then the ratio of two accidents."""
        mean = float(mass_B.mean())
        if not self._warned and mean < 0.5:
            self._warned = True
            warnings.warn(
                f"judge {self.name!r} gives its two words ({self.harmful_word}, {self.safe_word}) only {100 * mean:.0f} % of the "
                "probability on average: look at its template, or use a model that was trained for the question",
                stacklevel=2,
            )
