"""Install one layer of an image: some packages of a lock, below a directory that is copied to / as it is.

    packages.py torch|convert|serve|tools|quantizers --lock cpu|cuda|quantize --root /layers/torch

`torch` is that package alone, `convert` the others that convert.txt names, `serve` what is left of the lock without
dev.txt. `tools` is what builds Graft's wheel and lists what is in an image (tools.txt); no image holds it.
`quantizers` is all of its lock, in a directory of its own. Modules are compiled here, because a container with a
read-only root never could.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "environment"))

# Beside it, not a package.
from create import Pip, check_torch, install_torch  # noqa: E402
from locks import ENVIRONMENT, SetUpError, normalized, read_lock  # noqa: E402

LAYERS = ("torch", "convert", "serve")
OTHERS = ("tools", "quantizers")


class LayerPip(Pip):
    """pip of the environment at sys.prefix, writing below `root` what belongs there: into the environment, or into a
    directory of its own."""

    def __init__(self, root: Path, directory: str | None = None) -> None:
        super().__init__(Path(sys.executable))
        where = f"{root}{sys.prefix}"
        in_environment = ["--ignore-installed", "--prefix", where]
        self._install += ["--target", f"{where}/{directory}"] if directory else in_environment


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


def pins_of(layer: str, lock: str) -> list[str]:
    pins = read_lock(ENVIRONMENT / f"{lock}.lock")
    if layer == "quantizers":
        return pins
    if layer == "tools":
        return [pin for pin in pins if normalized(pin.partition("==")[0]) in names("tools")]
    return [pin for pin in pins if layer_of(pin) == layer]


def install(layer: str, lock: str, root: Path) -> None:
    pins = pins_of(layer, lock)
    pip = LayerPip(root, layer if layer == "quantizers" else None)
    if layer == "torch" and lock == "cpu":
        install_torch(pip, pins[0])
    else:
        pip.install(pip.locked(pins))
    if layer == "torch":
        check_torch(Path(f"{root}{sys.prefix}"), cpu_only=lock == "cpu")
    if layer != "tools":
        compile_modules(root)


def compile_modules(root: Path) -> None:
    """Never checked against their sources: those can't change. Files that are no Python (templates) are passed by."""
    options = ["-q", "-q", "-j", "0", "-s", str(root), "--invalidation-mode", "unchecked-hash"]
    subprocess.run([sys.executable, "-m", "compileall", *options, str(root)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install one layer of an image.")
    parser.add_argument("layer", choices=(*LAYERS, *OTHERS))
    parser.add_argument("--lock", default="cpu")
    parser.add_argument("--root", type=Path, required=True)
    options = parser.parse_args()
    try:
        install(options.layer, options.lock, options.root)
    except SetUpError as error:
        sys.exit(f"packages: {error}")


if __name__ == "__main__":
    main()
