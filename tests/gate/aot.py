"""Compiles Triton kernels for GPUs that are not there and reads what the machine code uses.

Run as a program (`python tests/gate/aot.py gate_topk [--all]`) it prints one JSON line per (variant, architecture); the
tests run it so, because Triton decides at import whether it compiles or interprets. Results are kept in .cache/gate by
the hash of the kernel's sources, variant and compiler. `--write` renews the op's committed table of registers and
shared memory, tests/gate/resources/<op>.tsv.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "gate"
RESOURCES = ROOT / "tests" / "gate" / "resources"
# Matrix instructions, oldest to newest; a kernel's kind decides which must and which must not be there.
TENSOR_CORES = ("HMMA", "IMMA", "BMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA", "BGMMA",
                "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses. opcodes: instruction count by opcode with modifiers; spills: STL + LDL."""

    kernel: str
    variant: str
    arch: int
    worst: bool
    registers: int
    stack: int
    shared: int
    spills: int
    instructions: int
    opcodes: dict[str, int]
    wanted_tensor_cores: str
    requires: tuple[str, ...] = ()
    min_shared: int = 0

    def count(self, wanted: str) -> int:
        """Instructions with this opcode and at least these modifiers: "LDGSTS.128" counts LDGSTS.E.BYPASS.128."""
        head, *modifiers = wanted.split(".")
        total = 0
        for name, n in self.opcodes.items():
            found = name.split(".")
            total += n if found[0] == head and set(modifiers) <= set(found) else 0
        return total


def tool(name: str) -> str:
    """cuobjdump or nvdisasm as Triton ships them: nvcc's minimal installations have neither."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def opcodes_of(sass: str) -> Counter[str]:
    """Counts opcodes in nvdisasm's output: `/*0010*/  @!P0 LDG.E.128 R4, ... ;`."""
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", sass, flags=re.M)
    return Counter(found)


def resources_of(report: str) -> dict[str, dict[str, int]]:
    """Reads `cuobjdump -res-usage`: function name -> {REG, STACK, SHARED, ...}."""
    pattern = r"Function (\S+?):\s*\n\s*(REG:.*)"
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
        for name, line in re.findall(pattern, report)
    }


