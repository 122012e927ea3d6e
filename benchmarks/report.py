"""`python -m benchmarks.report`: one page of everything that was measured, docs/report.md, from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Figure

PAGE = Path(__file__).parents[1] / "docs" / "report.md"
_PICTURES = "../benchmarks/results"


@dataclass(frozen=True)
class Section:
    """A result, what it is about, and which of its figures are worth a line; none named: all."""

    name: str
    title: str
    about: str
    shown: tuple[str, ...] = ()


SECTIONS = (
    Section(
        "convert",
        "Converting: a merge beside `cp` and PEFT",
        "A LoRA into a model of Llama-3.2-3B's shape. Ratios of speeds: 1 is the speed of copying the file with fsync, "
        "which is what the disk allows. `peft_…` is PEFT's load, merge and save of the same.",
    ),
    Section(
        "routes",
        "Converting: what each way keeps",
        "One QLoRA fine-tune of SmolLM2-135M: KL to the function as trained, in nats a token, on chats as it was tuned "
        "and on other text.",
        tuple(
            f"{way}_kl_{text}"
            for way in (
                *("adapter", "exact_float16", "exact_bfloat16", "rebase_64", "recover_64"),
                *("original_bfloat16", "original_nf4", "peft_nf4", "base"),
            )
            for text in ("chat", "other_text")
        ),
    ),
    Section(
        "swap",
        "Serving: a swap under load, beside vLLM's `load_inplace`",
        "Two engines that are asked without a pause while an adapter is republished. `bare_…` is the same with two of "
        "vLLM's own servers. Mixed or stale is an answer of no revision, or of one that was replaced before it was "
        "asked for.",
    ),
    Section(
        "gateway",
        "Serving: what the gateway costs, beside vLLM's own API server",
        "The same tiny model and arguments, each alone on the machine in turn, load from vLLM's serving benchmark. "
        "ray.serve.llm can't be installed beside this vLLM ([why](benchmarks.md)).",
    ),
    Section(
        "gateway_merged",
        "Serving: the same for a merged model",
        "Engines without adapters, which do the same work on both sides: what is left is the gateway alone.",
    ),
    Section(
        "gateway_real",
        "Serving: the same for a model that keeps its engine busy",
        "A fine-tune of SmolLM2-135M, merged and quantized to int8: what the gateway takes of a small but real model.",
    ),
    Section(
        "cpu_adapters",
        "Serving: adapters on a CPU, beside vLLM's own server",
        "Two fine-tunes of SmolLM2-135M over its 4-bit base: prompts of 600 tokens one at a time, then eight callers "
        "that ask again at once ([why](decisions/0014-adapters-on-a-cpu.md)).",
    ),
    Section(
        "chaos",
        "Breaking it: faults under load",
        "Every answer is compared with what its revision says; a failed request is one without an answer, and is "
        "counted by how it failed. See [faults](faults.md).",
    ),
    Section("soak", "Breaking it: half an hour of everything", "Growth is the last third over the one before it."),
    Section("hostile", "Breaking it: bad input", "Requests and damaged files that nobody should have to expect."),
    Section(
        "merge_or_not",
        "When to merge, when to keep apart",
        "A simulation fed with what was measured ([merge or not](merge-or-not.md)): GPUs for adapters that share a "
        "base, and for as many merged models.",
        tuple(
            f"slots_32_adapters_{count}_{what}"
            for count in (10, 100, 1000, 10000)
            for what in ("together_gpus", "apart_gpus", "cold", "wait_p99_ms")
        ),
    ),
)


def page(results: Path = RESULTS) -> str:
    """The whole page. A section without a result is left out."""
    found = [
        (section, json.loads(path.read_text()))
        for section in SECTIONS
        if (path := results / f"{section.name}.json").exists()
    ]
    lines = [
        "# Report",
        "",
        "What was measured, each by one command that anyone can run; written by `make report` from the data in",
        "[benchmarks/results](../benchmarks/results). A value is a median where there are several samples, with the",
        "smallest and the largest behind it. How each is measured: [benchmarks](benchmarks.md).",
    ]
    for section, document in found:
        lines += ["", *_section(section, document, results)]
    return "\n".join(lines) + "\n"


def _section(section: Section, document: Mapping[str, Any], results: Path) -> Iterator[str]:
    yield f"## {section.title}"
    yield ""
    yield section.about
    yield ""
    if (results / f"{section.name}.png").exists():
        yield f"![{section.title}]({_PICTURES}/{section.name}.png)"
        yield ""
    yield "| figure | value | from … to | unit | goal |"
    yield "|---|---|---|---|---|"
    for name, fields in document["figures"].items():
        if not section.shown or name in section.shown:
            yield _row(name, Figure(**{**fields, "spread": fields["spread"] and tuple(fields["spread"])}))
    if faults := document.get("faults"):
        yield ""
        yield from _faults(faults)
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    yield ""
    yield (
        f"`{document['command']}`, {document['date']}; {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {versions}."
    )


def _row(name: str, figure: Figure) -> str:
    spread = "" if figure.spread is None else f"{_number(figure.spread[0])} … {_number(figure.spread[1])}"
    goal = "" if figure.goal is None else f"{figure.goal}: {'met' if figure.meets_goal else '**missed**'}"
    return f"| {name.replace('_', ' ')} | {_number(figure.value)} | {spread} | {figure.unit} | {goal} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10_000 else f"{value:.3g}"


def _faults(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    yield "| fault | whole again after | requests | without an answer | how | alerts |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        outcomes = dict(row["outcomes"])
        answered = outcomes.pop("answered", 0)
        failed = sum(outcomes.values())
        how = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        alerts = ", ".join(row["alerts"])
        yield f"| {row['name']} | {row['recovery_s']:.1f} s | {answered + failed} | {failed} | {how} | {alerts} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written to {PAGE}")
