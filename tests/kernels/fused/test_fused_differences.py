"""On a device, too, equal things differ by nothing: shown in the machine code, which an interpreter has not."""

import os
import re
import subprocess
import sys

import pytest

BUILD = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from d2s.kernels.build import assembly, builds
specs = builds.all_specs()
spec = specs[sys.argv[1]]
job = next(job for job in builds.jobs([spec], [90], {}) if (job.dtype, job.width) == (sys.argv[2], 64))
target, options = GPUTarget("cuda", 90, 32), builds.options(spec, job)
built = triton.compile(builds.source(spec, job), target=target, options=options)
print(assembly.disassemble(built.asm["cubin"]))
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["relational_difference", "pointwise_l1", "pointwise_l2"])
def test_products_are_rounded_before_they_are_subtracted(kernel, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = subprocess.run(
        [sys.executable, "-c", BUILD, kernel, dtype],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    ).stdout
    # A product by itself is a multiply-add of zero here; were it contracted, there would be none left to subtract.
    rounded = len(re.findall(r"FFMA[^;]*, RZ\s*;", code))
    subtracted = len(
        re.findall(r"FADD(?:\.FTZ)? R\d+, R\d+(?:\.reuse)?, -R\d+|FADD(?:\.FTZ)? R\d+, -R\d+", code)
    )
    assert rounded > 0
    assert 2 * subtracted >= rounded, "each difference has two sides"
