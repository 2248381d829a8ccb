"""Triton's interpreter, without work that it does again and again."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def patched_once_a_launch() -> Iterator[None]:
    """At each call of a function in a kernel, the interpreter looks through all of `triton.language` for what it has to
    replace, which took a third of its time. What a module's functions see is replaced since the first of them."""
    from triton.runtime import interpreter

    run, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def launch(executor: Any, *args: Any, **settings: Any) -> None:
        patched.clear()  # at the end of a launch all is put back
        run(executor, *args, **settings)

    def patch_first(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch_lang(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(interpreter, "_patch_lang", patch_first)
        yield
