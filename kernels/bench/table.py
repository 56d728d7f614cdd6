"""The printed table of a run."""

from d2s.kernels.bench.record import Row
from d2s.kernels.problems import Shape

HEADER = (
    f"{'case':10} {'mode':8} {'size':>11} {'provider':9} {'timing':6} {'median ms':>10} {'20 %':>9} {'80 %':>9}"
    f" {'extra MiB':>10} {'TFLOP/s':>8} {'of matmul':>9} {'of floor':>8} {'vs eager':>8} {'memory':>8}"
)


def show(rows: list[Row]) -> None:
    """Prints the rows; `vs eager` and `memory` are eager's time and memory divided by the row's."""
    eager = {(r.mode, r.timing): r for r in rows if r.provider == "eager"}
    for r in rows:
        base = eager.get((r.mode, r.timing))
        faster = f"{base.median_ms / r.median_ms:7.1f}x" if base else ""
        both = base and base.extra_mib is not None and r.extra_mib is not None
        # Less than a mebibyte is noise of the process.
        less = f"{base.extra_mib / max(r.extra_mib, 1):7.1f}x" if both else ""
        memory = "" if r.extra_mib is None else f"{r.extra_mib:.1f}"
        size = Shape(n=r.n, tokens=r.tokens, width=r.width)
        rate = f"{r.tflops:8.3f} {100 * r.tflops / r.matmul_tflops:7.1f} %" if r.tflops else f"{'':18}"
        print(
            f"{r.case:10} {r.mode:8} {size!s:>11} {r.provider:9} {r.timing:6} {r.median_ms:10.3f}"
            f" {r.p20_ms:9.3f} {r.p80_ms:9.3f} {memory:>10} {rate} {r.median_ms / r.floor_ms:7.1f}x"
            f" {faster:>8} {less:>8}",
            flush=True,
        )
    for ours in (r for r in rows if r.provider == "ours"):
        others = [r for r in rows if (r.mode, r.timing) == (ours.mode, ours.timing) and r is not ours]
        if others:
            than = ", ".join(f"{r.median_ms / ours.median_ms:.1f}x as fast as {r.provider}" for r in others)
            print(f"  {ours.case} {ours.mode}: ours is {than}", flush=True)
