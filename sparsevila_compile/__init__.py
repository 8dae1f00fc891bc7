"""Compile Hugging Face vision-language models into sparse, quantized ones."""

__version__ = "0.1.0"
