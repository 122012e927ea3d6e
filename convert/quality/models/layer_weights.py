"""The weights of a decoder's linear layers, in memory for one decoder layer at a time."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from convert.errors import OutputUnwritable
from convert.inputs.base_model import BaseModel, Linear
from convert.quantization.format import QuantizationFormat

if TYPE_CHECKING:
    import torch

# A model whose layers together are not larger than this in float32 keeps them all once they are read.
CACHED_BYTES = 1 << 30

ReadWeight = Callable[[Linear], "torch.Tensor"]
"""The float32 weight (out, in) of a linear layer."""


def weights_as_trained(base: BaseModel, quantizer: QuantizationFormat | None, *, read_again: bool) -> ReadWeight:
    """The weights that an adapter was trained against. `read_again`: each is quantized once, however often it is read.

    Quantizing 3 billion weights takes minutes, reading their codes seconds.
    """
    if quantizer and read_again and base.quantization_format is None:
        return _StoredCodes(base, quantizer)
    return lambda linear: base.read_as_trained(linear, quantizer)


def placeholder(shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 tensor of the shape, of zeros that all lie at one place in memory."""
    import torch

    return torch.zeros(()).expand(shape)


class LayerWeights:
    """For each decoder layer its linear layers, with the parameter that holds the weight of each while it is loaded."""

    def __init__(self, layers: Sequence[Sequence[tuple[Any, Linear]]], read: ReadWeight) -> None:
        self._layers = layers
        self._read = read
        self._stay = 4 * sum(p.numel() for layer in layers for p, _ in layer) <= CACHED_BYTES
        self._loaded: set[int] = set()
        self._buffers: dict[tuple[int, ...], list[torch.Tensor]] = {}

    @contextmanager
    def loaded(self, layer: int) -> Iterator[None]:
        """While the context lasts, the layer has its weights."""
        self._load(layer)
        try:
            yield
        finally:
            self._leave(layer)

    @contextmanager
    def on_demand(self, modules: Sequence[Any]) -> Iterator[None]:
        """While the context lasts, every layer of `modules` has its weights whenever it runs."""
        hooks = []
        for number, module in enumerate(modules):
            hooks.append(module.register_forward_pre_hook(lambda *_, layer=number: self._load(layer)))
            hooks.append(module.register_forward_hook(lambda *_, layer=number: self._leave(layer), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def release(self) -> None:
        """Free the layers that stayed in memory. They are read again when they are needed."""
        for layer in list(self._loaded):
            self._free(layer)
        self._buffers.clear()

    def _load(self, layer: int) -> None:
        if layer not in self._loaded:
            for parameter, linear in self._layers[layer]:
                parameter.data = self._buffer(linear.shape).copy_(self._read(linear))
            self._loaded.add(layer)

    def _buffer(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory of a layer that was freed: what lives as long as a layer is not allocated among what doesn't."""
        import torch

        free = self._buffers.get(shape)
        return free.pop() if free else torch.empty(shape)

    def _leave(self, layer: int) -> None:
        if not self._stay:
            self._free(layer)

    def _free(self, layer: int) -> None:
        for parameter, linear in self._layers[layer]:
            self._buffers.setdefault(linear.shape, []).append(parameter.data)
            parameter.data = placeholder(linear.shape)
        self._loaded.discard(layer)


class _StoredCodes:
    """Weights quantized when they are first read. Their codes are in a file, which goes with the process."""

    def __init__(self, base: BaseModel, quantizer: QuantizationFormat) -> None:
        self._base, self._quantizer = base, quantizer
        self._file = tempfile.TemporaryFile(prefix="graft-")  # noqa: SIM115
        self._places: dict[str, tuple[int, int]] = {}

    def __call__(self, linear: Linear) -> torch.Tensor:
        import torch

        if linear.module not in self._places:
            self._store(linear)
        offset, length = self._places[linear.module]
        self._file.seek(offset)
        parts = torch.load(io.BytesIO(self._file.read(length)), weights_only=True)
        return self._quantizer.dequantize(linear.module, parts)

    def _store(self, linear: Linear) -> None:
        import torch

        content = io.BytesIO()
        torch.save(self._quantizer.quantize(linear.module, self._base.read_for_quantizing(linear)), content)
        offset = self._file.seek(0, io.SEEK_END)
        try:
            self._file.write(content.getbuffer())
            self._file.flush()
        except OSError as cause:
            raise OutputUnwritable(
                f"{tempfile.gettempdir()} has no room for the quantized weights of the base ({cause}). "
                "Free some, or set TMPDIR to a larger disk."
            ) from cause
        self._places[linear.module] = (offset, content.getbuffer().nbytes)
