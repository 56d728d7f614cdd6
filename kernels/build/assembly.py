"""Compiles one Triton kernel to machine code without a device. Does not work with TRITON_INTERPRET set."""

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

# Tensor-core instructions of the three generations, as PTX names them.
TENSOR_CORE = re.compile(r"^\s*(?:@%?!?\w+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
REGISTERS = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# An instruction in a disassembly: its address, its text, a semicolon. NOPs pad the code behind the last one.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP\b)[^/\s][^;]*;", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Registers per thread, bytes of spill stores, of spill loads and of shared memory; instruction counts."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_core: int
    instructions: int


def compile_kernel(source: object, arch: int, options: dict[str, int]) -> Figures:
    """Compiles triton's ASTSource for an architecture, e.g. 90.

    Bypasses triton's cache, which does not keep the assembler's report. Raises what the compiler raises, and
    ValueError if the report lacks registers or spills.
    """
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = log.getvalue()
    registers, spills = REGISTERS.search(report), SPILLS.search(report)
    if registers is None or spills is None:
        raise ValueError(f"the assembler reported neither registers nor spills: {report[:200]!r}")
    return Figures(
        registers=int(registers[1]),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        shared=int(compiled.metadata.shared),
        tensor_core=len(TENSOR_CORE.findall(compiled.asm["ptx"])),
        instructions=len(INSTRUCTION.findall(disassemble(compiled.asm["cubin"]))),
    )


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
