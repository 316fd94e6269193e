"""The exact judge of the synthetic language."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from temper.judges.base import Judgement
from temper.synthetic.checker import check_response
from temper.synthetic.language import Language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrammarJudge:
    """Exact judge: computes the right answer from the operators in the prompt."""

    name = "grammar"

    def __init__(self, language: Language, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.language = language
        self.vocabulary = tokenizer.get_vocab()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """Judge each response (text with special tokens) to its prompt.

        Raises:
            ValueError: a prompt is not one of this language.
        """
        judgements = []
        for prompt, response in zip(prompts, responses, strict=True):
            verdict = check_response(self.language, self._ids(prompt), self._ids(response))
            judgements.append(
                Judgement(
                    verdict.label,
                    verdict.fraction_right,
                    verdict.refused,
                    verdict.correct,
                    verdict.degenerate,
                )
            )
        return judgements

    def _ids(self, text: str) -> list[int]:
        return [self.vocabulary.get(token, -1) for token in text.split()]
