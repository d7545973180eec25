"""Compiles the kernels for GPUs that need not be there, in a process without the interpreter; `compiled` runs it.

TRITON_INTERPRET=0 python tests/backends/on_triton/ahead_of_time.py DIRECTORY < SPECIALISATIONS
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TARGETS = ("sm_80", "sm_90", "sm_100")
AMD = "gfx942"
ROOT = Path(__file__).parents[3]
# of every version; its keys tell them apart
CACHE = ROOT / "build" / "triton"


class Specialisation(NamedTuple):
    kernel: str
    meta: tuple[tuple[str, int], ...]
    target: str = "sm_90"

    @classmethod
    def of(cls, kernel, target="sm_90", **meta):
        return cls(kernel, tuple(meta.items()), target)


class Compiled(NamedTuple):
    ptx: str  # AMDGCN for AMD
    sass: str
    registers: int
    stack: int
    shared: int  # bytes
    spills: int


def _compile(specialisation):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cbp_fast.backends.triton import kernels
    from cbp_fast.backends.triton.launching import INT32, OPTIONS

    name, meta, target = specialisation
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    types = ["*i32" if n in INT32 else "*i64" for n in names if n not in dict(meta)]
    source = ASTSource(
        kernel,
        {n: types[i] if i < len(types) else "constexpr" for i, n in enumerate(names)},
        {(names.index(n),): value for n, value in meta},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    if target == AMD:
        gpu, options = GPUTarget("hip", target, 64), {"num_warps": 4, "enable_fp_fusion": False}
    else:
        gpu, options = GPUTarget("cuda", int(target.removeprefix("sm_")), 32), OPTIONS
    built = triton.compile(source, target=gpu, options=options)
    if target == AMD:
        return Compiled(built.asm["amdgcn"], "", 0, 0, built.metadata.shared, 0)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        usage = run([tools / "cuobjdump", "-res-usage", file.name]).stdout
        sass = run([tools / "nvdisasm", "-c", file.name]).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Compiled(built.asm["ptx"], sass, registers, stack, built.metadata.shared, spills)


@functools.cache
def compiled(*specialisations, python=sys.executable):
    """`Compiled` of each, by a Python's Triton. Triton's own cache makes the second time quick."""
    environment = {"TRITON_CACHE_DIR": str(CACHE), **os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as directory:
        command = [str(python), __file__, directory]
        result = subprocess.run(
            command, input=json.dumps(specialisations), env=environment, text=True, capture_output=True, check=False
        )
        if result.returncode:
            raise RuntimeError(result.stderr)
        read = (json.loads((Path(directory) / f"{i}.json").read_text()) for i in range(len(specialisations)))
        return [Compiled(*entry) for entry in read]


if __name__ == "__main__":
    for number, (name, meta, target) in enumerate(json.load(sys.stdin)):
        entry = _compile(Specialisation(name, tuple(map(tuple, meta)), target))
        (Path(sys.argv[1]) / f"{number}.json").write_text(json.dumps(entry))
