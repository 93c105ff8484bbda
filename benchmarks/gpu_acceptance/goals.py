"""Every goal, and where it comes from: the issue that states it, or the reason of one that is set here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """`at_most`: whether the limit is the largest allowed value, or the smallest. limit None: it depends on the run."""

    what: str
    limit: float | None
    unit: str
    why: str
    at_most: bool = True

    def holds(self, value: float, limit: float | None = None) -> bool:
        """Whether a figure reaches the goal; False for NaN."""
        against = self.limit if limit is None else limit
        if against is None:
            raise ValueError(f"the goal {self.what!r} needs the limit of this run")
        return value <= against if self.at_most else value >= against

    def text(self, limit: float | None = None) -> str:
        """`at most 2 %`."""
        against = self.limit if limit is None else limit
        if against is None:
            return "a limit that the run gives"
        unit = f" {self.unit}" if self.unit else ""
        return f"{'at most' if self.at_most else 'at least'} {against:.4g}{unit}"


ENDS_WELL = Goal("the command's exit code", 0, "", "Anything else is a failure of the command.")
STARTS = Goal("providers that start", 1, "", "What is installed has to start: product.md, ground rules.", at_most=False)
FILES_WHOLE = Goal("files that differ from their hash", 0, "", "product.md: hashes are always checked by `inspect`.")
BUILT = Goal(
    "graphs without an engine", 0, "", "Issue 6: every graph is built, and a build that gives nothing is an error."
)
GATES = Goal(
    "gates that fail",
    0,
    "",
    "product.md: a check that can fail makes the process fail. The limits of the gates are those of `qpert verify`, "
    "with their reasons in runtime/verification/tolerances.py.",
)
TESTS = Goal("tests that fail", 0, "", "Issue 6: GPU tests run on each provider that is there.")
SPEED = Goal(
    "times as fast",
    1.0,
    "×",
    "Own goal. Issue 6 asks for the comparison and states no ratio; below 1 the export would be slower than the "
    "program that it replaces, at the same precision on the same GPU.",
    at_most=False,
)
HALF_OF_PEAK = Goal(
    "share of a dense product's rate",
    0.5,
    "",
    "Facts in tensorrt.md: ViT-g at 550 images a second is the ceiling of an H200 (1.44 TFLOP each at 790 TFLOP/s), "
    "and the pair stage does 40,000 pairs a second at half of that rate. Half of what a large product reaches on this "
    "very GPU says the same for any.",
    at_most=False,
)
SHARE = Goal(
    "what boxes add, of image encoding",
    2.0,
    "%",
    "Issue 21, point 5: at most 2 % with 8 boxes at BLIP-2's size, everywhere. Issue 8 stated it first.",
)
SHARE_MANY = Goal(
    "what boxes add, of image encoding",
    8.0,
    "%",
    "Own goal: the work is proportional to the boxes, so four times the 2 % of 8 boxes.",
)
MEMORY = Goal(
    "GPU memory, of PyTorch's for the same work",
    1.5,
    "×",
    "Own goal. Three graphs hold a copy each of the Q-Former (0.3 GB in fp16), which makes 3.0 GB of PyTorch's 2.4; "
    "the rest is for working memory. An application that fits with PyTorch has to fit here.",
)
EVALUATION = Goal(
    "seconds for all images, texts and pairs",
    None,
    "s",
    "The same half of a dense product's rate, for all the work of the data set: the limit is its FLOPs at that rate.",
)


def share_goal(boxes: int) -> Goal:
    """The limit is stated for 8 boxes; fewer have to keep it too."""
    return SHARE if boxes <= 8 else SHARE_MANY
