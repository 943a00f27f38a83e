"""capture of compiled models: one graph, made once for all captures of the same parts, whoever opens them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from test_capture import _inputs, _model
from test_capture_anywhere import _decoder

from fastdistil.models.capture import capture

pytest.importorskip("transformers")


def _counting(graphs: list[torch.fx.GraphModule]) -> Callable[..., object]:
    """A torch.compile backend that runs the graph as it is and keeps it."""

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize(("family", "fullgraph"), [("bert", False), ("llama", True)])
def test_under_compile(family: str, fullgraph: bool) -> None:
    """One graph with the values and gradients of eager mode, also in later captures, which meet the code of earlier
    ones, and after the captures."""
    torch._dynamo.reset()
    model = (_model if family == "bert" else _decoder)(family, blocks=2).train(False)
    inputs = _inputs()

    def gradients(captured: object, parts: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(getattr(captured, name)[layer].square().sum() for name in parts for layer in parts[name]).backward()
        # a graph gives zeros to weights behind the last captured layer
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    plain = model(**inputs)[0]
    torch.testing.assert_close(compiled(**inputs)[0], plain)
    for parts in ({"queries": [2]}, {"keys": [2], "values": [2], "hidden_states": [0, 1, 2]}):
        with capture(model, **parts) as expected:
            model(**inputs)
        with capture(compiled, **parts) as captured:
            torch.testing.assert_close(compiled(**inputs)[0], plain)
        for name, layers in parts.items():
            assert list(getattr(captured, name)) == layers
            for layer in layers:
                torch.testing.assert_close(getattr(captured, name)[layer], getattr(expected, name)[layer])
        found, wanted = gradients(captured, parts), gradients(expected, parts)
        assert found.keys() == wanted.keys() and len(found) > 5
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient)
    torch.testing.assert_close(compiled(**inputs)[0], plain)


def test_one_graph_serves_every_capture_of_the_same_parts() -> None:
    """Two models of one class share compiled code too, and neither hears the other."""
    torch._dynamo.reset()
    inputs, graphs = _inputs(), list[torch.fx.GraphModule]()
    first = _model("bert", blocks=2, head=True)
    second = type(first)(first.config).eval()
    backend = _counting(graphs)
    compiled = [torch.compile(x, backend=backend, fullgraph=True) for x in (first, second)]
    found = []
    for _ in range(3):
        with capture(compiled[0], queries=[1, 2], hidden_states=[0]) as captured:
            for _ in range(2):
                compiled[0](**inputs)
            found.append(captured)
    assert len(graphs) == 1
    with capture(compiled[1], queries=[1]) as other:
        compiled[0](**inputs)
        assert not other.queries
        compiled[1](**inputs)
    with capture(second, queries=[1]) as expected:
        second(**inputs)
    torch.testing.assert_close(other.queries[1], expected.queries[1])
    assert len({id(x.queries[1]) for x in found}) == 3 and not torch.equal(other.queries[1], found[0].queries[1])
    for captured in found:
        assert torch.equal(captured.queries[1], found[0].queries[1])


@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_that_are_compiled_one_by_one(fullgraph: bool) -> None:
    """More of them than torch.compile would make versions of one function, were the layer's number in the graph."""
    torch._dynamo.reset()
    inputs, graphs = _inputs(), list[torch.fx.GraphModule]()
    model = _model("bert", blocks=12)
    wanted = {"hidden_states": range(13), "keys": range(1, 13)}
    with capture(model, **wanted) as expected:
        model(**inputs)
    backend = _counting(graphs)
    for block in model.encoder.layer:
        block.compile(backend=backend, fullgraph=fullgraph)
    with capture(model, **wanted) as captured:
        model(**inputs)
    assert len(graphs) <= 3
    for name, layers in wanted.items():
        for layer in layers:
            torch.testing.assert_close(getattr(captured, name)[layer], getattr(expected, name)[layer])


def test_compiled_code_in_threads() -> None:
    """The threads share the code; each finds its own capture."""
    torch._dynamo.reset()
    model, inputs = _model("bert", blocks=1), _inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found: dict[int, object] = {}
    barrier = threading.Barrier(2)

    def work(length: int) -> None:
        with capture(model, queries=[1]) as captured:
            barrier.wait()
            for _ in range(3):
                compiled(inputs["input_ids"][:, :length])
            barrier.wait()
        found[length] = captured

    with capture(compiled, queries=[1]) as outer:
        compiled(inputs["input_ids"])
        kept = outer.queries[1]
        threads = [threading.Thread(target=work, args=(length,)) for length in (5, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert outer.queries[1] is kept
    for length in (5, 9):
        with capture(model, queries=[1]) as expected:
            model(inputs["input_ids"][:, :length])
        torch.testing.assert_close(found[length].queries[1], expected.queries[1])


def test_checkpointing_in_one_graph_needs_dynamos_leave() -> None:
    torch._dynamo.reset()
    model, inputs = _model("bert", blocks=2).train(), _inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with capture(model, queries=[2]) as expected:
        model(**inputs)
    expected.queries[2].square().sum().backward()
    weight = model.embeddings.word_embeddings.weight
    wanted, weight.grad = weight.grad, None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with (
        pytest.raises(torch._dynamo.exc.Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint"),
        capture(compiled, queries=[2]),
    ):
        compiled(**inputs, use_cache=False)
    leave = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    with leave, capture(compiled, queries=[2]) as captured:
        compiled(**inputs, use_cache=False)
        captured.queries[2].square().sum().backward()
    torch.testing.assert_close(captured.queries[2], expected.queries[2])
    torch.testing.assert_close(weight.grad, wanted)
