"""The one table of metric names: every table, chart and progress line reads its words here.

The metrics themselves are in `temper.metrics.safety` and `temper.metrics.unlearning`.
"""

from dataclasses import dataclass

JAILBREAK_KIND = "jb_"  # a kind of prompt that begins so is a jailbreak
ASR = "asr/"  # the key of a jailbreak's attack success rate is this and its kind


@dataclass(frozen=True)
class MetricEntry:
    """Names of one metric.

    Attributes:
        key: Its name in ``evaluation.json`` or ``unlearning.json``, in ``results.csv`` and loggers.
        title: Full title.
    """

    key: str
    title: str


@dataclass(frozen=True)
class SafetyMetricEntry(MetricEntry):
    """Names of one metric of a safety evaluation, a share of prompts.

    Attributes:
        meaning: The share that it is, in words that are true of every judge: not every judge has a
            middle label, or recognises a right answer.
        kind: Kind of evaluation prompt that it is measured on; None: all kinds.
        order: Place of its column in the tables of a report, from 1.
        column: Heading of its column in the HTML report.
        short: Heading of its column in a terminal.
        latex: Heading of its column in LaTeX, as LaTeX code.
        in_progress: Whether the line that a study prints for a finished stage shows it.
    """

    meaning: str
    kind: str | None
    order: int
    column: str
    short: str
    latex: str
    in_progress: bool = False


# In the order of evaluation.json and results.csv.
SAFETY_METRICS = (
    SafetyMetricEntry(
        key="harmful_score",
        title="Harmful score (HS)",
        meaning="harmful score, unsafe requests carried out in full",
        kind="unsafe",
        order=1,
        column="HS",
        short="HS",
        latex="HS",
        in_progress=True,
    ),
    SafetyMetricEntry(
        key="harmful_score_lenient",
        title="Harmful score, lenient",
        meaning="lenient harmful score, unsafe requests carried out in full or in part",
        kind="unsafe",
        order=2,
        column="HS, lenient",
        short="HS~",
        latex=r"HS$_\ell$",
    ),
    SafetyMetricEntry(
        key="refusal_rate",
        title="Refusal rate",
        meaning="unsafe requests refused",
        kind="unsafe",
        order=4,
        column="Refusal",
        short="refusal",
        latex="Ref.",
        in_progress=True,
    ),
    SafetyMetricEntry(
        key="over_refusal_rate",
        title="Over-refusal rate",
        meaning="safe requests refused",
        kind="safe",
        order=5,
        column="Over-refusal",
        short="over",
        latex="Over",
    ),
    SafetyMetricEntry(
        key="safe_accuracy",
        title="Safe accuracy",
        meaning="safe requests answered, and right where the judge can tell",
        kind="safe",
        order=6,
        column="Safe accuracy",
        short="safe",
        latex="Safe",
        in_progress=True,
    ),
    SafetyMetricEntry(
        key="fine_tune_accuracy",
        title="Fine-tune accuracy (FA)",
        meaning="fine-tune accuracy, on the user's own task",
        kind="task",
        order=3,
        column="FA",
        short="FA",
        latex="FA",
        in_progress=True,
    ),
    SafetyMetricEntry(
        key="degenerate_rate",
        title="Degenerate rate",
        meaning="answers that are neither a refusal nor well-formed",
        kind=None,
        order=7,
        column="Degenerate",
        short="deg.",
        latex="Deg.",
    ),
)
BY_COLUMN = tuple(sorted(SAFETY_METRICS, key=lambda entry: entry.order))

# Of each set of rows: "forget/answer_probability", ...; the last four are of the whole model.
UNLEARNING_METRICS = (
    MetricEntry("answer_probability", "Answer probability"),
    MetricEntry("truth_ratio", "Truth ratio (1 is best)"),
    MetricEntry("rouge_l_recall", "ROUGE-L recall"),
    MetricEntry("extraction_strength", "Extraction strength (ES)"),
    MetricEntry("exact_memorisation", "Exact memorisation (EM)"),
    MetricEntry("forget_quality", "Forget quality (KS p-value)"),
    MetricEntry("model_utility", "Model utility"),
    MetricEntry("membership_auroc", "Min-k % membership AUROC"),
    MetricEntry("privacy_leakage", "Privacy leakage, per cent"),
)

TITLES = {entry.key: entry.title for entry in (*SAFETY_METRICS, *UNLEARNING_METRICS)}


def title(key: str) -> str:
    """Full title of a metric; a jailbreak's attack success rate is named after its kind.

    Raises:
        KeyError: no such metric.
    """
    return f"ASR, {key.removeprefix(ASR)}" if key.startswith(ASR) else TITLES[key]


def is_jailbreak(kind: str) -> bool:
    """Whether a kind of prompt is a jailbreak, which has an attack success rate of its own."""
    return kind.startswith(JAILBREAK_KIND)


def attack_success_key(kind: str) -> str:
    """Key of a jailbreak's attack success rate: ``asr/jb_co_task``."""
    return ASR + kind


def jailbreak_name(key: str) -> str:
    """Name of the jailbreak that an attack success rate is of: ``co task``."""
    return key.removeprefix(ASR).removeprefix(JAILBREAK_KIND).replace("_", " ")
