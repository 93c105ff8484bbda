"""All lines, in the order in which they are run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpu_acceptance import goals, judge
from gpu_acceptance.lines import Line
from gpu_acceptance.scale import Model, Scale
from qpert.runtime.sessions.providers import PROVIDERS

LEVELS = ("tensor", "rank", "recall")
MEMORY_BASELINE = "memory-torch"
PREPARATION, PROVIDERS_HERE, ENGINES, PARITY, TESTS = "Bundles", "Providers", "Engines", "Parity", "Tests"
SPEED, SHARE, MEMORY, EVALUATION = "Speed", "The perturbation's share", "GPU memory", "Evaluation"
TESTS_LINE = "tests"
GRAPHS = ("vision", "image_query", "text", "itm")
"""Of BLIP-2; each is measured against PyTorch."""
COMPUTE_BOUND = ("vision", "itm")
"""Graphs that consist of large products, which can be held against the rate of one."""


def measure(program: str, *arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", f"gpu_acceptance.measure.{program}", *map(str, arguments))


def qpert(*arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "qpert.runtime.cli", *map(str, arguments), "--json")


def joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@dataclass(frozen=True)
class Plan:
    """The lines of one scale in one work folder."""

    scale: Scale
    work: Path

    def lines(self) -> Iterator[Line]:
        yield from self.bundles()
        for provider in self.scale.providers:
            yield Line(
                f"provider-{provider}",
                PROVIDERS_HERE,
                f"{provider} is installed and starts",
                measure("provider", provider),
                judge.started,
                goals.STARTS,
                minutes=10,
            )
        yield from self.engines()
        yield Line(
            TESTS_LINE, TESTS, "pytest -m gpu", measure("tests"), judge.tested, goals.TESTS, minutes=self.scale.minutes
        )
        for model in self.scale.models:
            for precision in self.scale.precisions:
                for provider in self.scale.providers:
                    yield from self.parity(model, precision, provider)
        yield self.torch_memory()
        for provider in self.scale.providers:
            yield from self.speed(provider)
            yield from self.costs(provider)

    def bundle(self, model: Model | str, precision: str) -> Path:
        return self.work / f"{model if isinstance(model, str) else model.name}-{precision}"

    def checkpoint(self, model: Model) -> Path:
        return self.work / f"{model.name}.pth"

    def bundles(self) -> Iterator[Line]:
        for model in self.scale.models:
            source: tuple[str, ...] = ("--checkpoint", model.name)
            needs: tuple[str, ...] = ()
            if model.random:
                file, words = self.checkpoint(model), self.work / f"{model.name}-vocabulary.txt"
                source, needs = ("--checkpoint", str(file), "--tokenizer", str(words)), (f"checkpoint-{model.name}",)
                title = f"checkpoint: {model.title}"
                command = measure("checkpoint", model.random, file, words)
                yield Line(
                    needs[0], PREPARATION, title, command, judge.ended_well, goals.ENDS_WELL, makes=file, minutes=30
                )
            for precision in self.scale.precisions:
                out = self.bundle(model, precision)
                options = (*source, "--precision", precision, *model.options, "--out", str(out), "--force")
                name, title = f"export-{out.name}", f"export: {model.title}, {precision}"
                command = qpert("export", "blip2", *options)
                yield Line(
                    name, PREPARATION, title, command, judge.ended_well, goals.ENDS_WELL, needs, out, self.scale.minutes
                )
                title = f"hashes: {model.title}, {precision}"
                command = qpert("inspect", out)
                yield Line(
                    f"inspect-{out.name}",
                    PREPARATION,
                    title,
                    command,
                    judge.inspected,
                    goals.FILES_WHOLE,
                    (name,),
                    minutes=30,
                )

    def engines(self) -> Iterator[Line]:
        """Of each bundle with each library of a provider, or of one that builds without a GPU."""
        for name in (*self.scale.providers, *self.scale.build_only):
            flavor = PROVIDERS[name].flavor
            for model in self.scale.models if flavor else ():
                for precision in self.scale.precisions:
                    bundle = self.bundle(model, precision)
                    options = ("--flavor", flavor, "--target", self.scale.engine_target)
                    yield Line(
                        f"engines-{bundle.name}-{name}",
                        ENGINES,
                        f"{name}: {model.title}, {precision}",
                        measure("engines", bundle, *options),
                        judge.engines,
                        goals.BUILT,
                        (f"inspect-{bundle.name}",),
                        bundle / "engines",
                        self.scale.minutes,
                    )

    def runs(self, bundle: Path, provider: str) -> tuple[str, ...]:
        """The lines without which a bundle cannot be run on a provider."""
        built = (f"engines-{bundle.name}-{provider}",) if PROVIDERS[provider].flavor else ()
        return (f"inspect-{bundle.name}", f"provider-{provider}", *built)

    def parity(self, model: Model, precision: str, provider: str) -> Iterator[Line]:
        bundle = self.bundle(model, precision)
        for level in LEVELS:
            options: tuple[str, ...] = ("--level", level, "--provider", provider)
            if level != "tensor":
                options += ("--reference", "torch")
                options += () if model.images is None else ("--limit", str(model.images))
                options += () if model.rerank is None else ("--rerank", str(model.rerank))
            yield Line(
                f"verify-{bundle.name}-{provider}-{level}",
                PARITY,
                f"{level}: {model.title}, {precision}, {provider}",
                qpert("verify", bundle, *options),
                judge.verified,
                goals.GATES,
                self.runs(bundle, provider),
                minutes=self.scale.minutes,
                exit_codes=(0, 1),
            )

    @property
    def measured(self) -> tuple[Model, Path]:
        """The model and bundle whose speed is measured."""
        name, precision = self.scale.measured
        (model,) = (model for model in self.scale.models if model.name == name)
        return model, self.bundle(model, precision)

    def torch_memory(self) -> Line:
        """What the providers' memory is compared with. On which of them it is run makes no difference to PyTorch."""
        model, bundle = self.measured
        options = ("--provider", self.scale.providers[0], "--boxes", "8", "--checkpoint", self.checkpoint(model))
        title, command = "PyTorch, SDPA: the baseline", measure("memory", bundle, *options)
        needs = (f"inspect-{bundle.name}",)
        return Line(MEMORY_BASELINE, MEMORY, title, command, judge.ended_well, goals.ENDS_WELL, needs, minutes=30)

    def speed(self, provider: str) -> Iterator[Line]:
        model, bundle = self.measured
        scale = self.scale
        for graph in GRAPHS:
            compiles = graph in scale.compiled
            batches = scale.texts if graph in ("text", "itm") else scale.batches
            options: tuple[str | Path, ...] = ("--provider", provider, "--graph", graph)
            options += ("--checkpoint", self.checkpoint(model), "--batches", joined(batches))
            options += ("--boxes", joined(scale.boxes)) if graph == "image_query" else ()
            options += ("--repeats", str(scale.repeats), "--seconds", str(scale.seconds))
            yield Line(
                f"speed-{provider}-{graph}",
                SPEED,
                f"{graph}: {model.title}, {scale.measured[1]}, {provider}",
                measure("speed", bundle, *options, *(("--compile",) if compiles else ())),
                judge.speed_judge(judged=scale.judged, compiles=compiles, peak=graph in COMPUTE_BOUND),
                goals.SPEED,
                self.runs(bundle, provider),
                minutes=scale.minutes,
            )

    def costs(self, provider: str) -> Iterator[Line]:
        model, bundle = self.measured
        scale, needs = self.scale, self.runs(bundle, provider)
        where = f"{model.title}, {scale.measured[1]}, {provider}"
        sizes: tuple[str, ...] = ("--batches", joined(scale.batches), "--boxes", joined(scale.boxes))
        sizes += ("--repeats", str(scale.repeats), "--seconds", str(scale.seconds))
        command = measure("share", bundle, "--provider", provider, *sizes)
        yield Line(
            f"share-{provider}",
            SHARE,
            where,
            command,
            partial(judge.shares, judged=scale.judged),
            goals.SHARE,
            needs,
            minutes=30,
        )
        command = measure("memory", bundle, "--provider", provider, "--boxes", "8")
        against = partial(judge.memory, baseline=MEMORY_BASELINE, judged=scale.judged)
        yield Line(f"memory-{provider}", MEMORY, where, command, against, goals.MEMORY, needs, minutes=30)
        command = measure("evaluation", bundle, "--provider", provider, "--images", str(scale.evaluated_images))
        evaluates = partial(judge.evaluation, judged=scale.judged)
        yield Line(
            f"evaluation-{provider}",
            EVALUATION,
            where,
            command,
            evaluates,
            goals.EVALUATION,
            needs,
            minutes=scale.minutes,
        )
