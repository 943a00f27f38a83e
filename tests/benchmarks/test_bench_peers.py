"""Other people's losses in the benchmark: the same numbers as the textbook, and nothing breaks where they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastdistil.benchmarks import losses, peers, problems, run, work
from fastdistil.benchmarks.cases import Case

DEVICE = run.device_here()
OURS = f"fastdistil:{'cpu' if DEVICE == 'cpu' else 'triton'}"
RATES = {"copy_gb_s": 10.0, "matrix_gflop_s": 100.0}
PEER_CASES = [(name, op, kind) for op, kinds, names in (
    ("logits", ("forward_kl",), ("liger_kl", "liger_jsd")),
    ("logits", ("jsd",), ("liger_jsd",)),
    ("linear", ("forward_kl",), ("liger_jsd", "orda", "fla_kl", "linear_cross_entropy")),
    ("linear", ("jsd",), ("liger_jsd", "orda")),
    ("logits", ("forward_kl", "jsd", "reverse_kl"), ("trl",)),
    ("linear", ("forward_kl", "jsd", "reverse_kl"), ("trl",)),
) for kind in kinds for name in names]  # fmt: skip


@pytest.mark.parametrize(("name", "op", "kind"), PEER_CASES)
def test_peers_compute_the_same_loss(name: str, op: str, kind: str) -> None:
    """On a CPU in Triton's interpreter; orda-kernel has plain PyTorch there."""
    shape = {"N": 5, "V": 131, "D_s": 16, "D_t": 24}
    temperature = 1.0 if name in ("fla_kl", "liger_jsd") and op == "linear" else 2.0
    case = Case(op, "tiny", shape, (name,), options={"divergence": kind, "temperature": temperature})
    problem = problems.make(case, DEVICE, 1.0)
    try:
        implementation = losses.build(name, case, problem)
    except work.Unavailable as reason:
        pytest.skip(str(reason))
    assert max(work.errors(implementation.outcome(), problems.truth(case, problem)).values()) < 1e-4


def test_peers_have_no_other_loss_than_theirs() -> None:
    case = Case("linear", "tiny", {"N": 2, "V": 7, "D_s": 3, "D_t": 3}, (), options={"divergence": "mse", "temperature": 2.0})  # fmt: skip
    problem = problems.make(case, DEVICE, 1.0)
    for name in peers.PEERS:
        with pytest.raises(work.Unavailable, match="is not installed|has no|alone$|cannot be"):
            losses.build(name, case, problem)


def test_an_implementation_that_crashes_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(case: Case, device: torch.device) -> Callable[..., torch.Tensor]:
        return lambda x: torch.ones(2) @ torch.ones(3)

    monkeypatch.setitem(peers.PEERS, "liger_kl", crash)
    options = {"divergence": "forward_kl", "temperature": 2.0}
    names = ("eager", "liger_kl", OURS)
    case = Case("logits", "tiny", {"N": 5, "V": 131}, names, options=options, repetitions=2, memory=False)
    eager, broken, ours = run.run_case(case, DEVICE, RATES, lambda text: None)
    assert (eager["status"], broken["status"], ours["status"]) == ("ok", "failed", "ok")
    assert broken["reason"].startswith("RuntimeError: ")
    assert "time_us" not in broken
