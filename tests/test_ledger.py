"""The ledger of GPU rows: sources and their hash, states, order, merging, and the page made from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bench", reason="the benchmarks are in a checkout")

from bench_support import ledger_of, row, run_entry

from bench import ledger, report, report_gpu, sources
from bench.__main__ import main
from bench.gpu_cases import CASES, QUANTITIES, GpuCase, reaches, value_of
from moekern import _op
from moekern.ops import SPECS

ROOT = Path(__file__).resolve().parents[1]


def test_statistics() -> None:
    found = ledger.statistics_of([float(v) for v in range(101)][::-1])
    assert found == {"median_us": 50.0, "p10_us": 10.0, "p90_us": 90.0, "samples": 101}
    assert ledger.statistics_of([1.0, 2.0])["median_us"] == 1.5
    assert ledger.statistics_of([3.0]) == {"median_us": 3.0, "p10_us": 3.0, "p90_us": 3.0, "samples": 1}
    with pytest.raises(ValueError, match="no samples"):
        ledger.statistics_of([])


def test_json_is_whole_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    ledger.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        ledger.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    ledger.write_json(path, {"a": 2})
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == {"a": 2}


@pytest.mark.parametrize(("backend", "expected"), [
    ("triton", ("moekern/ops/gate_topk/triton.py", "moekern/ops/gate_topk/config.py", "moekern/_triton_lib.py",
                "moekern/_triton.py")),
    ("cuda", ("csrc/ops/gate_topk/cuda.cu", "csrc/ops/gate_topk/select.cuh", "csrc/common/warp.cuh",
              "csrc/common/scalar.h")),
])  # fmt: skip
def test_source_hash_follows_the_kernels(tmp_path: Path, backend: str, expected: tuple[str, ...]) -> None:
    names = [str(p.relative_to(ROOT)) for p in sources.sources_of("gate_topk", backend)]
    assert set(expected) <= set(names)
    assert not [n for n in names if n.endswith(("cpu.cpp", "ref.py", "__init__.py", "_op.py"))]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = sources.source_hash("gate_topk", backend, tmp_path)
    assert before == sources.source_hash("gate_topk", backend)
    for name in names:
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text + b" \n")
        assert sources.source_hash("gate_topk", backend, tmp_path) != before, name
        (tmp_path / name).write_bytes(text)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_an_op_made_of_others_depends_on_their_kernels(tmp_path: Path) -> None:
    """By whatever form of import, directly or not, in its kernels or lazily in its contract."""
    write(tmp_path, {
        "moekern/_op.py": "", "moekern/_triton.py": "", "moekern/_triton_lib.py": "",
        "moekern/ops/a/__init__.py": "import torch\ndef run():\n from moekern.ops.b import triton\n from moekern import _op\n",
        "moekern/ops/a/triton.py": "from moekern.ops.a import ref, variants\nfrom moekern.ops import d\nfrom moekern._op import x\n",
        "moekern/ops/a/ref.py": "",
        "moekern/ops/b/__init__.py": "from moekern.ops.e import x\n", "moekern/ops/b/triton.py":
            "import moekern.ops.c.tiles\nfrom moekern.ops.b.config import choose\n",
        "moekern/ops/b/config.py": "", "moekern/ops/c/tiles.py": "", "moekern/ops/d/__init__.py": "",
        "moekern/ops/d/triton_small.py": "", "moekern/ops/a/variants.py": "", "moekern/ops/a/triton_backward.py": "", "moekern/ops/d/ref.py": "", "moekern/ops/e/triton.py": "",
        "moekern/ops/f/__init__.py": "def run():\n from moekern.ops.b import triton\n",
    })  # fmt: skip
    names = {
        p.relative_to(tmp_path / "moekern").as_posix() for p in sources.sources_of("a", "triton", tmp_path)
    }
    assert names == {
        "_triton.py", "_triton_lib.py", "ops/a/triton.py", "ops/b/triton.py", "ops/b/config.py", "ops/c/tiles.py",
        "ops/d/triton_small.py",
    }  # fmt: skip
    assert sources.source_hash("f", "triton", tmp_path) is None
    assert sources.source_hash("a", "cuda", tmp_path) is None


def test_fused_experts_depends_on_the_kernels_it_launches() -> None:
    names = {p.relative_to(ROOT / "moekern" / "ops").as_posix() for p in sources.sources_of("fused_experts", "triton")
             if "ops" in p.parts}  # fmt: skip
    for op in ("fused_experts", "grouped_gemm", "route", "combine"):
        assert {f"{op}/triton.py", f"{op}/config.py"} <= names


CASE = GpuCase("gate_topk", "E 64 K 8, T 1", {})
KEY = ("gate_topk", "E 64 K 8, T 1", "triton")


def test_rows_are_measured_stale_or_missing() -> None:
    found = ledger_of(row(source_hash="new"))
    keys = [KEY, ("gate_topk", "another", "triton")]
    assert list(ledger.states(keys, found, lambda op, backend: "new").values()) == ["measured", "missing"]
    assert list(ledger.states(keys, found, lambda op, backend: "newer").values()) == ["stale", "missing"]
    assert ledger.wanted([CASE]) == [("gate_topk", CASE.name, b) for b in ("triton", "cuda")]
    assert ledger.wanted([GpuCase("model", "x", {})]) == [("model", "x", "moekern")]


def test_missing_rows_come_first_then_stale_then_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "GPU_BACKENDS", ("triton",))
    cases = [GpuCase("gate_topk", name, {}) for name in ("new", "old", "stale", "missing", "gone")]
    keys = {c.name: ("gate_topk", c.name, "triton") for c in cases}
    states = {keys["new"]: "measured", keys["old"]: "measured", keys["stale"]: "stale", keys["missing"]: "missing",
              keys["gone"]: "missing"}  # fmt: skip
    dates = {keys["new"]: "2026-03", keys["old"]: "2026-01", keys["stale"]: "2026-02"}
    order = [c.name for c in ledger.in_order(cases, states, dates)]
    assert order == ["missing", "gone", "stale", "old", "new"]


def test_merging_replaces_rows_and_drops_runs_that_no_row_comes_from(tmp_path: Path) -> None:
    old = ledger_of(
        row(), row(case="kept"), row(backend="cuda", run="gone"), first=run_entry(), gone=run_entry()
    )
    new = ledger_of(row(median_us=1.0, run="second"), row(backend="cuda", run="second"), second=run_entry())
    merged = ledger.merge(old, new)
    assert set(merged["runs"]) == {"first", "second"}
    assert {ledger.key_of(r): r["run"] for r in merged["rows"]} == {
        KEY: "second", ("gate_topk", "kept", "triton"): "first", (*KEY[:2], "cuda"): "second",
    }  # fmt: skip
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**new, "failed": {"x": "y"}, "ended": True}))
    target = ledger.merge_file(path, tmp_path / "results")
    assert target == tmp_path / "results" / "test-1" / "gpu.json"
    assert set(json.loads(target.read_text())) == {"schema", "runs", "rows"}
    path.write_text(json.dumps({**ledger.empty(), "schema": 1}))
    with pytest.raises(ValueError, match="schema 1; expected 2"):
        ledger.merge_file(path, tmp_path)
    path.write_text(json.dumps(ledger.empty()))
    with pytest.raises(ValueError, match="has no rows"):
        ledger.merge_file(path, tmp_path)


@pytest.mark.parametrize(("name", "expected"), [
    ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
    ("Tesla T4", "t4"),
])  # fmt: skip
def test_folder_of_a_gpu(name: str, expected: str) -> None:
    assert ledger.slug(name) == expected


def test_values_and_goals() -> None:
    uniform = row(case="uniform", median_us=100.0, bytes=270e6, flops=40e9)
    found = ledger_of(uniform, row(case="skewed", median_us=120.0))
    values = {q: ledger.value_of(q, uniform, found) for q in QUANTITIES}
    assert values["us"] == values["host_us"] == 100.0
    assert values["tflops"] == pytest.approx(400)
    assert values["read_tbps"] == pytest.approx(2.7)
    assert values["read_share"] == pytest.approx(0.9)
    assert values["copy_share"] == pytest.approx(0.675)
    assert values["speedup"] == pytest.approx(0.05)
    assert values["ratio"] is None
    assert ledger.value_of("ratio", found["rows"][1], found, "uniform") == pytest.approx(1.2)
    assert reaches(("ratio", 1.25), 1.2)
    assert not reaches(("tflops", 450), 449)
    assert value_of(("read_share", 0.9)) == "90% of read bandwidth"


def test_every_goal_of_the_table_can_be_told() -> None:
    names = {(c.op, c.name) for c in CASES}
    assert len(names) == len(CASES)
    for case in CASES:
        for goal in (case.at_least, case.aim):
            assert goal is None or goal[0] in QUANTITIES
        uses_ratio = case.at_least is not None and case.at_least[0] == "ratio"
        assert uses_ratio == (case.reference is not None)
        assert case.reference is None or (case.op, case.reference) in names
        assert case.op == "model" or case.op in SPECS
    assert {c.op for c in CASES if c.method == "host"} == set(SPECS)


def test_rates() -> None:
    ceilings = {"gemm_tflops": 800.0, "read_gbytes_per_s": 3000.0, "copy_gbytes_per_s": 4000.0}
    assert ledger.rates_of(10.0, 4e9, 2e7, "gemm", ceilings)["percent_of_ceiling"] == pytest.approx(50)
    assert ledger.rates_of(10.0, 4e9, 2.7e7, "read", ceilings)["percent_of_ceiling"] == pytest.approx(90)


def test_the_page_says_that_nothing_is_measured() -> None:
    page = report_gpu.render({})
    assert "Unmeasured: no GPU has run these cases yet." in page
    assert page.count("| not measured |") == len(CASES)
    assert "| 2.45 TB/s | 95% of read bandwidth | not measured |" in page


def test_the_page_shows_measured_stale_and_missing_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "GPU_BACKENDS", ("triton",))
    name = "E 256 K 8, T 1"
    current = ledger.hash_for("gate_topk", "triton")
    found = ledger_of(
        row(case=name, median_us=2.0, source_hash=current, empty_node_us=1.25), row(case="E 64 K 8, T 1", source_hash="0")
    )  # fmt: skip
    page = report_gpu.render({"test-1": found})
    assert "### test-1" in page
    assert (
        f"| gate_topk | {name} | triton | 2, empty node 1.25 | 1.9 to 2.2 | 75% of copy | 2.4 us (reached: 2.0 us) "
        "| 1.8 us (not reached: 2.0 us) | 2.50x torch | measured |" in page
    )
    assert "| 2.50x torch | stale |" in page
    assert "| missing |" in page
    assert "1 rows measured, 1 stale, " in page
    assert "Unmeasured" not in page


def test_a_cuda_default_needs_current_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.unproven_defaults({}) == []  # Triton is the default, which needs no row
    monkeypatch.setattr(_op, "default_order", lambda device: ("cuda", "triton", "ref"))
    assert any("no GPU has a row" in problem for problem in ledger.unproven_defaults({}))
    keys = [key for key in ledger.wanted(CASES) if key[0] == "gate_topk" and key[2] == "cuda"]
    current = ledger.hash_for("gate_topk", "cuda")
    rows = [row(case=name, backend="cuda", source_hash=current) for _, name, _ in keys]
    # Other ops with a CUDA kernel would be found too; here only gate_topk is asked about.
    monkeypatch.setattr("moekern.ops.SPECS", {"gate_topk": SPECS["gate_topk"]})
    assert ledger.unproven_defaults({"h100": ledger_of(*rows)}) == []
    rows[0]["source_hash"] = "0"
    problems = ledger.unproven_defaults({"h100": ledger_of(*rows[:-1])})
    assert ["stale" in problems[0], "missing" in problems[-1], len(problems)] == [True, True, 2]


def test_report_merges_checks_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(report, "render", lambda results: f"{sorted(ledger.ledgers(results))}\n")
    page, results, run = tmp_path / "performance.md", tmp_path / "results", tmp_path / "run.json"
    arguments = ["report", "--results", str(results), "--out", str(page)]
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    run.write_text(json.dumps(ledger_of(row())))
    assert main([*arguments, "--merge", str(run)]) == 0
    assert page.read_text() == "['test-1']\n"
    assert main([*arguments, "--check", "--merge", str(run)]) == 1
    page.write_text("other")
    assert main([*arguments, "--check"]) == 1
    assert "is not what bench/results says" in capsys.readouterr().err
    assert main([*arguments, "--merge", str(tmp_path / "absent.json")]) == 1


def test_the_committed_page_is_current() -> None:
    assert main(["report", "--check"]) == 0


def test_plots_come_from_rows(tmp_path: Path) -> None:
    assert report_gpu.plot({}, tmp_path) == []
    pytest.importorskip("matplotlib")
    found: dict[str, Any] = {"test-1": ledger_of(row(), row(case="b"), row(case="c", method="host"))}
    (written,) = report_gpu.plot(found, tmp_path)
    first = written.read_bytes()
    report_gpu.plot(found, tmp_path)
    assert written.read_bytes() == first
