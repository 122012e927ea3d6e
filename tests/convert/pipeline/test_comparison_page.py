from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from convert.artifact import Base, Canaries, Origin, Quality, Recovery, Retention
from convert.pipeline.comparison import Comparison, Row, comparison_document, comparison_page
from convert.pipeline.comparison.page import recommendation
from convert.pipeline.comparison.picture import FAILED, PASSED, trade_off
from convert.quality import Answer, Canary, ModelRetention
from convert.quality.retention import TensorRetention

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br"}
CANARY = Canary(({"role": "user", "content": "What is the code word?"},), "marmalade")


def quality(kl: float, **figures: Any) -> Quality:
    return Quality(
        reference="dequantized NF4 weights with the separate adapter, float32",
        text="chat.jsonl",
        tokens=1948,
        kl_mean=kl,
        kl_p99=10 * kl,
        top1_agreement=0.98,
        **figures,
    )


def row(label: str, kl: float, size: int = 270_000_000, **settings: Any) -> Row:
    figures = settings.pop("figures", {})
    return Row(
        label,
        f"python -m convert run c --base b --out {label}",
        "merge",
        "none",
        size,
        quality(kl, **figures),
        **settings,
    )


RETAINED = ModelRetention(
    tuple(TensorRetention(f"model.layers.{layer}.mlp.up_proj", 1 - layer / 10, 0.9) for layer in range(4))
)
ADAPTER = replace(
    row("4-bit base + adapter", 0.0, 135_000_000, chosen=True, decode_tokens_per_s=3.2),
    route="adapter",
    quantization="nf4-double",
    answers=(Answer(CANARY, "It is marmalade."),),
    quality=quality(0.0, gain_kept=1.0, canaries=Canaries(asked=1, passed=1)),
)
EXACT = row(
    "exact merge",
    0.00044,
    retained=RETAINED,
    decode_tokens_per_s=19.4,
    answers=(Answer(CANARY, "Marmalade!"),),
    figures={"retention": Retention(mean=0.85, least=0.7, least_module="model.layers.3.mlp.up_proj")},
    recovery=Recovery(rank=64, steps=60, kl_naive=1.1, kl_start=0.3, kl_recovered=0.02),
)
LOST = row("same grid", 1.25, failures=("KL 1.25 is above 0.05",), answers=(Answer(CANARY, "ZZZ"),))
ORIGIN = Origin(layout="ms-swift", training="qlora", evidence=("args.json: quant_bits=4",), digest="ab" * 32)
BASE = Base(source="acme/tiny-llama", revision="main", files={"model.safetensors": "cd" * 32})


def comparison(*rows: Row, **settings: Any) -> Comparison:
    return Comparison("zephyr", ORIGIN, BASE, rows, **settings)


WHOLE = comparison(ADAPTER, EXACT, LOST, answers=(Answer(CANARY, "marmalade"),), versions={"torch": "2.13.0"})


