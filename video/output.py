"""Videos as `mmdiff generate` writes them."""

from mmdiff.generate_many import Output

from .commands import SHIPPED, write

OUTPUT = Output(3, SHIPPED, write)
