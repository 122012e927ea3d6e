"""What the author of a checkpoint or base can make the libraries compute is limited: patterns, templates, names."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.cli.app import app
from convert.errors import BaseUnreadable, CheckpointUnreadable, CheckpointUnsupported, one_for_each_cause
from convert.inputs import patterns
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat import tokenizer
from convert.inputs.chat.tokenizer import Tokenizer
from convert.inputs.limits import TimeLimitExceeded, memory_limit, time_limit
from tests.convert import parts
from tests.convert.asking import Request, convert

# On the path of a module this backtracks for longer than the universe is old.
SLOW = r"(.+)+(\w+.?)+(\w*)*[^\w.]"
DEFAULT_S = patterns._MAX_S


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MAX_S", 0.3)
    monkeypatch.setattr(tokenizer, "_MAX_RENDER_S", 0.3)
    monkeypatch.setattr(tokenizer, "_MAX_RENDER_BYTES", 64 << 20)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A hang would take the whole suite: the system's own alarm ends the process."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 200)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.mark.parametrize(
    "setting",
    [
        {"rank_pattern": {SLOW: 8}},
        {"alpha_pattern": {"q_proj": 16, SLOW: 8}},
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"layers_pattern": [SLOW], "layers_to_transform": [0]},
        {"modules_to_save": [SLOW]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_pattern_that_backtracks_without_end_is_refused_by_its_setting(
    lora: Path, base: Path, tmp_path: Path, setting: dict[str, object]
) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    parts.edit_json(copied / "adapter_config.json", **setting)

    result = CliRunner().invoke(app, ["plan", str(copied), "--base", str(base)])

    assert "error[checkpoint_unsupported]: " in result.stderr
    assert f"{next(iter(setting))} of adapter_config.json, pattern " in result.stderr
    assert "takes more than 0.3 s of computing" in result.stderr


def test_a_pattern_that_is_slow_on_other_modules_alone_is_refused_before_peft_matches_it(
    lora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    slow_on_norms = r".*_proj|(?=.*norm)(.+)+(\w+.?)+(\w*)*[^\w.]"
    parts.edit_json(copied / "adapter_config.json", target_modules=slow_on_norms)
    Checkpoint.open(copied).require_supported()

    with pytest.raises(CheckpointUnsupported, match=r"target_modules of adapter_config\.json, pattern"):
        convert(Request(copied, base, out, route="merge", quantize="none"))


def test_the_patterns_of_trainers_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As unsloth and ms-swift write target_modules, and PEFT a rank for each of the modules, of 126 layers."""
    monkeypatch.setattr(patterns, "_MAX_S", DEFAULT_S)
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|correlation|projection|proj|linear)"
        r".*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    )
    swift = r"^(language_model(?=\.).*\.(gate_proj|o_proj|down_proj|q_proj|up_proj|k_proj|v_proj))$"
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(126) for name in parts.LINEARS]

    for pattern in (unsloth, swift):
        patterns.require_quick({"target_modules": pattern}, paths)
    patterns.require_quick({"rank_pattern": dict.fromkeys(paths, 8), "alpha_pattern": dict.fromkeys(paths, 8)}, paths)


TEMPLATES: dict[str, str] = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    "computes": "{{ 10 ** (10 ** 9) }}",
    "fills the memory": "{% set x = 'a' * 10 ** 10 %}{{ messages[0]['content'] }}",
    "writes much": "{{ 'ab' * 1000000 }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_template_that_would_hold_up_a_server_is_refused(
    lora: Path, base: Path, tmp_path: Path, out: Path, what: str, command: str
) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    parts.save_tokenizer(copied, template=None)
    (copied / "chat_template.jinja").write_text(TEMPLATES[what])
    options = ["--out", str(out)] if command == "run" else []

    result = CliRunner().invoke(app, [command, str(copied), "--base", str(base), *options])

    assert "error[base_unreadable]: The model's chat template takes " in result.stderr
    assert not out.exists()


def test_a_long_chat_is_rendered(base: Path) -> None:
    opened = Tokenizer.open(base)
    chat = [{"role": "user", "content": "the rain in spain " * 100_000}, {"role": "assistant", "content": ""}] * 3

    assert len(opened.render(chat, prompt=True)) > 5_000_000


def test_a_tokenizer_whose_pattern_gives_up_at_a_text_is_an_error_that_names_it(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "base")
    path = copied / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    opened = Tokenizer.open(copied)

    with pytest.raises(BaseUnreadable, match=r"The tokenizer fails at a text: .*retry-limit"):
        opened.ids("a" * 40 + "b")


