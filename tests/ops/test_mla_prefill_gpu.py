"""mla_decompress and mla_cache_write in Triton where the generic cases do not look: every configuration, both ways to load
the operands, caches that are slices, memory that must not be read, hostile slots. Triton runs in its interpreter where
there is no GPU; so this file is its own GPU test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import available, device_of, same_bits
from torch import Tensor

from moekern import _triton
from moekern.ops import SPECS, mla_cache_write, mla_decompress
from moekern.ops.mla_cache_write import config as write_config, ref as write_ref
from moekern.ops.mla_decompress import config, ref

DEVICE = device_of("triton")
pytestmark = [
    pytest.mark.skipif(not available(SPECS["mla_decompress"], "triton"), reason="neither Triton nor a GPU"),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]
NAN = float("nan")
# Where the part has TMA; the interpreter pretends to.
LOADS = [False, True] if _triton.gpu_of(DEVICE).capability >= 90 else [False]
loads = pytest.mark.parametrize("tma", LOADS, ids=lambda tma: "tma" if tma else "pointers")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


# ---- mla_decompress ----


def decompress_inputs(
    batch: int, tokens: int, heads: int = 2, *, rank: int = 64, nope: int = 32, rope: int = 16, value: int = 32,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    return {
        "latent": randn(batch, tokens, rank, dtype=dtype), "k_rope": randn(batch, tokens, rope, dtype=dtype, seed=1),
        "w_kv_b": randn(heads * (nope + value), rank, dtype=dtype, seed=2) / rank**0.5, "num_heads": heads,
        "nope_dim": nope,
    }  # fmt: skip


def check_decompress(**arguments: Any) -> tuple[Tensor, Tensor]:
    found = mla_decompress(**arguments, backend="triton")
    expected = ref.mla_decompress(**arguments)
    tolerance = TOLERANCE[arguments["latent"].dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return found


def use_config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    from moekern.ops.mla_decompress import triton

    def choose(*args: Any) -> config.MlaDecompressConfig:
        return replace(config.choose(*args), **changes)

    monkeypatch.setattr(triton, "choose", choose)


def test_token_blocks_are_grouped_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks in groups of two: the last group is a half one, in each of the sequences."""
    use_config(monkeypatch, block_tokens=16, block_columns=16, block_rank=32, group_tokens=2)
    check_decompress(**decompress_inputs(2, 77, 3, nope=40, value=24, rope=8), v_width=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@loads
def test_ways_to_load_agree(monkeypatch: pytest.MonkeyPatch, tma: bool, dtype: torch.dtype) -> None:
    """A rank that is no multiple of the step, parts that are no multiple of the tile."""
    use_config(monkeypatch, tma=tma, block_rank=32, block_columns=32)
    check_decompress(**decompress_inputs(2, 19, 2, rank=80, nope=48, value=40, dtype=dtype))


@loads
def test_nothing_beyond_the_slices_is_used(monkeypatch: pytest.MonkeyPatch, tma: bool) -> None:
    """Latents of a static cache, with NaN behind the tokens and behind the rank, in front and between the sequences."""
    use_config(monkeypatch, tma=tma)
    arguments = decompress_inputs(3, 21, 2)
    expected = mla_decompress(**arguments, backend="triton")
    cache = torch.full((4, 40, 64 + 16), NAN, device=DEVICE)
    cache[1:, :21, :64], cache[1:, :21, 64:] = arguments["latent"], arguments["k_rope"]
    weight = torch.full((5 + 128 + 7, 80), NAN, device=DEVICE)
    weight[5:133, :64] = arguments["w_kv_b"]
    sliced = {"latent": cache[1:, :21, :64], "k_rope": cache[1:, :21, 64:], "w_kv_b": weight[5:133, :64]}
    found = mla_decompress(**{**arguments, **sliced}, backend="triton")
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["batch pitch", "repeated sequence", "repeated token", "odd rows"])
def test_strides_that_no_descriptor_describes(name: str) -> None:
    arguments = decompress_inputs(2, 9, 2, dtype=torch.bfloat16)
    latent = arguments["latent"]
    if name == "batch pitch":  # no multiple of the rows' pitch
        latent = torch.empty(2 * (9 * 64 + 16), dtype=latent.dtype, device=DEVICE).as_strided(
            latent.shape, (9 * 64 + 16, 64, 1)
        ).copy_(latent)  # fmt: skip
    elif name == "repeated sequence":
        latent = latent[:1].expand(2, -1, -1)
    elif name == "repeated token":
        latent = latent[:, :1].expand(-1, 9, -1)
    else:
        latent = torch.nn.functional.pad(latent, (1, 2))[..., 1:65]
    check_decompress(**{**arguments, "latent": latent})


@pytest.mark.parametrize(
    ("nope", "rope", "value", "v_width"),
    [(0, 16, 32, 0), (32, 0, 16, 0), (0, 0, 1, 5), (1, 1, 1, 1), (33, 7, 65, 200), (16, 80, 16, 17)],
)
def test_widths(nope: int, rope: int, value: int, v_width: int) -> None:
    _, v = check_decompress(
        **decompress_inputs(1, 5, 3, nope=nope, rope=rope, value=value, rank=24), v_width=v_width
    )
    assert not v[..., value:].any()


def test_every_candidate_of_the_tuner_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.ops.mla_decompress import triton

    arguments = decompress_inputs(1, 70, 1, dtype=torch.float16)
    gpu = _triton.gpu_of(DEVICE)
    found = set(config.candidates(70, 1, 1, 32, 32, 64, 2, gpu))
    assert len(found) > 8
    for candidate in found:
        monkeypatch.setattr(triton, "choose", lambda *_, candidate=candidate: candidate)
        check_decompress(**arguments)


