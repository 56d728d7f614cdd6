"""On a device, too, equal things differ by nothing: shown in the machine code, which an interpreter has not."""

import json
import os
import re
import subprocess
import sys

import pytest

KERNELS, DTYPES = ("relational_difference", "pointwise_l1", "pointwise_l2"), ("bf16", "fp32")
BUILD = """
import json, subprocess, sys, tempfile
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from d2s.kernels import builds
from d2s.kernels.fused import ALL_SPECS
found = {}
for name, dtype in json.loads(sys.argv[1]):
    spec = next(spec for spec in ALL_SPECS if spec.name == name)
    job = next(job for job in builds.all_jobs([spec], {}) if (job.arch, job.dtype, job.width) == (90, dtype, 64))
    options = spec.launch_options(job.tile, job.width, job.half)
    built = triton.compile(builds.source(spec, job), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        found[f"{name} {dtype}"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
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
