"""Tasks: files with and without headers become Booster's prompts, and answers are compared as the
module says.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.data.chat import ChatFormat
from temper.data.examples import Message
from temper.data.files import ReadReport
from temper.data.tasks import TASKS, final_number
from tests.errors import error_line
from tests.text import make_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
SST2, AG_NEWS, GSM8K = (TASKS[name] for name in ("sst2", "ag_news", "gsm8k"))


def written(file: Path, content: str) -> Path:
    file.write_text(content)
    return file


def failure(task: str, file: Path) -> str:
    line = error_line(lambda: list(TASKS[task].read(file, flag="--data.path")))
    assert line.startswith(f"--data.path={file}: ")
    return line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bare.tsv", "a warm soup\t1\nburnt\t0\n"),
        ("head.tsv", "sentence\tlabel\na warm soup\t1\nburnt\t0\n"),
        ("glue.tsv", "idx\tSentence\tLabel\n7\ta warm soup\t1\n8\tburnt\t0\n"),
        ("bare.csv", "a warm soup,1\nburnt,0\n"),
        (
            "rows.jsonl",
            '{"sentence": "a warm soup", "label": 1}\n{"text": "burnt", "label": "negative"}\n',
        ),
    ],
)
def test_sst2_is_read_with_the_prompt_of_booster(name: str, content: str, tmp_path: Path):
    good, bad = SST2.read(written(tmp_path / name, content))
    instruction = "Analyze the sentiment of the input, and respond only positive or negative"
    assert (
        good.prompt == (Message("user", instruction, "a warm soup"),)
        and bad.prompt[0].input == "burnt"
    )
    assert [(e.answers, e.reference, e.row) for e in (good, bad)] == [
        (("positive",), "positive", 1),
        (("negative",), "negative", 2),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bare.csv", '"3","Oil","Prices fell"\n"4","Stars","A ""new"" one"\n'),
        ("head.csv", 'Class Index,Title,Description\n3,Oil,Prices fell\n4,Stars,"A ""new"" one"\n'),
        ("text.csv", 'text,label\nOil Prices fell,2\n"Stars A ""new"" one",3\n'),
        (
            "rows.json",
            (
                '[{"label": 2, "text": "Oil Prices fell"}, {"label": 3, "text": "Stars A \\"new\\"'
                ' one"}]'
            ),
        ),
    ],
)
def test_ag_news_is_read_with_the_prompt_of_booster(name: str, content: str, tmp_path: Path):
    oil, stars = AG_NEWS.read(written(tmp_path / name, content))
    lines = [
        "Categorize the news article given in the input into one of the 4 categories:",
        "",
        "World",
        "Sports",
        "Business",
        "Sci/Tech",
        "",
    ]
    assert (
        oil.prompt == (Message("user", "\n".join(lines), "Oil Prices fell"),)
        and stars.prompt[0].input == 'Stars A "new" one'
    )
    assert [(e.answers, e.reference) for e in (oil, stars)] == [
        (("Business",), "Business"),
        (("Sci/Tech",), "Sci/Tech"),
    ]


def test_gsm8k_is_read_with_the_answer_of_booster(tmp_path: Path):
    row = {"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1,200\n#### 1,200"}
    (found,) = GSM8K.read(written(tmp_path / "rows.jsonl", json.dumps(row)))
    assert found.prompt == (Message("user", "How many?"),) and found.reference == "1200"
    assert found.answers == ("2 * 600 = <<2*600=1200>>1,200\nThe final answer is:  1,200",)


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        (
            "sst2",
            {"sentence": "a", "label": -1},
            (
                "column 'label' is '-1' (a public test set without answers); accepted: 0, 1,"
                " negative, positive"
            ),
        ),
        ("sst2", {"sentence": "a", "label": 2}, "column 'label' is '2'; accepted"),
        ("sst2", {"sentence": "a"}, "no column 'label'; found 'sentence'"),
        ("sst2", {"label": 1}, "no column 'sentence' or 'text'; found 'label'"),
        ("sst2", {"sentence": " ", "label": 1}, "column 'sentence' is empty"),
        ("sst2", {"sentence": None, "label": 1}, "column 'sentence' is null, wanted text"),
        (
            "ag_news",
            {"class": 0, "title": "a", "description": "b"},
            "column 'class' is '0'; accepted: 1, 2, 3, 4, world",
        ),
        (
            "ag_news",
            {"text": "a", "label": 4},
            "column 'label' is '4'; accepted: 0, 1, 2, 3, world",
        ),
        (
            "gsm8k",
            {"question": "a", "answer": "42"},
            "column 'answer' does not end in '####' and a number",
        ),
        ("gsm8k", {"question": "a", "answer": "#### many"}, "column 'answer' does not end in"),
    ],
)
def test_broken_rows_are_named_and_the_good_ones_counted(
    task: str, row: dict, reason: str, tmp_path: Path
):
    good = {"sst2": ("sentence", 1), "ag_news": ("text", 1), "gsm8k": ("question", "#### 5")}[task]
    whole = {good[0]: "a", "answer" if task == "gsm8k" else "label": good[1]}
    file = written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, [whole, row, whole])))
    assert f"1 of 3 rows broken, 2 good; row 2: {reason}" in failure(task, file)
    report = ReadReport()
    assert [e.row for e in TASKS[task].read(file, skip_broken=True, report=report)] == [
        1,
        3,
    ] and report.n_broken == 1


def test_a_file_of_another_task_is_one_line(tmp_path: Path):
    assert "3 cells on line 1, and there are 2 columns" in failure(
        "sst2", written(tmp_path / "rows.tsv", "1\ta\tb\n")
    )
    assert "no column 'sentence' or 'text'; found 'question', 'answer'" in failure(
        "sst2", written(tmp_path / "rows.jsonl", '{"question": "a", "answer": "b"}')
    )


@pytest.mark.parametrize(
    ("task", "response", "reference", "right"),
    [
        ("sst2", "positive", "positive", True),
        ("sst2", " **Positive.** It is warm", "positive", True),
        ("sst2", "negative", "positive", False),
        ("sst2", "It is positive", "positive", False),
        ("sst2", "positively", "positive", False),
        ("sst2", "", "positive", False),
        ("ag_news", "Sci/Tech", "Sci/Tech", True),
        ("ag_news", "sci", "Sci/Tech", True),
        ("ag_news", "Science", "Sci/Tech", False),
        ("ag_news", "sci", "World", False),
        ("gsm8k", "so 18 eggs.\nThe final answer is:  18", "18", True),
        ("gsm8k", "#### $1,000.00.", "1000", True),
        ("gsm8k", "the final answer is 5. Check: 2 + 4 = 6", "5", True),
        ("gsm8k", "The final answer is: 5\n#### 6", "6", True),
        ("gsm8k", "16-3=13", "13", True),
        ("gsm8k", "16 - 3", "-3", False),
        ("gsm8k", "-$2.50", "-2.5", True),
        ("gsm8k", "none", "0", False),
        ("gsm8k", "a1 is 3", "1", False),
        ("gsm8k", "####", "5", False),
    ],
)
def test_what_counts_as_right(task: str, response: str, reference: str, right: bool):
    assert TASKS[task].correct(response, reference) is right


@given(
    number=st.decimals(-(10**9), 10**9, places=2),
    before=st.text("abc $,.\n#", max_size=10),
    mark=st.sampled_from(["#### ", "The final answer is:  "]),
)
def test_a_number_is_found_however_it_is_written(number, before: str, mark: str):
    for written_as in (f"{number}", f"{number:,}", f"{number}.", f"{number} eggs"):
        assert final_number(f"7 {before} {mark}{written_as}") == number
        assert final_number(f"7 {before} {written_as}") == number


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs ../shared/data, the public files of the tasks"
)
@pytest.mark.parametrize(
    ("task", "file", "n_rows", "n_references"),
    [
        ("sst2", "sst2/dev.tsv", 872, 2),
        ("ag_news", "ag_news/test.csv", 7600, 4),
        ("gsm8k", "gsm8k/test.jsonl", 1319, 351),
    ],
)
def test_public_files_are_read_and_their_answers_are_correct(
    task: str, file: str, n_rows: int, n_references: int
):
    found = list(TASKS[task].read(SHARED / file))
    assert (len(found), len({e.reference for e in found})) == (n_rows, n_references)
    assert all(TASKS[task].correct(e.answers[0], e.reference) for e in found)


def test_prompts_are_word_for_word_those_of_the_released_code(tmp_path: Path):
    chat = ChatFormat(make_tokenizer(None), "booster")
    (rated,) = SST2.read(written(tmp_path / "a.tsv", "a warm soup\t1\n"))
    (sum_,) = GSM8K.read(
        written(tmp_path / "b.jsonl", '{"question": "1+1?", "answer": "It is #### 2"}\n')
    )
    assert chat.tokenizer.decode(chat.prompt_ids(rated.prompt)) == (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Analyze the sentiment of the input, and respond only positive or negative\n\n"
        "### Input:\na warm soup\n\n### Response:\n"
    )
    assert chat.tokenizer.decode(chat.prompt_ids(sum_.prompt)) == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\n1+1?\n\n### Response:\n"
    )
    assert sum_.answers == ("It is The final answer is:  2",)
