"""Weights that are in memory only while they are used: of a pipeline's stages, one after the other."""

from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from torch import nn


class Parked:
    """A module whose parameters lie in a file; inside `with` it has them, in float32 on its own device.

    file: model.safetensors of the module, or of one that holds it under `prefix`. Buffers stay in memory: they are few,
    and some are in no file. Making one takes the parameters out of memory; they must be those of the file.
    """

    def __init__(self, module: nn.Module, file: Path, prefix: str = "") -> None:
        self.file = file
        self.parameters = {prefix + name: parameter for name, parameter in module.named_parameters()}
        self.release()

    def __enter__(self) -> None:
        with safe_open(self.file, framework="pt") as stored:
            for name, parameter in self.parameters.items():  # a copy each: the file's own pages are not aligned
                parameter.data = stored.get_tensor(name).to(parameter.device, torch.float32, copy=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Takes the parameters out of memory; of each, a tensor without elements stays, which knows its device."""
        for parameter in self.parameters.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