@pytest.mark.parametrize("gpu", _triton.PARTS.values(), ids=str)
def test_configurations_fit_the_part(gpu: _triton.Gpu) -> None:
    for tokens in (1, 64, 65, 300, 4096, 1 << 20):
        for heads, nope, value, rank in (
            (16, 128, 128, 512),
            (128, 128, 128, 512),
            (20, 192, 256, 512),
            (3, 10, 14, 40),
        ):
            for itemsize in (2, 4):
                picked = config.choose(tokens, 1, heads, nope, value, rank, itemsize, gpu)
                tile = (picked.block_tokens + picked.block_columns) * picked.block_rank * itemsize
                assert tile * picked.num_stages <= gpu.shared
                assert picked.block_tokens % 64 == 0
                assert not picked.tma or gpu.capability >= 90
                padded = config.column_tiles(nope, value, picked.block_columns) * picked.block_columns
                assert padded <= 9 / 8 * (nope + value) or picked.block_columns <= 64


# ---- mla_cache_write ----


def write_inputs(tokens: int, rank: int = 64, rope: int = 16, num_slots: int = 40) -> dict[str, Tensor]:
    angle = torch.rand(tokens, rope // 2, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 6.28
    return {
        "kv": randn(tokens, rank + rope), "norm_weight": randn(rank, seed=1), "cos": angle.cos(), "sin": angle.sin(),
        "latent_cache": randn(num_slots, rank, seed=2), "rope_cache": randn(num_slots, rope, seed=4),
        "slots": torch.randperm(num_slots, generator=torch.Generator().manual_seed(5))[:tokens].to(DEVICE),
    }  # fmt: skip


def check_write(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ours, theirs = (
        {**arguments, **{n: arguments[n].clone() for n in ("latent_cache", "rope_cache")}} for _ in range(2)
    )
    mla_cache_write(**ours, backend="triton")
    write_ref.mla_cache_write(**theirs)
    for name in ("latent_cache", "rope_cache"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5, equal_nan=True)
    return ours["latent_cache"], ours["rope_cache"]


@pytest.mark.parametrize("rope", write_ref.ROPES)
@pytest.mark.parametrize("block_tokens", [1, 2, 8])
@pytest.mark.parametrize(("rank", "width"), [(64, 16), (100, 10)])
def test_rows_share_a_program(
    monkeypatch: pytest.MonkeyPatch, rope: str, block_tokens: int, rank: int, width: int
) -> None:
    from moekern.ops.mla_cache_write import triton

    monkeypatch.setattr(triton, "choose", lambda *_: write_config.MlaCacheWriteConfig(block_tokens, 1))
    check_write({**write_inputs(11, rank, width), "rope": rope, "eps": 1e-3})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hostile_slots_touch_nothing(dtype: torch.dtype) -> None:
    arguments = write_inputs(9)
    limits = torch.iinfo(dtype)
    outside = torch.tensor([-1, 40, limits.max, limits.min, 41, -40], dtype=dtype, device=DEVICE)
    slots = arguments["slots"].to(dtype)
    slots[1:7] = outside
    arguments["kv"][1:7] = NAN  # a skipped token's row is not read into a result
    latent, rope = check_write({**arguments, "slots": slots})
    kept = torch.ones(40, dtype=torch.bool, device=DEVICE)
    kept[slots[[0, 7, 8]].long()] = False
    assert same_bits(latent[kept], arguments["latent_cache"][kept])
    assert same_bits(rope[kept], arguments["rope_cache"][kept])


def test_strides_of_angles_and_slots_are_free() -> None:
    arguments = write_inputs(7)
    for name in ("cos", "sin"):
        arguments[name] = arguments[name].t().contiguous().t().double()
    arguments["slots"] = torch.stack((arguments["slots"], torch.full_like(arguments["slots"], -5)), 1)[:, 0]
    check_write(arguments)


def test_a_shared_angle_serves_every_token() -> None:
    arguments = write_inputs(5)
    for name in ("cos", "sin"):
        arguments[name] = arguments[name][:1].expand(5, -1)
    check_write(arguments)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_a_cache_without_slots_and_values_that_are_no_numbers() -> None:
    arguments = write_inputs(3)
    empty = {n: arguments[n][:0] for n in ("latent_cache", "rope_cache")}
    mla_cache_write(**{**arguments, **empty}, backend="triton")
    arguments["kv"][0, 3], arguments["kv"][1, 70], arguments["kv"][2] = NAN, float("inf"), 0.0
    check_write({**arguments, "eps": 0.0})


def test_row_widths_that_fit_no_program_are_refused() -> None:
    from moekern.ops.mla_cache_write import MAX_TRITON_RANK

    arguments = write_inputs(1, MAX_TRITON_RANK + 1, 2, 2)
    with pytest.raises(RuntimeError, match=f"R = {MAX_TRITON_RANK + 1} exceeds {MAX_TRITON_RANK}"):
        mla_cache_write(**arguments, backend="triton")


if DEVICE.type == "cpu":  # not a skip: on a machine with a GPU a skip is a failure

    @pytest.mark.parametrize("name", ["mla_cache_write", "mla_decompress"])
    def test_nothing_outside_the_buffers_is_touched(name: str) -> None:
        from test_memory import HERE, python

        done = python(str(HERE / "guarded.py"), name, "triton")
        last = done.stdout.splitlines()[-1:] or ["nothing"]
        assert done.returncode == 0, f"exit status {done.returncode} in {last[0]}\n{done.stderr[-2000:]}"
