"""Sounds as `mmdiff generate` writes them: wav files."""

from mmdiff.generate_many import Output

from .commands import SHIPPED, write

OUTPUT = Output(1, SHIPPED, write)
