"""What a call of the packed decoding kernel launches, as measured on Hopper."""

from __future__ import annotations

from fxopt.kernels.kv_attention.layout import Blocks
from fxopt.kernels.kv_attention.packing import width

# What a multiprocessor of an H100 holds: bytes of shared memory, and warps of 255 registers.
SHARED, WARPS = 228 * 1024, 8
MOST_SPLITS = 127
# Estimates, not measured: blocks that a program reads in the time of the tokens that are stored
# exactly, and the shares of these from which on the longest is no shorter.
LONG, MOST_EXACT = 4, 4
# Where blocks are so few that each is read by a program of its own: warps of it, which are there
# anyway, tokens that are stored exactly, read at a time, and programs a multiprocessor up to which
# that was measured to be faster. Triton multiplies tiles of more rows by another instruction with
# four warps, and fails to compile that.
FEW_WARPS, FEW_TILE, FEW_ROWS, FEW_PROGRAMS = 4, 32, 4, 2.25


def few(fmt: Blocks, heads: int, blocks: int, rows: int, count: int) -> bool:
    """Whether `count` multiprocessors run a program of `FEW_WARPS` for each of the `blocks` of each
    KV head about at a time, and those of the exact tokens: then how long one takes is all that
    counts. With 2 bits on a side four warps took 1.5 times as long as one."""
    programs = heads * (blocks + MOST_EXACT)
    wide = 2 not in (fmt.key_bits, fmt.value_bits)
    return wide and rows <= FEW_ROWS and programs <= FEW_PROGRAMS * count


def warps(fmt: Blocks, rows: int) -> int:
    """One, for up to four query rows: two that exchange planes of 4-bit keys took 3.6 times as
    long. Keys of 8 bits have one plane, and spill in one warp, which took twice as long; so do
    more rows (1.4 times as long with 8 of them, 1.8 with 16)."""
    return 2 if width(fmt.key_bits) == 8 or rows > 4 else 1


def exact_tile(fmt: Blocks) -> int:
    """Tokens that are stored exactly, read at a time. 32 took 3 % less than 16 of the whole with
    8 bits, as much with 4 and a quarter more with 2, where programs are smaller without them."""
    return 16 if 2 in (fmt.key_bits, fmt.value_bits) else 32


def at_once(fmt: Blocks, dim: int, value_dim: int, num_warps: int, num_stages: int) -> int:
    """Programs that one multiprocessor runs at a time."""
    stored = fmt.group * (dim * width(fmt.key_bits) + value_dim * width(fmt.value_bits)) // 8
    # Scales, what tiles are exchanged through, and what the driver takes, as compiled.
    held = (num_stages - 1) * stored + 4096
    return max(1, min(WARPS // num_warps, SHARED // held))


def exact_shares(tiles: int, blocks: int, splits: int, places: int) -> int:
    """Shares of the `tiles` of what is stored exactly, where a KV head has `places`: one, unless
    each of the `splits` has so few of its blocks that it would be the last to end."""
    if blocks > LONG * splits:
        return 1
    return max(1, min(MOST_EXACT, tiles, places - splits))


def splits(heads: int, blocks: int, at_once: int, count: int) -> int:
    """Shares of the blocks of one KV head on `count` multiprocessors; one more is of what is
    stored exactly.

    All run at a time, but shares of under 16 blocks are no gain beyond four programs a
    multiprocessor. Where that makes fewer than four, heads are so many that whole waves are
    fuller: the least waves that leave the fewest places empty.
    """
    places = at_once * count
    shares = places // heads - 1
    if shares >= 4:
        shares = min(shares, max(4 * count // heads, blocks // 16))
    else:
        waves = {wave: wave * places // heads for wave in range(1, 5)}
        shares = waves[max(waves, key=lambda wave: waves[wave] / wave)]
    return max(1, min(MOST_SPLITS, blocks, shares))
