"""On a device, too, equal things differ by nothing: shown in the machine code, which an interpreter has not."""

import json
import os
import re
import subprocess
import sys

import pytest

KERNELS, DTYPES = ("relational_difference", "pointwise_l1", "pointwise_l2"), ("bf16", "fp32")
BUILD = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from d2s.kernels.build import assembly, jobs
found = {}
for name, dtype in json.loads(sys.argv[1]):
    spec = jobs.all_specs()[name]
    job = next(job for job in jobs.all_jobs([spec], [90], {}) if (job.dtype, job.width) == (dtype, 64))
    options = spec.launch_options(job.tile, job.width, job.half)
    built = triton.compile(jobs.source(spec, job), target=GPUTarget("cuda", 90, 32), options=options)
    found[f"{name} {dtype}"] = assembly.disassemble(built.asm["cubin"])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def machine_code():
    """The machine code of every kernel and type, built in one process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = json.dumps([(kernel, dtype) for kernel in KERNELS for dtype in DTYPES])
    done = subprocess.run(
        [sys.executable, "-c", BUILD, asked],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_are_rounded_before_they_are_subtracted(kernel, dtype, machine_code):
    code = machine_code[f"{kernel} {dtype}"]
    # A product by itself is a multiply-add of zero here; were it contracted, there would be none left to subtract.
    rounded = len(re.findall(r"FFMA[^;]*, RZ\s*;", code))
    subtracted = len(
        re.findall(r"FADD(?:\.FTZ)? R\d+, R\d+(?:\.reuse)?, -R\d+|FADD(?:\.FTZ)? R\d+, -R\d+", code)
    )
    assert rounded > 0
    assert 2 * subtracted >= rounded, "each difference has two sides"
