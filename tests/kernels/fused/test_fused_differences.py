"""On a device, too, equal things differ by nothing: shown in the machine code, which an interpreter has not."""

import os
import re
import subprocess
import sys

import pytest

BUILD = """
import subprocess, sys, tempfile
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from d2s.kernels import builds
from d2s.kernels.fused import ALL_SPECS
spec = next(spec for spec in ALL_SPECS if spec.name == sys.argv[1])
job = next(job for job in builds.all_jobs([spec], {}) if (job.arch, job.dtype, job.width) == (90, sys.argv[2], 64))
options = spec.launch_options(job.tile, job.width, job.half)
built = triton.compile(builds.source(spec, job), target=GPUTarget("cuda", 90, 32), options=options)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", file.name], check=True)
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