def inspect(cubin: Path) -> dict[str, tuple[dict[str, int], Counter[str]]]:
    """Function name -> (resources, opcodes) of every kernel in a cubin."""
    report = subprocess.run(
        [tool("cuobjdump"), "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    resources = resources_of(report)
    if not resources:
        raise RuntimeError(f"cuobjdump names no function in {cubin.name}: {report[:300]!r}")
    sass = subprocess.run([tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.M)
    bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {name: (resources[name], opcodes_of(bodies[name])) for name in resources if name in bodies}


def library_usages(library: Path, wanted: dict[str, dict[int, str]]) -> list[Usage]:
    """The usage of every kernel that nvcc built into a shared library, for every architecture in it. `wanted`: for each
    kernel name the matrix instruction by compute capability."""
    digest = hashlib.sha256(
        library.read_bytes() + repr(wanted).encode() + Path(__file__).read_bytes()
    ).hexdigest()
    cached = CACHE / f"{digest[:32]}.json"
    if cached.exists():
        return [Usage(**entry) for entry in json.loads(cached.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", "all", library], check=True, capture_output=True, cwd=folder
        )
        cubins = sorted(Path(folder).glob("*.cubin"))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            inspected = list(pool.map(inspect, cubins))
    found = []
    for cubin, kernels in zip(cubins, inspected, strict=True):
        [arch] = re.findall(r"sm_(\d+)", cubin.name)
        for mangled, (resources, opcodes) in kernels.items():
            names = [n for n in wanted if f"{len(n)}{n}" in mangled]
            if len(names) != 1:
                raise KeyError(
                    f"{mangled} is not in the table of CUDA kernels: say which matrix instruction it is to have"
                )
            found.append(Usage(
                kernel=names[0], variant=mangled, arch=int(arch), worst=True, registers=resources["REG"],
                stack=resources["STACK"], shared=resources["SHARED"], spills=spills_of(opcodes),
                instructions=sum(opcodes.values()), opcodes=dict(sorted(opcodes.items())),
                wanted_tensor_cores=wanted[names[0]].get(int(arch), ""),
            ))  # fmt: skip
    CACHE.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps([asdict(u) for u in found]))
    return found


def spills_of(opcodes: Counter[str]) -> int:
    return sum(n for name, n in opcodes.items() if name.split(".")[0] in ("STL", "LDL"))


def compile_variant(variant: Any, arch: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant.kernel
    signature = {n: variant.types.get(n, "constexpr") for n in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in variant.constants.items()},
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        [(resources, opcodes)] = inspect(Path(file.name)).values()
    return Usage(
        kernel=kernel.__name__, variant=variant.name, arch=arch, worst=variant.worst, registers=resources["REG"],
        stack=resources["STACK"], shared=compiled.metadata.shared, spills=spills_of(opcodes),
        instructions=sum(opcodes.values()), opcodes=dict(sorted(opcodes.items())),
        wanted_tensor_cores=variant.tensor_cores, requires=variant.requires, min_shared=variant.min_shared,
    )  # fmt: skip


def usage_of(job: tuple[str, int, int]) -> Usage:
    """The usage of one (op, index of variant, architecture), from the cache or compiled."""
    import triton

    op, index, arch = job
    variant = variants_of(op, arch)[index]
    described = repr((triton.__version__, Path(__file__).read_bytes(), variant.kernel.cache_key, variant.name, dict(variant.types),
                      dict(variant.constants), variant.aligned, variant.num_warps, variant.num_stages,
                      variant.tensor_cores, variant.requires, variant.min_shared, variant.worst, arch))  # fmt: skip
    path = CACHE / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return Usage(**json.loads(path.read_text()))
    usage = compile_variant(variant, arch)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(usage)))
    temporary.replace(path)
    return usage


def modules_of(op: str) -> list[str]:
    """The op's modules with kernels: triton.py and triton_*.py, those that yield variants."""
    files = sorted((ROOT / "moekern" / "ops" / op).glob("triton*.py"))
    names = re.compile(r"^def aot_variants\(|^from \S+ import .*\baot_variants\b", re.M)
    return [f"moekern.ops.{op}.{f.stem}" for f in files if names.search(f.read_text())]


@functools.cache
def variants_of(op: str, arch: int) -> list[Any]:
    from moekern._triton import PARTS

    modules = [importlib.import_module(name) for name in modules_of(op)]
    return [variant for module in modules for variant in module.aot_variants(PARTS[arch])]


def usages(op: str, every: bool, workers: int) -> Iterator[Usage]:
    from moekern._triton import PARTS

    jobs = [(op, i, arch) for arch in PARTS for i, v in enumerate(variants_of(op, arch)) if v.worst or every]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        yield from pool.map(usage_of, jobs, chunksize=4)


def resource_lines(found: Sequence[Usage]) -> list[str]:
    """The committed table's lines: kernel, architecture, variant, registers, bytes of shared memory."""
    rows = sorted((u.kernel, u.arch, u.variant, u.registers, u.shared) for u in found if u.worst)
    return ["\t".join(str(value) for value in row) for row in rows]


def collect(op: str, every: bool) -> list[Usage]:
    """The usages of an op's variants, from another process: Triton may be interpreting in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    command = [sys.executable, __file__, op, *(["--all"] if every else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ahead-of-time compilation of {op} failed:\n{done.stderr[-4000:]}")
    return [Usage(**json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op")
    parser.add_argument(
        "--all", action="store_true", help="every variant, not one worst case per configuration"
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--write", action="store_true", help="renew the committed table of resources")
    parsed = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    found = []
    for usage in usages(parsed.op, parsed.all, parsed.workers):
        print(json.dumps(asdict(usage)), flush=True)
        found.append(usage)
    if parsed.write:
        RESOURCES.mkdir(exist_ok=True)
        (RESOURCES / f"{parsed.op}.tsv").write_text("\n".join(resource_lines(found)) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # Python put this folder there instead
    main()
