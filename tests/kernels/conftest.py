"""Lets the tests of this folder import `problems`, and counts the Triton kernels that they launch."""

import os
import sys
from collections import Counter
from functools import wraps
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

LAUNCHES: Counter[str] = Counter()
# complete: the session runs all tests of this folder. deselected: some of them were left out by an option.
_session = {"complete": False, "deselected": False}


def _specs() -> tuple:
    try:
        from d2s.kernels.fused import ALL_SPECS
    except ImportError:
        return ()
    return tuple(ALL_SPECS)


def _name(kernel) -> str:
    """Kernels of several modules may share a name."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def _counted(run, name):
    @wraps(run)
    def launch(*arguments, **keywords):
        LAUNCHES[name] += 1
        return run(*arguments, **keywords)

    return launch


# These files test commands, imports and the CPU's own code, so they compute on the CPU whatever the device is. Single
# tests of that kind are marked `on_cpu`.
COMMANDS = "bench bench_usage compile compile_usage gpu_script imports results tiles tune tune_usage"
ON_CPU = {f"test_{name}.py" for name in f"{COMMANDS} devices gpo_order rank_ties".split()}


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "on_cpu: about the CPU's way of computing, also where a device is tested"
    )


@pytest.fixture(autouse=True)
def _on_the_device(request):
    """With D2S_TEST_DEVICE=cuda a test's tensors are made on the device unless it says otherwise.

    Only where a test runs: what a module makes when it is imported lies on the CPU. Random numbers come from
    `problems.Numbers`; torch.Generator stays what it is, because torch itself asks for its type.
    """
    device = os.environ.get("D2S_TEST_DEVICE", "cpu")
    if device == "cpu" or request.path.name in ON_CPU or request.node.get_closest_marker("on_cpu"):
        yield
        return
    with torch.device(device):
        yield


@pytest.fixture
def files_on_cpu():
    return ON_CPU


@pytest.fixture(scope="session", autouse=True)
def _count_launches():
    """Wraps every kernel's attribute `run`, through which it is launched, to count the launches."""
    kernels = {id(spec.kernel): spec.kernel for spec in _specs()}.values()
    for kernel in kernels:
        kernel.run = _counted(kernel.run, _name(kernel))
    yield
    for kernel in kernels:
        del kernel.run


def pytest_deselected(items):
    if any(item.path.is_relative_to(HERE) for item in items):
        _session["deselected"] = True


def pytest_collection_finish(session):
    one_test_named = any("::" in argument for argument in session.config.args)
    _session["complete"] = {*HERE.rglob("test_*.py")} <= {item.path for item in session.items}
    _session["complete"] &= not one_test_named and not _session["deselected"]


def _never_launched() -> list[str]:
    return sorted({_name(spec.kernel) for spec in _specs()}.difference(LAUNCHES))


def pytest_sessionfinish(session, exitstatus):
    if _session["complete"] and exitstatus == pytest.ExitCode.OK and _never_launched():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    specs = _specs()
    if not specs or not _session["complete"]:
        return
    where = "in the interpreter" if type(specs[0].kernel).__name__ == "InterpretedFunction" else "on a device"
    never = _never_launched()
    every = len({id(spec.kernel) for spec in specs})
    launches = f"{every - len(never)} of {every}, {LAUNCHES.total()} launches"
    terminalreporter.write_line(f"Triton kernels run {where}: {launches}", red=bool(never), green=not never)
    for name in never:
        terminalreporter.write_line(f"never launched by any test: {name}", red=True)
