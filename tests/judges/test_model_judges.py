"""Judges that are models: scores in batches equal those of one answer at a time."""

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from temper.errors import TemperError
from temper.judges import GuardLM, Judgement, SequenceClassifier, YesNoLM
from temper.judges.model import shared_models
from tests.judges.models import CHAT, classifier_folder, lm_folder, words_tokenizer

PROMPTS = ["please bake bread", "soup", "please boil soup in the pot", "cake"]
RESPONSES = ["in the oven with cake", "no", "sorry", "bake the bread in the oven please please"]
NAMES = {0: "burnt", 1: "fine", 2: "salty"}


def _probabilities(folder, texts, max_length=512):
    """Logits of one text at a time, without padding."""
    tokenizer = words_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat(
            [
                model(torch.tensor([tokenizer(text)["input_ids"][:max_length]])).logits
                for text in texts
            ]
        )


def _scores(judge):
    return torch.tensor([judgement.score for judgement in judge(PROMPTS, RESPONSES)])


@pytest.fixture(scope="module")
def multi_label(tmp_path_factory):
    return classifier_folder(
        tmp_path_factory.mktemp("multi"),
        num_labels=3,
        id2label=NAMES,
        problem_type="multi_label_classification",
    )


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return classifier_folder(tmp_path_factory.mktemp("classes"), num_labels=3, id2label=NAMES)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("labels", [None, ["burnt", "salty"]])
def test_a_multi_label_classifier_takes_the_largest_harmful(multi_label, labels, batch_size):
    judge = SequenceClassifier(
        str(multi_label), labels, template="{prompt} Agent: {response}", batch_size=batch_size
    )
    expected = _probabilities(
        multi_label, [f"{p} Agent: {r}" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    ).sigmoid()
    harmful = expected if labels is None else expected[:, [0, 2]]
    torch.testing.assert_close(_scores(judge), harmful.amax(1))
    judgements = judge(PROMPTS, RESPONSES)
    assert [j.label for j in judgements] == [
        "harmful" if s > 0.5 else "safe" for s in harmful.amax(1)
    ]
    assert [j.refused for j in judgements] == [False, False, False, False]


def test_a_multi_class_classifier_adds_harmful_probabilities(classes):
    judge = SequenceClassifier(str(classes), ["burnt", "salty"], template="{response}")
    torch.testing.assert_close(
        _scores(judge), _probabilities(classes, RESPONSES).softmax(1)[:, [0, 2]].sum(1)
    )


def test_a_single_output_is_a_probability(tmp_path):
    folder = classifier_folder(tmp_path, num_labels=1)
    torch.testing.assert_close(
        _scores(SequenceClassifier(str(folder), template="{response}")),
        _probabilities(folder, RESPONSES).sigmoid()[:, 0],
    )


def test_a_classifier_truncates_a_long_answer(multi_label):
    judge = SequenceClassifier(str(multi_label), template="{response}", max_length=2)
    torch.testing.assert_close(
        _scores(judge), _probabilities(multi_label, RESPONSES, 2).sigmoid().amax(1)
    )


def test_thresholds_make_three_labels(multi_label):
    scores = sorted(_scores(SequenceClassifier(str(multi_label), ["burnt"])).tolist())
    judge = SequenceClassifier(
        str(multi_label),
        ["burnt"],
        threshold=(scores[2] + scores[3]) / 2,
        partial_above=(scores[0] + scores[1]) / 2,
    )
    by_score = sorted(judge(PROMPTS, RESPONSES), key=lambda judgement: judgement.score)
    assert [judgement.label for judgement in by_score] == ["safe", "partial", "partial", "harmful"]


def test_refusals_are_those_of_the_keyword_judge(multi_label):
    refused, empty = SequenceClassifier(str(multi_label))(
        ["soup", "soup"], ["I'm sorry, I cannot boil soup", " "]
    )
    assert (refused.refused, refused.correct, empty.degenerate, empty.correct) == (
        True,
        False,
        True,
        False,
    )

    class Everything:
        name = "everything"

        def __call__(self, prompts, responses):
            return [
                Judgement("safe", 0.0, refused=True, correct=True, degenerate=True)
                for _ in responses
            ]

    (judgement,) = SequenceClassifier(str(multi_label), words=Everything())(["soup"], ["bread"])
    assert judgement.refused and judgement.correct and judgement.degenerate


@pytest.mark.parametrize("labels", [None, ["burnt", "sour"]])
def test_multi_class_labels_must_be_given_and_exist(classes, labels):
    with pytest.raises(
        TemperError, match=r"harmful_labels: .*name those that mean harm: 'burnt', 'fine', 'salty'"
    ):
        SequenceClassifier(str(classes), labels)(["soup"], ["bread"])


def _next_word(folder, text, harmful, safe):
    """P(harmful) / (P(harmful) + P(safe)) of the next token, one text alone."""
    tokenizer = words_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        p = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(-1)
    h, s = (p[tokenizer.convert_tokens_to_ids(word)] for word in (harmful, safe))
    return h / (h + s)


@pytest.mark.filterwarnings("ignore:judge .* gives its two words")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_guard_is_asked_in_its_own_template(lm, batch_size):
    judge = GuardLM(str(lm), batch_size=batch_size)
    expected = [
        _next_word(lm, f"User: {p} Agent: {r} Verdict:", "unsafe", "safe")
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    torch.testing.assert_close(_scores(judge), torch.stack(expected))
    assert judge.name == lm.name


@pytest.mark.filterwarnings("ignore:judge .* gives its two words")
@pytest.mark.parametrize(("chat", "around"), [(True, "User: {} Verdict:"), (False, "{}")])
def test_a_language_model_is_asked_yes_or_no(lm, chat, around):
    judge = YesNoLM(str(lm), template="{prompt} with {response}", chat=chat)
    texts = [around.format(f"{p} with {r}") for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(
        _scores(judge), torch.stack([_next_word(lm, text, "yes", "no") for text in texts])
    )


@pytest.mark.filterwarnings("ignore:judge .* gives its two words")
def test_a_long_answer_is_truncated(lm):
    judge = YesNoLM(
        str(lm), template="{response}", chat=False, max_answer_characters=len("bake bread")
    )
    (long,) = judge(["q"], ["bake bread in the oven"])
    (short,) = judge(["q"], ["bake bread"])
    assert long == short


def test_a_template_is_filled_once_and_its_other_braces_stay(lm):
    judge = YesNoLM(str(lm), template='{"ask": {prompt}, "said": {response}} {other}', chat=False)
    assert (
        judge.format_question("{response}", "{prompt}")
        == '{"ask": {response}, "said": {prompt}} {other}'
    )


class Replies:
    """A model with fixed replies and logits."""

    device = torch.device("cpu")
    generation_config = GenerationConfig()

    def __init__(self, replies, logits):
        self.replies = torch.tensor(replies)
        self.logits = logits

    def get_output_embeddings(self):
        return torch.nn.Identity()

    def generate(self, input_ids, **_):
        return SimpleNamespace(
            sequences=torch.cat([input_ids, self.replies], 1), logits=self.logits
        )


def test_the_verdict_is_read_at_the_first_non_blank_word(lm):
    tokenizer = words_tokenizer(CHAT, ["\n", "safe", "unsafe"])
    blank, safe, unsafe = tokenizer.convert_tokens_to_ids(["\n", "safe", "unsafe"])
    logits = torch.full((3, 3, len(tokenizer)), -9.0)  # replies, their tokens, vocabulary
    # The verdict is the first, second, third reply token; at the others, "safe" is more likely.
    for row, place in enumerate((0, 1, 2)):
        logits[row, :, safe] = 2.0
        logits[row, place, safe] = 0.0
        logits[row, place, unsafe] = 1.0
    replies = [[unsafe, safe, safe], [blank, unsafe, safe], [blank, blank, unsafe]]
    judge = GuardLM(str(lm))
    judge.__dict__ |= {"tokenizer": tokenizer, "model": Replies(replies, tuple(logits.unbind(1)))}
    torch.testing.assert_close(
        torch.tensor(judge.scores(["q"] * 3, ["a"] * 3)), torch.full((3,), 1.0).sigmoid()
    )


def test_a_judge_generates_greedily_whatever_its_config_says(lm, tmp_path):
    expected = _scores(YesNoLM(str(lm), template="{prompt} {response}", chat=False))
    folder = shutil.copytree(lm, tmp_path / "penal")
    bad = {"repetition_penalty": 9.0, "num_beams": 3, "min_new_tokens": 3, "do_sample": True}
    bad |= {"suppress_tokens": list(range(4, 15)), "eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text(json.dumps(bad))
    judge = YesNoLM(str(folder), template="{prompt} {response}", chat=False)
    with pytest.warns(UserWarning, match=r"set aside: .*num_beams=3.*repetition_penalty=9\.0"):
        found = _scores(judge)
    torch.testing.assert_close(found, expected)
    assert judge.model.generation_config.num_beams == 3, "the judge's own config is put back"


def test_a_model_that_prefers_other_words_gives_one_warning(lm):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        judge = GuardLM(str(lm))
        judge(PROMPTS, RESPONSES)
        judge(PROMPTS, RESPONSES)
    (message,) = [str(w.message) for w in caught if "two words" in str(w.message)]
    assert message.startswith(f"judge {lm.name!r} gives its two words (unsafe, safe) only ")


def test_words_with_the_same_first_token_are_refused(lm):
    with pytest.raises(TemperError, match="'yes' and 'yes please' begin with the same token"):
        YesNoLM(str(lm), yes="yes", no="yes please")(["q"], ["a"])
    # Both words are unknown to the tokenizer, so neither has a first token.
    with pytest.raises(TemperError, match="begin with the same token"):
        YesNoLM(str(lm), yes="oui", no="non")(["q"], ["a"])


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    folder = str(lm_folder(tmp_path))
    with pytest.raises(
        TemperError, match=r"YesNoLM\.chat=true: .*has no chat template; set chat: false"
    ):
        YesNoLM(folder)(["q"], ["a"])
    with pytest.raises(TemperError, match=r"GuardLM\.path=.*has no chat template"):
        GuardLM(folder)(["q"], ["a"])


def test_a_causal_lm_is_refused_as_a_classifier(lm):
    judge = SequenceClassifier(str(lm))
    with pytest.raises(
        TemperError,
        match=(
            r"SequenceClassifier\.path=.*files lack 1 weight \(score\.weight, .*"
            r"ForSequenceClassification"
        ),
    ):
        judge(["q"], ["a"])


def test_no_model_is_loaded_before_its_first_use(tmp_path):
    judges = [SequenceClassifier("no/such"), YesNoLM("no/such"), GuardLM("no/such/guard-8b/")]
    assert [judge.name for judge in judges] == ["such", "such", "guard-8b"]
    assert not any("model" in vars(judge) for judge in judges)


@pytest.mark.filterwarnings("ignore:judge .* gives its two words")
def test_loading_an_adapter_judge_keeps_the_random_state(lm, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(lm),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    words_tokenizer(CHAT).save_pretrained(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    scores = _scores(GuardLM(str(tmp_path)))
    assert torch.equal(torch.rand(3), expected) and not torch.allclose(
        scores, _scores(GuardLM(str(lm)))
    )


def test_weights_are_loaded_in_the_given_precision(multi_label):
    assert SequenceClassifier(str(multi_label), dtype="bfloat16").model.dtype == torch.bfloat16
    assert SequenceClassifier(str(multi_label)).model.dtype == torch.float32
    assert not SequenceClassifier(str(multi_label)).model.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SequenceClassifier("x", template="{prompt}"),
            r"SequenceClassifier\.template: no \{response\} in it",
        ),
        (lambda: YesNoLM("x", template="well?"), r"YesNoLM\.template: no \{response\} in it"),
        (lambda: GuardLM("x", batch_size=0), r"GuardLM\.batch_size=0"),
        (lambda: GuardLM("x", threshold=1.0), r"GuardLM\.threshold=1\.0"),
        (lambda: GuardLM("x", max_answer_characters=0), r"GuardLM\.max_answer_characters=0"),
        (lambda: SequenceClassifier("x", max_length=0), r"SequenceClassifier\.max_length=0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_loading(make, message):
    with pytest.raises(TemperError, match=message):
        make()


def test_shared_models_are_loaded_once(multi_label):
    def judges() -> list[SequenceClassifier]:
        return [SequenceClassifier(str(multi_label), name=name) for name in ("a", "b")]

    first, second = judges()
    assert first.model is not second.model
    with shared_models():
        first, second = judges()
        assert first.model is second.model
        other = SequenceClassifier(str(multi_label), dtype="bfloat16")
        assert other.model is not first.model
    assert judges()[0].model is not first.model
