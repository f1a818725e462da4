"""The benchmark of a GPU runs on a CPU with tiny systems, computes what it says, and says where there is no GPU."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu
from benchmarks.workloads import Workload

CPU = torch.device("cpu")
KEYS = pytest.mark.parametrize("key", gpu.PROBLEMS)
QUICK = ("torch", "torch-device", "nablasolve")


@pytest.fixture
def quick(monkeypatch):
    """One call a sample, of few iterations, and a bandwidth of little data."""
    monkeypatch.setattr(gpu, "SAMPLE", 0.0)
    monkeypatch.setattr(gpu, "FEW", 2)
    monkeypatch.setattr(gpu, "MANY", 9)
    monkeypatch.setattr(gpu, "STREAMED", {"cpu": 2**16})


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "no CUDA device" in said.err
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_refused(capsys, tmp_path):
    assert gpu.main(["--device", "cpu", "--libraries", "nobody", "--out", str(tmp_path)]) == 2
    assert gpu.main(["--device", "cpu", "--workloads", "W3", "--out", str(tmp_path)]) == 2
    assert "nobody" in capsys.readouterr().err


def test_on_a_cpu_every_library_that_is_there_is_measured(quick, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.ByHandCompiled, "missing", lambda self, device: "takes seconds to compile")
    for name in ("nablasolve-compiled", "jax.scipy", "lineax"):
        monkeypatch.setattr(type(gpu.LIBRARIES[name]), "missing", lambda self, device: "takes seconds to compile")
    assert gpu.main(["--device", "cpu", "--sizes", "3e2", "--rounds", "1", "--limit", "60", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = {(row["workload"], row["library"]): row for row in results["rows"]}
    assert set(rows) == {(key, name) for key in gpu.PROBLEMS for name in gpu.LIBRARIES}
    for key in gpu.PROBLEMS:
        for name in QUICK:
            assert rows[key, name]["status"] == "ok"
            assert rows[key, name]["share"] is not None
            assert rows[key, name]["distance"] < 1e-3
        assert rows[key, "torch-graph"]["status"] == "needs CUDA"
    assert all(rows[key, "cupy"]["microseconds"] is None for key in gpu.PROBLEMS)
    assert set(results["bandwidth"]) == {"copy", "triad"}
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert page.count("### W1") == 2  # the workload, and its one system
    assert all(f"| {name} |" in page for name in gpu.LIBRARIES)
    assert "results.md" in capsys.readouterr().out


@KEYS
def test_a_system_has_about_the_unknowns_that_are_asked_for(key):
    for unknowns in (10**3, 3 * 10**4):
        workload = gpu.problem(key, unknowns, CPU)
        assert abs(workload.b.numel() - unknowns) < 0.1 * unknowns
        assert workload.theta.dtype == workload.b.dtype == workload.dtype
        assert workload.iteration_bytes() > 12 * workload.b.nbytes


def test_a_batch_is_made_in_parts(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK", 3)
    theta = gpu.problem("W4", 320, CPU).theta
    torch.testing.assert_close(theta, theta.mT)
    assert torch.linalg.eigvalsh(theta).min() > 0.099
    assert len({round(float(matrix[0, 0]), 9) for matrix in theta}) == len(theta)


@KEYS
def test_the_loops_by_hand_are_the_floor(key):
    workload = gpu.problem(key, 500, CPU)
    one, other = (gpu.LIBRARIES[name].solver(workload)(4) for name in ("torch", "torch-device"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


@KEYS
def test_what_computes_something_else_is_found_out(key):
    class Lazy(gpu.ByHand):
        def solver(self, workload: Workload) -> gpu.Solve:
            right = super().solver(workload)
            return lambda iterations: right(iterations - 1)

    workload = gpu.problem(key, 500, CPU)
    row = gpu.Row(key, 500, "lazy")
    gpu.fill(row, Lazy(), workload, gpu.Reference.of(workload), 1.0, 1)
    assert row.status == "computes something else"
    assert row.microseconds is None


def test_what_stops_early_is_found_out():
    class Stops(gpu.ByHand):
        def solver(self, workload: Workload) -> gpu.Solve:
            right = super().solver(workload)
            return lambda iterations: right(min(iterations, 40))

    workload = gpu.problem("W1", 500, CPU)
    row = gpu.Row("W1", 500, "stops")
    gpu.fill(row, Stops(), workload, gpu.Reference.of(workload), 1.0, 1)
    assert row.distance == 0
    assert row.status == "computes something else"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("key", ["W1", "W2"])
def test_the_adapter_of_cupy_is_right_with_numpy_in_its_place(key, old, monkeypatch):
    def new_cg(A, b, x0=None, *, rtol=1e-5, atol=0.0, maxiter=None):
        return scipy.sparse.linalg.cg(A, b, rtol=rtol, atol=atol, maxiter=maxiter)

    def old_cg(A, b, x0=None, tol=1e-5, maxiter=None, M=None, callback=None, atol=None):
        return scipy.sparse.linalg.cg(A, b, rtol=tol, atol=atol, maxiter=maxiter)

    linalg = types.ModuleType("cupyx.scipy.sparse.linalg")
    linalg.cg, linalg.LinearOperator = old_cg if old else new_cg, scipy.sparse.linalg.LinearOperator
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, linalg.__name__, linalg)
    monkeypatch.setitem(sys.modules, "cupy", np)

    workload, cupy = gpu.problem(key, 500, CPU), gpu.LIBRARIES["cupy"]
    assert cupy.missing(CPU) == "needs CUDA"
    assert cupy.missing(torch.device("cuda")) is None
    x = cupy.tensor(cupy.solver(workload)(4)).reshape(workload.b.shape)
    reference = gpu.LIBRARIES["torch"].solver(workload)(4)
    torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())
    assert not cupy.supports(gpu.problem("W4", 320, CPU))


@KEYS
@pytest.mark.parametrize("name", ["jax.scipy", "lineax"])
def test_the_adapters_of_jax_share_memory_and_agree(key, name, monkeypatch):
    pytest.importorskip("jax")
    pytest.importorskip(name.split(".")[0])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    workload, library = gpu.problem(key, 500, CPU), gpu.LIBRARIES[name]
    x = library.tensor(library.solver(workload)(4))
    reference = gpu.LIBRARIES["torch"].solver(workload)(4)
    torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


def test_what_is_too_slow_or_fails_is_reported(quick):
    class Slow(gpu.ByHand):
        name = "slow"

        def solver(self, workload: Workload) -> gpu.Solve:
            while True:
                pass

    class Broken(gpu.ByHand):
        name = "broken"

        def solver(self, workload: Workload) -> gpu.Solve:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    results = gpu.measure(["W1"], [300], [Slow(), Broken(), gpu.ByHand()], CPU, rounds=1, limit=0.3)
    assert {row.library: row.status for row in results.rows} == {
        "slow": "over 0.3 s", "broken": "fails: out of memory", "torch": "ok"
    }  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KEYS
@pytest.mark.parametrize("name", ["torch-device", "torch-graph", "nablasolve"])
def test_on_a_gpu_the_iterates_are_those_of_the_floor(key, name):
    workload = gpu.problem(key, 3000, torch.device("cuda"))
    reference, x = (gpu.LIBRARIES[library].solver(workload)(4) for library in ("torch", name))
    torch.testing.assert_close(x, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())