@pytest.mark.parametrize("of", ["checkpoint", "base"])
def test_a_tensor_with_a_very_long_name_is_refused(lora: Path, base: Path, tmp_path: Path, of: str) -> None:
    copied = parts.copy(lora if of == "checkpoint" else base, tmp_path / of)
    name = "adapter_model" if of == "checkpoint" else "model"
    path = copied / f"{name}.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first = next(iter(name for name in header if name != "__metadata__"))
    renamed = json.dumps({("model." * 100_000 if key == first else key): value for key, value in header.items()})
    rest = content[8 + int.from_bytes(content[:8], "little") :]
    path.write_bytes(len(renamed).to_bytes(8, "little") + renamed.encode() + rest)

    with pytest.raises((CheckpointUnreadable, BaseUnreadable), match="a name has 600000 characters, more than 500"):
        Checkpoint.open(copied) if of == "checkpoint" else BaseModel.open(copied)


CARDS: dict[str, tuple[str, str]] = {
    "README.md": ("```yaml\nx", "x"),
    "README.md, PEFT": ("The following `bitsandbytes` quantization config was used during training:", "\n"),
    "torchtune_config.yaml": ("model:", "\n"),
}


@pytest.mark.parametrize("what", CARDS)
def test_a_trainers_file_of_many_lines_is_read_in_no_time(lora: Path, tmp_path: Path, what: str) -> None:
    copied = parts.copy(lora, tmp_path / "checkpoint")
    begin, more = CARDS[what]
    text = begin * 400_000 if more == "x" else begin + more * 3_000_000
    (copied / what.partition(",")[0]).write_text(text)

    with time_limit(60):
        result = CliRunner().invoke(app, ["inspect", str(copied)], catch_exceptions=False)

    assert result.exit_code == 0


def test_problems_that_quote_long_texts_are_grouped_in_no_time() -> None:
    text = "layers." * 100_000
    problems = [f"{text}: model.layers.{number}.q_proj is spoilt" for number in range(2)]

    with time_limit(20):
        grouped = one_for_each_cause(problems)

    assert grouped == (f"{problems[0]} (the same in 1 more places)",)


def loop() -> None:
    while True:
        pass


def loop_over_errors() -> None:
    while True:
        with contextlib.suppress(Exception):
            loop()


@pytest.mark.parametrize("work", [loop, loop_over_errors, lambda: 10 ** (10**9)], ids=["loop", "errors", "number"])
def test_work_is_ended_when_it_has_computed_for_the_limit(work: Callable[[], object]) -> None:
    begun = time.thread_time()
    with pytest.raises(TimeLimitExceeded, match=r"more than 0\.2 s of computing"), time_limit(0.2):
        work()

    assert time.thread_time() - begun >= 0.2


def test_waiting_does_not_count_and_an_outer_alarm_stays() -> None:
    rung: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with time_limit(0.05):
            time.sleep(0.5)
        time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    assert rung == [1]


def test_memory_beyond_the_limit_is_refused_and_the_limit_ends() -> None:
    with pytest.raises(MemoryError), memory_limit(64 << 20):
        bytearray(256 << 20)

    assert len(bytearray(256 << 20)) == 256 << 20


@pytest.mark.parametrize("of", ["checkpoint", "base"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config", "chat_template.jinja"])
def test_a_file_too_large_to_be_read_into_memory_is_refused_by_its_size(
    lora: Path, base: Path, tmp_path: Path, name: str, of: str
) -> None:
    checkpoint, own_base = tmp_path / "checkpoint", tmp_path / "base"
    shutil.copytree(lora, checkpoint)
    shutil.copytree(base, own_base)
    shutil.copy(base / "tokenizer.json", checkpoint / "tokenizer.json")
    shutil.copy(base / "tokenizer_config.json", checkpoint / "tokenizer_config.json")
    root = checkpoint if of == "checkpoint" else own_base
    if name != "config":
        # A template or tokenizer of the base counts only where the checkpoint has none.
        for other in checkpoint.glob("*token*" if of == "base" else "no file"):
            other.unlink()
    path = root / {"config": {"checkpoint": "adapter_config.json", "base": "config.json"}[of]}.get(name, name)
    with path.open("a") as file:
        file.truncate(65 << 20)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = CliRunner().invoke(app, ["plan", str(checkpoint), "--base", str(own_base)])

    assert result.exit_code != 0
    assert f"{path.name} is 65 MiB large; a file of this name is read up to 64 MiB" in " ".join(result.output.split())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
