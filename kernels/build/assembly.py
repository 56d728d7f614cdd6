"""What the compiler and the assembler say of one Triton kernel, without a device. Not with TRITON_INTERPRET set."""

import contextlib
import io
import re
import subprocess
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

# Tensor-core instructions of the three generations, as PTX names them.
TENSOR_CORE = re.compile(r"^\s*(?:@%?!?\w+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
REGISTERS = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# An instruction of a disassembly: its address, its text, a semicolon.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+[^/\s][^;]*;", re.MULTILINE)
NOP = re.compile(r"\*/\s+NOP\b")


def compile_and_weigh(
    source: object, arch: int, options: dict[str, int]
) -> tuple[int, int, int, int, int, int]:
    """(registers, bytes of spill stores, of spill loads, shared memory, tensor-core and all instructions).

    source: triton's ASTSource. The cache is not asked, because the assembler's report is not kept in it.
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
    return (
        int(registers[1]),
        int(spills[1]),
        int(spills[2]),
        int(compiled.metadata.shared),
        len(TENSOR_CORE.findall(compiled.asm["ptx"])),
        count_instructions(disassemble(compiled.asm["cubin"])),
    )


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count_instructions(text: str) -> int:
    """Instructions of a disassembly, without the padding behind the last one."""
    return sum(not NOP.search(found) for found in INSTRUCTION.findall(text))
