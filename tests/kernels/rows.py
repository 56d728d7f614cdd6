"""One measurement, for what is made from measurements."""

from d2s.kernels.bench import record

ROW = record.Row(
    date="2026-01-02",
    device="CPU Some, 2 threads",
    torch="2.13.0",
    triton="",
    threads=2,
    case="info_nce",
    mode="full",
    provider="ours",
    dtype="float32",
    n=8192,
    tokens=0,
    width=512,
    timing="wall",
    repeats=3,
    median_ms=1000.0,
    p20_ms=990.0,
    p80_ms=1010.0,
    extra_mib=20.0,
    tflops=0.27,
    matmul_tflops=0.3,
    copy_gbs=20.0,
    floor_ms=900.0,
)
