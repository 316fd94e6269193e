"""The synthetic safety language: prompts over abstract symbols, judged exactly by a program."""

from temper.synthetic.checker import Verdict, check_response
from temper.synthetic.language import Language
from temper.synthetic.prompts import Kind, Prompts
from temper.synthetic.spec import PRESETS, LanguageSpec, language_spec
from temper.synthetic.tokenizer import build_tokenizer

__all__ = [
    "PRESETS",
    "Kind",
    "Language",
    "LanguageSpec",
    "Prompts",
    "Verdict",
    "build_tokenizer",
    "check_response",
    "language_spec",
]
