"""Previews of data, in a terminal and as an HTML page."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from temper.data import PoolSource, pair_rows
from temper.losses import IGNORE_INDEX
from temper.preview import build_preview, print_preview, render_page
from temper.preview.report import extract_prompts, scan_source
from temper.preview.rows import make_histogram
from tests.page import Page

TRICKY = "[bold]Mix[/bold] [/] & <b onclick='x'>stir</b>"
ROWS = (
    ("How do I bake bread at home?", "Mix flour and water."),
    ("What is soup?", TRICKY),
    ("What is tea?", "A drink."),
)


class Template:
    name = "chatml"

    def __init__(self, kitchen) -> None:
        self.kitchen = kitchen

    def prompt_ids(self, messages):
        return self.kitchen.prompt(messages[0].content)


def numbers(text: str) -> list[int]:
    """The numbers in a sentence, in any wording."""
    return [int(digits) for digits in re.findall(r"\d+", text)]


def overlap(shown) -> list[int]:
    """The numbers of the one overlap, which is that of the evaluation with the stream ``user``."""
    ((title, text),) = shown.overlaps
    assert "evaluation" in title and "user" in title
    return numbers(text)


def fact(shown, word: str) -> list[int]:
    """The numbers of the first stream's fact that has a word."""
    (found,) = (text for text in shown.streams[0].facts if word in text)
    return numbers(found)


def _printed(preview, **console) -> str:
    file = io.StringIO()
    print_preview(preview, Console(file=file, width=200, **console))
    return file.getvalue()


@pytest.fixture
def shown(kitchen):
    return build_preview(kitchen.data(user=kitchen.rows(*ROWS)), ["user"], "Bread")


def test_every_row_is_shown_as_it_is_without_padding(shown):
    text = _printed(shown)
    assert "[bold]Mix[/bold] [/] & <b onclick='x'>stir</b>" in text
    assert "«Mix flour and water.<|end|>»‹↵\n›" in text
    assert "<|start|>How do I bake bread at home?<|end|>" in text
    assert "<pad>" not in text.split("Shown as")[1]


def test_a_terminal_gets_colours_instead_of_brackets(shown):
    text = _printed(shown, force_terminal=True, color_system="standard")
    assert (
        "«" not in text
        and "\x1b[1;32mMix flour and water." in text
        and "\x1b[1;7;32m<|end|>" in text
        and "\x1b[36mWhat is soup?" in text
    )


def test_the_page_is_self_contained_and_says_the_same(shown):
    source = render_page(shown)
    page = Page(source)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert (
        tags.isdisjoint({"script", "link", "img", "b onclick", "iframe"}) and "url(" not in source
    )
    assert not any({"src", "href", "onclick"} & set(attributes) for _, attributes in page.tags)
    assert TRICKY in page.text
    for stream in shown.streams:
        for words in (*stream.facts, *(bars.title for bars in stream.histograms)):
            assert words in page.text
    assert {"prompt", "trained", "masked", "trained special"} <= {
        attributes.get("class") for _, attributes in page.tags
    }


def test_rows_of_two_sequences_are_shown_as_such(kitchen):
    pairs = pair_rows(kitchen.rows(("Tea?", "Yes.")), kitchen.rows(("Tea?", "No.")))
    text = _printed(build_preview(kitchen.data(pairs=pairs), ["pairs"], ""))
    assert re.search(r"chosen: .*?\n.*?«Yes\.", text, re.S) and re.search(
        r"rejected: .*?\n.*?«No\.", text, re.S
    )


def test_scalar_columns_of_a_row_are_shown(kitchen):
    rows = kitchen.rows(("Tea?", "Yes.")) | {"unsafe": kitchen.rows(("Tea?", "Yes."))["ids"] > 0}
    assert "row 1 (unsafe: no)" in _printed(build_preview(kitchen.data(user=rows), ["user"], ""))


def test_template_and_reports_of_the_data_are_shown(kitchen):
    data = kitchen.data(user=kitchen.rows(*ROWS))
    assert "template: none" in _printed(build_preview(data, ["user"], ""))
    data.format = Template(kitchen)
    data.reports = {"train": 7}
    text = _printed(build_preview(data, ["user"], ""))
    assert "template: chatml" in text and "train: 7" in text


def test_text_that_all_prompts_share_is_no_overlap(kitchen, monkeypatch):
    monkeypatch.setattr("temper.preview.report.SMALL_VOCABULARY", 1)
    question = "Please tell me how long brown rice has to cook"
    rows = kitchen.rows(*ROWS, (f"Well. {question}", "Long."), ("What is  TEA?", "Leaves."))
    data = kitchen.data(user=rows, evaluation=("What is soup?", f"{question}!", "And eggs?"))
    shown = build_preview(data, ["user"], "", limit=5)
    # 1 of 3 rows is in both sets: row 1 is row 2; 2 share 8 words in a row: row 2 with row 4
    assert overlap(shown) == [1, 3, 1, 2, 2, 8, 2, 4]
    assert fact(shown, "prompts:") == [1, 5, 5, 3], "row 5 repeats row 3"


