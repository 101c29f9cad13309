"""moekern._runtime: instruction sets, and the memory budget read from fake /proc and /sys trees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_runtime = pytest.importorskip("moekern._runtime", reason="the native runtime was not built")

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712  # what cgroup v1 writes for "unlimited": the largest multiple of 4096


class Tree:
    """A fake root directory: a machine with 64 GiB, 40 of them available, and one cgroup hierarchy."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {40 * GIB // 1024} kB\n")

    def write(self, path: str, text: str) -> None:
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def v2(self, cgroup: str, top: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{cgroup}\n")
        self.write(
            "proc/self/mountinfo",
            "21 1 8:1 / / rw - ext4 /dev/root rw\n"
            f"30 21 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        )

    def v1(self, cgroup: str, top: str = "/") -> None:
        self.write("proc/self/cgroup", f"5:devices:/elsewhere\n4:cpu,memory:{cgroup}\n0::/\n")
        self.write(
            "proc/self/mountinfo",
            "31 21 0:27 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n"
            f"32 21 0:28 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n",
        )

    def group_v2(self, path: str, limit: object, current: int, stat: str = "", high: object = "max") -> None:
        self.write(f"{path}/memory.max", f"{limit}\n")
        self.write(f"{path}/memory.high", f"{high}\n")
        self.write(f"{path}/memory.current", f"{current}\n")
        self.write(f"{path}/memory.stat", stat)

    def group_v1(self, path: str, limit: int, usage: int, stat: str = "", hierarchy: int = 1) -> None:
        self.write(f"{path}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{path}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"{path}/memory.use_hierarchy", f"{hierarchy}\n")
        self.write(f"{path}/memory.stat", stat)

    def budget(self) -> tuple[int, int, int, str]:
        found = _runtime.memory_budget(str(self.root))
        return found.limit, found.used, found.available, found.source.replace(str(self.root), "")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_memory_without_a_cgroup_is_what_the_machine_has_available(tree: Tree) -> None:
    assert tree.budget() == (64 * GIB, 24 * GIB, 40 * GIB, "/proc/meminfo")


def test_memory_v2_does_not_count_page_cache_as_used(tree: Tree) -> None:
    tree.v2("/job")
    stat = f"anon {2 * GIB}\nfile {5 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}\nslab_reclaimable {GIB}\n"
    tree.group_v2("/sys/fs/cgroup/job", 12 * GIB, 8 * GIB, stat)
    assert tree.budget() == (12 * GIB, 3 * GIB, 9 * GIB, "cgroup v2: /sys/fs/cgroup/job")


def test_memory_v2_takes_the_tightest_of_nested_limits(tree: Tree) -> None:
    tree.v2("/a/b/c")
    tree.group_v2("/sys/fs/cgroup/a", 30 * GIB, 28 * GIB)
    tree.group_v2("/sys/fs/cgroup/a/b", "max", 20 * GIB)
    tree.group_v2("/sys/fs/cgroup/a/b/c", 10 * GIB, GIB)
    # The parent is fuller than the child although its limit is higher.
    assert tree.budget() == (30 * GIB, 28 * GIB, 2 * GIB, "cgroup v2: /sys/fs/cgroup/a")


def test_memory_v2_obeys_memory_high(tree: Tree) -> None:
    tree.v2("/job")
    tree.group_v2("/sys/fs/cgroup/job", 12 * GIB, GIB, high=4 * GIB)
    assert tree.budget()[:3] == (4 * GIB, GIB, 3 * GIB)


def test_memory_v2_over_its_limit_is_zero_not_negative(tree: Tree) -> None:
    tree.v2("/job")
    tree.group_v2("/sys/fs/cgroup/job", GIB, 2 * GIB)
    assert tree.budget()[2] == 0


def test_memory_is_never_more_than_the_machine_has(tree: Tree) -> None:
    tree.v2("/job")
    tree.group_v2("/sys/fs/cgroup/job", 50 * GIB, GIB)
    assert tree.budget()[2:] == (40 * GIB, "/proc/meminfo")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_memory_of_a_container_that_sees_only_its_own_cgroup(tree: Tree, version: str) -> None:
    """Docker without a cgroup namespace: the path names what is mounted as the top."""
    if version == "v2":
        tree.v2("/docker/abc/inner", top="/docker/abc")
        tree.group_v2("/sys/fs/cgroup/inner", 6 * GIB, GIB)
    else:
        tree.v1("/docker/abc/inner", top="/docker/abc")
        tree.group_v1("/sys/fs/cgroup/memory/inner", 6 * GIB, GIB)
    assert tree.budget()[:3] == (6 * GIB, GIB, 5 * GIB)


def test_memory_of_a_process_outside_its_cgroup_namespace(tree: Tree) -> None:
    tree.v2("/../outside")
    tree.group_v2("/sys/fs/cgroup", 6 * GIB, GIB)
    tree.group_v2("/sys/fs/outside", GIB, GIB)
    assert tree.budget()[2:] == (5 * GIB, "cgroup v2: /sys/fs/cgroup")


def test_memory_v1_counts_descendants_and_not_page_cache(tree: Tree) -> None:
    tree.v1("/job")
    stat = f"cache {7 * GIB}\ninactive_file 0\ntotal_inactive_file {2 * GIB}\ntotal_active_file {GIB}\n"
    tree.group_v1("/sys/fs/cgroup/memory/job", 16 * GIB, 10 * GIB, stat)
    assert tree.budget() == (16 * GIB, 7 * GIB, 9 * GIB, "cgroup v1: /sys/fs/cgroup/memory/job")


def test_memory_v1_without_a_limit(tree: Tree) -> None:
    tree.v1("/job")
    tree.group_v1("/sys/fs/cgroup/memory/job", NO_LIMIT_V1, 10 * GIB)
    assert tree.budget()[3] == "/proc/meminfo"


@pytest.mark.parametrize(("hierarchy", "available"), [(0, 7 * GIB), (1, 2 * GIB)])
def test_memory_v1_ancestor_binds_only_when_it_is_charged(tree: Tree, hierarchy: int, available: int) -> None:
    tree.v1("/a/b")
    tree.group_v1("/sys/fs/cgroup/memory/a", 4 * GIB, 2 * GIB, hierarchy=hierarchy)
    tree.group_v1("/sys/fs/cgroup/memory/a/b", 8 * GIB, GIB)
    assert tree.budget()[2] == available


def test_memory_without_proc_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"memory_budget: no MemTotal and MemAvailable in .*/proc/meminfo"):
        _runtime.memory_budget(str(tmp_path))


def test_memory_here_is_within_what_the_machine_has() -> None:
    found = _runtime.memory_budget()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found.available <= found.limit <= total
    assert found.available == found.limit - found.used
    assert str(found.limit) in repr(found)


# As /proc/cpuinfo spells them.
CPUINFO = {
    "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16", "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile", "amx_bf16": "amx_bf16", "amx_int8": "amx_int8",
}  # fmt: skip


def test_cpu_features_agree_with_the_kernel() -> None:
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    else:
        pytest.skip("/proc/cpuinfo has no flags: not an x86 processor")
    found = _runtime.cpu_features()
    assert set(found) == set(CPUINFO)
    # AMX may be withheld from a process although the processor has it; it is never usable when the kernel hides it.
    sure = {name for name in found if not name.startswith("amx")}
    assert {name for name in sure if found[name]} == {name for name in sure if CPUINFO[name] in flags}
    assert {name for name in found if found[name]} <= {name for name in found if CPUINFO[name] in flags}


def _isa(value: str) -> subprocess.CompletedProcess[str]:
    code = "from moekern import _runtime; print(_runtime.cpu_isa())"
    environment = {**os.environ, "MOEKERN_CPU_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_isa_is_lowered_on_request() -> None:
    assert _isa("portable").stdout.strip() == "portable"
    features = _runtime.cpu_features()
    best = _isa("").stdout.strip()
    if features.get("amx_bf16"):
        assert best == "amx"
    elif features.get("avx512_bf16"):
        assert best == "avx512bf16"
    else:
        assert best in ("portable", "avx2", "avx512")


def test_isa_that_does_not_exist_is_an_error() -> None:
    result = _isa("sse9")
    assert result.returncode != 0
    assert "MOEKERN_CPU_ISA: unknown instruction set 'sse9'" in result.stderr
