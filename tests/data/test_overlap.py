"""Repeated rows and overlaps found by hashes equal a comparison of all rows with all rows."""

import string
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from temper.data import overlap as module
from temper.data.examples import Example, Message
from temper.data.overlap import (
    Duplicates,
    Overlap,
    duplicates,
    find_leaks,
    normalise,
    overlap,
    repeats,
)

# Few words and many separators: rows collide often.
TEXTS = st.lists(
    st.lists(
        st.sampled_from(["mix", "Mix", "oil", "SALT", "salt", "  ", "\n", ", ", "-", "_", "!"]),
        max_size=7,
    ).map(" ".join),
    max_size=8,
)


def _words(text: str) -> tuple[str, ...]:
    return tuple("".join(c if c not in string.punctuation else " " for c in text.lower()).split())


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = _words(text)
    return (
        {words[i : i + n] for i in range(len(words) - n + 1)} if len(words) >= n else {words} - {()}
    )


def _same(one: str, other: str) -> bool:
    return one.lower().split() == other.lower().split()


def _first(texts: list[str], matches) -> int | None:
    return next((number for number, text in enumerate(texts, 1) if matches(text)), None)


@given(TEXTS)
def test_duplicates_are_the_rows_equal_to_an_earlier_one(texts):
    pairs = [
        (i, _first(texts, lambda other, i=i: _same(other, texts[i - 1])))
        for i in range(1, len(texts) + 1)
    ]
    expected = [(row, first) for row, first in pairs if row != first]
    assert list(repeats(iter(texts))) == expected
    assert duplicates(iter(texts)) == Duplicates(len(texts), len(expected), tuple(expected[:5]))


@given(TEXTS, TEXTS, st.integers(1, 4), st.integers(1, 3))
@example(a=["salt"], b=["salt oil", "oil salt", "salt"], n=2, chunk=1)
def test_overlaps_are_those_of_a_comparison_of_all_with_all(a, b, n, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = overlap(iter(a), iter(b), n)
    exact = {
        row: first
        for row, text in enumerate(b, 1)
        if (first := _first(a, lambda other, t=text: _same(other, t)))
    }
    shared = {
        row: first
        for row, text in enumerate(b, 1)
        if (first := _first(a, lambda other, t=text: bool(_grams(other, n) & _grams(t, n))))
    }
    near = [pair for pair in shared.items() if pair[0] not in exact]
    assert found == Overlap(
        len(b), len(exact), len(shared), n, tuple(list(exact.items())[:5]), tuple(near[:5])
    )


def test_eight_words_in_a_row_are_shared_in_any_context():
    recipe = "Whisk two eggs with a cup of cold milk"
    a = ["Bake bread.", f"First: {recipe.upper()}, then rest."]
    assert overlap(a, [f"Now {recipe}!"]).shared_cases == ((1, 2),)
    assert overlap(a, ["Whisk two eggs with a cup of hot milk"]).shared == 0
    assert overlap(a, ["bake  BREAD"]).shared == 1 and overlap(a, ["bake  BREAD"]).exact == 0
    assert overlap(a, ["Now bake bread."]).shared == 0  # short rows are compared as wholes


def test_the_order_of_words_counts():
    assert (
        overlap(
            ["one two three four five six seven eight"], ["eight seven six five four three two one"]
        ).shared
        == 0
    )


def test_reports_are_one_line_with_the_first_case():
    assert (
        str(duplicates(["a", "b", "A "]))
        == "1 of 3 rows repeat an earlier row (row 3 repeats row 1)"
    )
    assert str(duplicates([])) == "0 of 0 rows repeat an earlier row"
    found = overlap(["a", "b c"], ["x", "B  C", "b, c"])
    assert (
        str(found)
        == "1 of 3 rows are in both sets (row 2 is row 2), 2 share 8 words in a row (row 3 with"
        " row 2)"
    )


@given(st.text())
def test_any_text_can_be_compared(text):
    assert duplicates([text, f" {text}\t"]).repeats == 1
    assert overlap([text], [text]).exact == 1
    assert normalise(normalise(text)) == normalise(text)


def test_half_a_surrogate_ends_no_report():
    assert duplicates(["\ud800", "\ud801"]).repeats == 0


def test_a_large_set_is_streamed_and_not_held():
    b = [f"a prompt about soup number {i} with a pinch of salt" for i in range(100)]
    rows = (
        f"{'a long row of a file of recipes ' * 20}{i % 100}" for i in range(5_000)
    )  # 3.2 MB of text
    tracemalloc.start()
    found = overlap(rows, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.exact == found.shared == 0
    assert peak < 2.5e6, f"{peak / 1e6:.1f} MB"


def _examples(texts: list[str], file: str) -> list[Example]:
    """Rows whose numbers are not their places: some rows of the file were broken."""
    return [
        Example((Message("user", text),), file=file, row=2 * place)
        for place, text in enumerate(texts, 1)
    ]


@given(
    TEXTS, st.dictionaries(st.sampled_from(["safe", "unsafe", "task"]), TEXTS), st.integers(1, 3)
)
def test_leaks_of_several_sets_are_those_of_one_set_at_a_time(training, sets, chunk):
    # Openings that some sets share with the training file, and some do not.
    training = [f"mix oil {text}" for text in training]
    sets = {
        name: [f"mix oil {text}" for text in texts] if name == "safe" else texts
        for name, texts in sets.items()
    }
    evaluation = {name: _examples(texts, f"{name}.jsonl") for name, texts in sets.items()}
    read = []
    rows = (read.append(example.row) or example for example in _examples(training, "a.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = find_leaks(rows, evaluation)
    assert read == [2 * place for place in range(1, len(training) + 1)], "once for all sets"
    assert found == {
        name: find_leaks(_examples(training, "a.jsonl"), {name: examples})[name]
        for name, examples in evaluation.items()
    }


def test_a_leak_names_rows_by_their_numbers_in_their_files():
    training = _examples(["Bake bread.", "Cook soup.", "Peel apples."], "train.jsonl")
    leaks = find_leaks(training, {"safe": _examples(["Boil rice.", "cook  soup."], "safe.jsonl")})
    assert leaks["safe"].example == ("safe.jsonl", 4, 4) and leaks["safe"].found.exact == 1
    assert find_leaks(training, {"safe": _examples(["Boil rice."], "b")})["safe"].example is None
