"""Each operation of continual backprop on every backend of the CPU, by pytest-benchmark: `make bench-kernels`."""

import pytest
import torch

from cbp_fast.bench.kernels import CASES, operations

# those that take milliseconds
QUICK = [case for case in CASES if case.x <= 4096 and "batch 4096" not in case.name]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["read", "cpp", "reference"])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op} {case.name}")
def test_operation(benchmark, case, method):
    functions, moved = operations(case, "nature", "cpu", ("cpp" if method == "read" else method,))
    benchmark.group = f"{case.op} {case.name}"
    benchmark.extra_info["bytes"] = moved
    benchmark(functions[method])
    if benchmark.enabled:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
