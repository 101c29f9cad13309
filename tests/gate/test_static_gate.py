"""What can be read off the machine code of every GPU kernel without a GPU."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import os
from pathlib import Path

import pytest
from gate import aot

from moekern import _native
from moekern._triton import PARTS
from moekern.ops import SPECS

TABLES_TRITON = "3.6.0"  # whose ptxas the committed tables of registers are from
EVERY = os.environ.get("MOEKERN_GATE") == "full"
# CUDA C++ kernel -> the matrix instruction that it has to have, by compute capability ({}: none).
CUDA_KERNELS: dict[str, dict[int, str]] = {"gate_topk_kernel": {}}
OPS = [name for name in SPECS if aot.modules_of(name)]


def problems(usage: aot.Usage) -> list[str]:
    """What is wrong with one compiled kernel."""
    found = []
    if usage.stack or usage.spills:
        found.append(f"{usage.stack} bytes of stack, {usage.spills} spill loads and stores")
    limit = PARTS[usage.arch].shared
    if not usage.min_shared <= usage.shared <= limit:
        found.append(f"{usage.shared} bytes of shared memory, expected {usage.min_shared} to {limit}")
    matrix = sorted(set(aot.TENSOR_CORES) & {name.split(".")[0] for name in usage.opcodes})
    if matrix != ([usage.wanted_tensor_cores] if usage.wanted_tensor_cores else []):
        found.append(f"matrix instructions {matrix}, expected {usage.wanted_tensor_cores or 'none'}")
    found += [f"no {name}" for name in usage.requires if not usage.count(name)]
    return found


@pytest.mark.timeout(7200 if EVERY else 1200)
@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_compile_to_what_they_should(op: str) -> None:
    pytest.importorskip("triton")
    found = aot.collect(op, every=EVERY)
    assert {u.arch for u in found} == set(PARTS)
    assert all(u.registers > 0 and u.instructions > 0 for u in found)
    bad = {f"{u.kernel} {u.variant} sm_{u.arch}": why for u in found if (why := problems(u))}
    assert not bad, "\n".join(f"{name}: {'; '.join(why)}" for name, why in bad.items())
    if importlib.metadata.version("triton") == TABLES_TRITON:
        table = aot.RESOURCES / f"{op}.tsv"
        difference = "\n".join(
            difflib.unified_diff(table.read_text().splitlines(), aot.resource_lines(found), lineterm="", n=0)
        )
        assert not difference, (
            f"{table.name}; where meant: python tests/gate/aot.py {op} --write\n{difference}"
        )


def test_gate_topk_reduces_in_hardware() -> None:
    """A row that fills a warp is reduced by REDUX; as shuffles a round would take five times as long."""
    for usage in aot.collect("gate_topk", every=False):
        if (
            " G1 " in usage.variant
            and "preselected" not in usage.variant
            and int(usage.variant.split()[0][1:]) >= 512
        ):
            assert usage.count("REDUX") + usage.count("CREDUX") >= 2, usage.variant


@pytest.mark.timeout(1200)
def test_cuda_kernels_compile_to_what_they_should() -> None:
    pytest.importorskip("triton")
    if not str(_native.build_note().get("cuda", "")).startswith("nvcc"):
        pytest.skip("the native library was built without CUDA")
    found = aot.library_usages(_native.LIBRARY_PATH, CUDA_KERNELS)
    assert {u.kernel for u in found} == set(CUDA_KERNELS)
    bad = {f"{u.variant} sm_{u.arch}": why for u in found if (why := problems(u))}
    assert not bad, "\n".join(f"{name}: {'; '.join(why)}" for name, why in bad.items())
    for usage in found:
        if usage.kernel == "gate_topk_kernel":
            assert usage.count("REDUX") + usage.count("CREDUX") >= 2, usage.variant


def make_usage(**changes: object) -> aot.Usage:
    usage = aot.Usage(kernel="k", variant="v", arch=90, worst=True, registers=32, stack=0, shared=0, spills=0,
                      instructions=9, opcodes={"FADD": 9}, wanted_tensor_cores="")  # fmt: skip
    return dataclasses.replace(usage, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"spills": 2}, "spill"),
        ({"stack": 16}, "stack"),
        ({"shared": 100 * 1024, "arch": 120}, "shared memory"),
        ({"opcodes": {"HMMA": 4}}, "matrix"),
        ({"opcodes": {"HMMA": 4}, "wanted_tensor_cores": "HGMMA"}, "matrix"),
        ({"opcodes": {"HGMMA.64x64x16.F32.BF16": 4}, "wanted_tensor_cores": "HGMMA"}, None),
        ({"shared": 1000, "min_shared": 2000}, "shared memory"),
        ({"requires": ("LDGSTS.128",), "opcodes": {"LDGSTS.E.BYPASS.64": 3}}, "no LDGSTS.128"),
        ({"requires": ("LDGSTS.128",), "opcodes": {"LDGSTS.E.BYPASS.128": 3}}, None),
    ],
)
def test_the_gate_sees_each_kind_of_problem(changes: dict[str, object], expected: str | None) -> None:
    found = problems(make_usage(**changes))
    assert found == [] if expected is None else expected in found[0]


def test_reports_are_read_as_the_tools_print_them() -> None:
    report = "Resource usage:\n Common:\n  GLOBAL:0\n Function my_kernel:\n  REG:42 STACK:16 SHARED:512 LOCAL:0 CONSTANT[0]:900\n"
    assert aot.resources_of(report)["my_kernel"]["REG"] == 42
    assert aot.resources_of(report)["my_kernel"]["STACK"] == 16
    sass = (
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        "        /*0010*/              @!P0 STL.64 [R1+0x8], R4 ;\n"
        "        /*0020*/              @UP1 UMOV UR4, 0x1 ;\n"
        "        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;\n"
    )
    assert aot.opcodes_of(sass) == {"LDC": 1, "STL.64": 1, "UMOV": 1, "HGMMA.64x64x16.F32.BF16": 1}


def test_tools_are_there() -> None:
    pytest.importorskip("triton")
    for name in ("cuobjdump", "nvdisasm"):
        assert Path(aot.tool(name)).exists()