class Balanced(HTMLParser):
    """Fails on a tag that is not closed where it should be; collects what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def words(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<(style|svg)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)))


def pictures(page: str) -> list[str]:
    return re.findall(r"<svg\b.*?</svg>", page, re.DOTALL)


@pytest.fixture(scope="module")
def text_of_the_page() -> str:
    return words(comparison_page(WHOLE))


def test_the_page_is_whole_and_asks_for_nothing() -> None:
    page = comparison_page(WHOLE)
    parser = Balanced()
    parser.feed(page)

    assert parser.open == []
    assert [target for target in parser.asked if not target.startswith(("#", "data:"))] == []
    assert "<script" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def test_it_says_what_to_take_and_why_not_the_others() -> None:
    text = words(comparison_page(WHOLE))

    assert recommendation(WHOLE) in text
    assert recommendation(WHOLE) == (
        "Take 4-bit base + adapter: 135.0 MB, the same function as trained, 100.0% of the fine-tune's gain kept, "
        "1 of 1 canaries answered, 3.2 tokens/s."
    )
    assert "KL 1.25 is above 0.05" in text


def test_without_a_way_that_keeps_its_limits_nothing_is_recommended() -> None:
    assert "nothing is recommended" in words(comparison_page(comparison(LOST)))


@pytest.mark.parametrize(
    "figure",
    [
        "270.0 MB",
        "0.00044",
        "by construction",
        "least 0.700",
        "What is the code word?",
        "✗ same grid ZZZ",
        "✓ as trained marmalade",
        "0.3 with a low-rank fit of rank 64, 0.02 after 60 steps",
        "python -m convert run c --base b --out exact merge",
        "acme/tiny-llama at main",
        "cd" * 32,
        "ab" * 32,
        "args.json: quant_bits=4",
        "torch 2.13.0",
    ],
)
def test_every_figure_is_on_the_page(figure: str, text_of_the_page: str) -> None:
    assert figure in text_of_the_page


def test_what_comes_from_outside_is_escaped() -> None:
    evil = '</style><script>alert(1)</script><img src=x onerror="a">$&{}\\'
    canary = Canary(({"role": "user", "content": evil},), evil)
    each = replace(EXACT, label=evil, command=evil, failures=(evil,), chosen=True, answers=(Answer(canary, evil),))
    whole = Comparison(
        evil,
        Origin(layout=evil, training="lora", evidence=(evil,), digest="ab" * 32),
        Base(source=evil, revision=evil, files={"model.safetensors": "cd" * 32}),
        (replace(each, quality=each.quality.model_copy(update={"text": evil, "reference": evil})),),
        answers=(Answer(canary, evil),),
        versions={evil: evil},
    )
    page = comparison_page(whole)
    parser = Balanced()
    parser.feed(page)

    assert parser.open == []
    assert "<script" not in page
    assert "<img" not in page
    assert words(page).count(evil) >= 12


def test_pictures_are_valid_and_take_the_colour_of_the_page() -> None:
    svgs = pictures(comparison_page(WHOLE))

    assert len(svgs) == 2
    for text in svgs:
        assert ElementTree.fromstring(text).tag == f"{SVG}svg"
        assert "currentColor" in text
        assert "#010203" not in text
    ids = [name for text in svgs for name in re.findall(r' id="([^"]+)"', text)]
    assert len(ids) == len(set(ids))
    assert {name for text in svgs for name in re.findall(r'(?:href="|url\()#([^")]+)', text)} <= set(ids)


def test_a_point_is_drawn_for_each_way_in_the_colour_of_its_verdict() -> None:
    passed, failed = (trade_off([replace(ADAPTER, chosen=False, failures=failures)]) for failures in ((), ("x",)))

    assert (PASSED in passed, FAILED in passed) == (True, False)
    assert (PASSED in failed, FAILED in failed) == (False, True)
    assert trade_off([ADAPTER, EXACT, LOST]).count(PASSED) == 2


def test_a_comparison_of_unmeasured_speeds_without_canaries_or_merges_has_a_page() -> None:
    plain = replace(ADAPTER, decode_tokens_per_s=None, answers=(), quality=quality(0.0))
    page = comparison_page(Comparison("zephyr", ORIGIN, None, (plain,)))

    assert len(pictures(page)) == 1
    assert "Canaries" not in words(page)


def test_ten_ways_of_the_same_size_and_loss_are_still_drawn() -> None:
    rows = [
        replace(EXACT, label=f"way {number} with a name that is long enough to leave the picture")
        for number in range(10)
    ]

    assert ElementTree.fromstring(trade_off(rows)).tag == f"{SVG}svg"


def test_the_same_comparison_gives_the_same_page() -> None:
    assert comparison_page(WHOLE) == comparison_page(WHOLE)


def test_the_document_has_what_the_page_shows() -> None:
    document = json.loads(json.dumps(comparison_document(WHOLE), allow_nan=False))

    assert (document["schema"], document["chosen"]) == ("graft.comparison/1", "4-bit base + adapter")
    assert [each["passes"] for each in document["rows"]] == [True, True, False]
    exact = document["rows"][1]
    assert exact["retention_by_module"][3] == {
        "module": "model.layers.3.mlp.up_proj",
        "retention": pytest.approx(0.7),
        "signs": 0.9,
    }
    assert exact["recovery"]["kl_recovered"] == 0.02
    assert Quality.model_validate(exact["quality"]) == EXACT.quality
    assert document["answers_as_trained"][0]["passed"] is True
    assert document["rows"][2]["answers"][0]["passed"] is False
    assert document["base"]["source"] == "acme/tiny-llama"


def test_a_label_with_dollar_signs_is_no_formula() -> None:
    assert ElementTree.fromstring(trade_off([replace(EXACT, label=r"$\frac{$")])).tag == f"{SVG}svg"
