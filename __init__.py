"""Ramet: an LLM serving engine that speaks the OpenAI API.

This module stays light: importing `ramet` imports neither torch nor any worker.
"""

__version__ = "0.1.0"
