"""Token ids as text spans: complete, in their roles, without control characters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.losses import IGNORE_INDEX
from temper.preview.rows import MAX_SHOWN_TOKENS, text_spans


def _plain(text: str) -> str:
    return text.replace("\n", "↵\n")


@given(st.data())
def test_the_spans_of_a_sequence_join_to_its_text(byte_level, metaspace, data):
    tokenizer = data.draw(st.sampled_from([byte_level, metaspace]))
    ids = data.draw(
        st.lists(
            (
                st.sampled_from(range(len(tokenizer)))
                if tokenizer is metaspace
                else st.sampled_from(range(100))
            ),
            max_size=12,
        )
    )
    labels = [data.draw(st.sampled_from([token, IGNORE_INDEX])) for token in ids]
    found = text_spans(tokenizer, ids, labels)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if whole.isascii() and whole.isprintable():
        assert "".join(span.text for span in found) == whole
    assert all(
        (one.role, one.special) != (other.role, other.special)
        for one, other in zip(found, found[1:], strict=False)
    )


def test_roles_are_prompt_trained_and_masked(byte_level):
    ids = byte_level.encode(
        "<|start|>How?<|end|>\nMix.<|end|>\nAnd?<|end|>", add_special_tokens=False
    )
    text = [byte_level.decode([i]) for i in ids]
    answer = (
        text.index("M") if "M" in text else next(i for i, t in enumerate(text) if t.startswith("M"))
    )
    end = text.index("<|end|>", answer)
    labels = [token if answer <= i <= end else IGNORE_INDEX for i, token in enumerate(ids)]
    found = text_spans(byte_level, ids, labels)
    assert [(span.text, span.role, span.special) for span in found] == [
        ("<|start|>", "prompt", True),
        ("How?", "prompt", False),
        ("<|end|>", "prompt", True),
        ("↵\n", "prompt", False),
        ("Mix.", "trained", False),
        ("<|end|>", "trained", True),
        ("↵\nAnd?", "masked", False),
        ("<|end|>", "masked", True),
    ]


def test_without_labels_everything_is_prompt(byte_level):
    assert {span.role for span in text_spans(byte_level, byte_level.encode("Mix flour."))} == {
        "prompt"
    }


def test_a_label_that_differs_from_its_token_is_shown(byte_level):
    ids = byte_level.encode("ab")
    other = byte_level.encode("z")
    assert [span.text for span in text_spans(byte_level, ids, [*other, ids[1]])][:2] == ["a→z", "b"]


def test_words_keep_the_space_before_them(metaspace):
    ids = metaspace.convert_tokens_to_ids(["<s>", "▁one", "▁two"])
    labels = [IGNORE_INDEX, IGNORE_INDEX, ids[2]]
    assert "".join(span.text for span in text_spans(metaspace, ids, labels)).endswith("one two")


def test_control_characters_are_made_visible(byte_level):
    text = "".join(
        span.text for span in text_spans(byte_level, byte_level.encode("a\x1b[31mb\x07\r\x9b"))
    )
    assert text == "a␛[31mb␇␍�"


@pytest.mark.parametrize("extra", [0, 1, 500])
def test_beginning_and_end_of_a_long_sequence_are_shown(byte_level, extra):
    ids = byte_level.encode("a") * (MAX_SHOWN_TOKENS + extra - 1) + byte_level.encode("z")
    found = text_spans(byte_level, ids)
    shown = "".join(span.text for span in found if span.role != "gap")
    assert len(shown) == MAX_SHOWN_TOKENS and shown.endswith("z")
    assert [span.text for span in found if span.role == "gap"] == (
        [f" … {extra:,} tokens … "] if extra else []
    )
