"""mmdiff: text to video and text to audio by diffusion. Importing it loads nothing heavy."""

__version__ = "0.1.0"
