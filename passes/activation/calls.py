"""What a large intermediate holds."""

from __future__ import annotations

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Match
from fxopt.ir.site import TemporaryInfo


def temporary_info(match: Match) -> TemporaryInfo:
    """The facts of a matched activation site."""
    info = match.site.info
    assert isinstance(info, TemporaryInfo)
    return info


def temporary_call(info: TemporaryInfo, rows: int, chunk: int | None = None) -> OpCall:
    """The intermediate of `rows` tokens, at most `chunk` at a time beside the result of all.

    The products that make and read it are priced at the linear sites; what stands here are its
    bytes and the launches of the passes after the first.
    """
    pieces = chunk is not None and chunk < rows
    size = chunk if pieces and chunk else rows
    passes = -(-rows // size) if rows else 1
    held = size * info.row_bytes + (rows * info.out_bytes if pieces else 0)
    return OpCall(
        op="temporary",
        key=f"temporary/{info.kind}/r{size}b{info.row_bytes}/{passes}",
        flops=0.0,
        bytes_read=0.0,
        bytes_written=0.0,
        temporary_bytes=held,
        launches=len(info.nodes) * (passes - 1),
    )
