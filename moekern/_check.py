"""Argument checks: they raise, naming the op, the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def expect_dtype(op: str, name: str, value: Tensor, expected: str, condition: bool, *values: object) -> None:
    """`expected` is formatted with `values`, only on failure: a dtype's name takes 0.3 us to print."""
    if not condition:
        raise TypeError(f"{op}: {name} must be {expected.format(*values)}; got {value.dtype}")


def expect_shape(
    op: str, name: str, value: Tensor, letters: str, shape: Sequence[int | None], like: Tensor | None = None
) -> None:
    """Rank, sizes (None: any) and, given `like`, device. `letters` is the shape in the op's own legend."""
    sizes = value.shape
    fits = len(sizes) == len(shape)
    if fits:
        for got, want in zip(sizes, shape):  # noqa: B905  equally long; a loop, as this runs at every call
            if want is not None and got != want:
                fits = False
                break
    if not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        known = f" = [{wanted}]" if any(n is not None for n in shape) else ""
        raise ValueError(f"{op}: {name} must be {letters}{known}; got {list(sizes)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}; got {value.device}")


def expect_rows(op: str, name: str, value: Tensor) -> None:
    """The last dimension is contiguous; the others may have any stride."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{op}: the last dimension of {name} must be contiguous; got strides {value.stride()}"
        )
