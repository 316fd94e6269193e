"""One thread per process, repeatable property tests, and the small languages that tests share."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings

from temper.synthetic import Language, language_spec

torch.set_num_threads(1)
# No deadline: machines are shared. Derandomised: a red test is red again when it is run again.
settings.register_profile("temper", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("temper")


@pytest.fixture(scope="session")
def tiny() -> Language:
    """One operator pair, one grammar, five letters at most."""
    return Language(language_spec("tiny"))


@pytest.fixture(scope="session")
def two_pairs() -> Language:
    """Two operator pairs and three grammars, as `paper` has them, at the size of `tiny`."""
    return Language(language_spec("tiny", n_pairs=2, n_grammars=3, n_contextual_operators=3, n_duplicates=4))


@pytest.fixture(scope="session")
def paper() -> Language:
    """The language of the paper."""
    return Language(language_spec("paper"))


@pytest.fixture(scope="session")
def carry_out() -> Callable[[Language, Sequence[int], Sequence[int]], list[list[int]]]:
    """Outputs of a prompt by a plain loop: out1 = t2(t1(text)), out2 = t4(t3(out1)), in letters."""

    def outputs(language: Language, operators: Sequence[int], text: Sequence[int]) -> list[list[int]]:
        letters, results = [int(letter) for letter in text if letter != -1], []
        for pair in range(language.spec.n_pairs):
            for slot in (0, 1):
                table = language.permutation_OV[operators[2 * pair + slot]].tolist()
                letters = [table[letter] for letter in letters]
            results.append(letters)
        return results

    return outputs
