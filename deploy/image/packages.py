"""Install one layer of an image: some packages of a lock, below a directory that is copied to / as it is.

    packages.py torch|convert|serve --lock cpu|cuda --root /layers/torch

`torch` is that package alone, `convert` the others that convert.txt names, `serve` what is left of the lock
without dev.txt. Modules are compiled here, because a container with a read-only root never could.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "environment"))

from create import ENVIRONMENT, Pip, SetUpError, install_torch, read_lock  # noqa: E402  (beside it, not a package)

LAYERS = ("torch", "convert", "serve")


class LayerPip(Pip):
    """pip of the environment at sys.prefix, writing below `root` what belongs there."""

    def __init__(self, root: Path) -> None:
        super().__init__(Path(sys.executable))
        self._install += ["--ignore-installed", "--prefix", f"{root}{sys.prefix}"]


def layer_of(pin: str) -> str | None:
    """The layer that a line of a lock belongs to; None for what no image holds."""
    name = normalized(pin.partition("==")[0])
    if name == "torch":
        return "torch"
    if name in names("convert"):
        return "convert"
    return None if name in names("dev") else "serve"


def names(listed: str) -> set[str]:
    lines = (HERE / f"{listed}.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install(layer: str, lock: str, root: Path) -> None:
    pins = [pin for pin in read_lock(ENVIRONMENT / f"{lock}.lock") if layer_of(pin) == layer]
    pip = LayerPip(root)
    if layer == "torch" and lock == "cpu":
        install_torch(pip, pins[0])
    else:
        pip.install(pins)
    compile_modules(root)


def compile_modules(root: Path) -> None:
    """Never checked against their sources: those can't change. Files that are no Python (templates) are passed by."""
    options = ["-q", "-q", "-j", "0", "-s", str(root), "--invalidation-mode", "unchecked-hash"]
    subprocess.run([sys.executable, "-m", "compileall", *options, str(root)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install one layer of an image.")
    parser.add_argument("layer", choices=LAYERS)
    parser.add_argument("--lock", default="cpu")
    parser.add_argument("--root", type=Path, required=True)
    options = parser.parse_args()
    try:
        install(options.layer, options.lock, options.root)
    except SetUpError as error:
        sys.exit(f"packages: {error}")


if __name__ == "__main__":
    main()