@pytest.mark.parametrize(
    "question",
    [
        "{} Please tell me how long brown rice has to cook",
        "Please tell me how long brown rice has to cook {}",
    ],
)
def test_a_known_template_leaves_shared_words_as_overlap(kitchen, monkeypatch, question):
    monkeypatch.setattr("temper.preview.report.SMALL_VOCABULARY", 1)
    questions = [question.format(i) for i in range(3)]
    data = kitchen.data(
        user=kitchen.rows(*((question, "Long.") for question in questions[:2])),
        evaluation=(questions[2],),
    )
    assert overlap(build_preview(data, ["user"], ""))[2:4] == [0, 8]
    data.format = Template(kitchen)
    assert overlap(build_preview(data, ["user"], ""))[2:4] == [1, 8]


def test_a_prompt_contained_in_all_others_is_not_equal_to_them(kitchen):
    data = kitchen.data(user=kitchen.rows(("zzz", "Yes."), ("zz", "Yes.")), evaluation=("z",))
    shown = build_preview(data, ["user"], "")
    assert overlap(shown) == [0, 1]
    assert fact(shown, "prompts:") == [0, 2]


def test_a_row_without_labels_is_all_prompt(kitchen):
    rows = kitchen.rows(
        ("Tea?", "Yes."), ("How do I bake bread?", "Mix flour and water, then bake it.")
    )
    rows["labels"][:] = IGNORE_INDEX
    assert [len(ids) for ids in extract_prompts(rows)] == rows["attention_mask"].sum(-1).tolist()


def test_shared_words_are_not_reported_for_a_small_vocabulary(kitchen):
    shown = build_preview(kitchen.data(user=kitchen.rows(*ROWS)), ["user"], "")
    assert overlap(shown) == [0, 1]


def test_rows_without_a_trained_token_are_counted(kitchen):
    rows = kitchen.rows(*ROWS)
    rows["labels"][1] = IGNORE_INDEX
    shown = build_preview(kitchen.data(user=rows), ["user"], "")
    assert fact(shown, "no trained token") == [1]


def test_data_without_evaluation_prompts_are_shown_too(kitchen):
    shown = build_preview(kitchen.data(evaluation=(), user=kitchen.rows(*ROWS)), ["user"], "")
    assert [stream.name for stream in shown.streams] == ["user"] and shown.overlaps == ()


def test_the_fill_rate_is_that_of_micro_batches(kitchen):
    rows = kitchen.rows(*ROWS)
    lengths = rows["attention_mask"].sum(-1).numpy()
    source = PoolSource(rows, 3, 0, "user")
    assert scan_source(source, 0, 3).fill == pytest.approx(lengths.sum() / (3 * lengths.max()))
    assert scan_source(source, 0, 3, micro_batch_size=1).fill == 1


def test_packing_raises_the_fill_rate(kitchen):
    rows = kitchen.rows(("Tea?", "Yes. " * 60), *[("Tea?", "Yes.")] * 3)
    scan = scan_source(PoolSource(rows, 4, 0, "user"), 0, 4, hidden_size=576)
    assert scan.fill < 0.5 < 0.6 < scan.packed_fill <= 1
    said = [
        build_preview(kitchen.data(user=rows), ["user"], "", hidden_size=width).streams[0].facts[1]
        for width in (None, 576)
    ]
    assert [numbers(text) for text in said] == [[100], [100, 100]], "batches of one row"


def test_rows_beyond_the_limit_are_not_read(kitchen):
    shown = build_preview(kitchen.data(user=kitchen.rows(*ROWS)), ["user"], "", rows=1, limit=2)
    assert numbers(shown.streams[0].facts[0]) == [3, 3, 1, 2], "statistics are over the first 2"
    assert sum(count for _, count in shown.streams[0].histograms[0].bars) == 2
    assert len(shown.streams[0].rows) == 1


def test_row_numbers_are_those_of_the_pool(kitchen):
    data = kitchen.data(user=kitchen.rows(*ROWS))
    rows = {row.number: row for row in build_preview(data, ["user"], "").streams[0].rows}
    assert sorted(rows) == [1, 2, 3]
    assert "soup" in "".join(span.text for span in rows[2].sequences[0].spans)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_every_value_falls_into_the_bar_that_names_it(values):
    bars = make_histogram("", np.array(values)).bars
    assert len(bars) <= 10
    for words, count in bars:
        low, _, high = words.partition("-")
        assert count == sum(int(low) <= value <= int(high or low) for value in values)
    assert sum(count for _, count in bars) == len(values)
