"""capture: what it takes equals what eager attention shows, SDPA stays on, and nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdistil.models.capture import capture

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 99, "max_position_embeddings": 64}


def _model(family: str, blocks: int = 3, head: bool = False, implementation: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "distilbert":
        config = transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=blocks, n_heads=4, **SIZES)
    else:
        kind = {
            "bert": transformers.BertConfig,
            "roberta": transformers.RobertaConfig,
            "xlm-roberta": transformers.XLMRobertaConfig,
        }[family]
        config = kind(hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=4, **SIZES)
    build = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    return build.from_config(config, attn_implementation=implementation).eval()


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 99, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_what_eager_attention_shows(family: str, head: bool, implementation: str) -> None:
    inputs = _inputs()
    shown = _model(family, head=head, implementation="eager")(
        **inputs, output_attentions=True, output_hidden_states=True
    )
    model = _model(family, head=head, implementation=implementation)
    plain = model(**inputs)[0]
    layers = [1, 3]
    with capture(model, hidden_states=[0, 1, 2, 3], queries=layers, keys=layers, values=[2]) as captured:
        output = model(**inputs)[0]
    assert torch.equal(output, plain)
    assert sorted(captured.hidden_states) == [0, 1, 2, 3]
    for layer, states in captured.hidden_states.items():
        torch.testing.assert_close(states, shown.hidden_states[layer])
    assert sorted(captured.queries) == sorted(captured.keys) == layers
    assert list(captured.values) == [2] and captured.values[2].shape == (2, 4, 11, 8)
    for layer in layers:
        query, key = captured.queries[layer], captured.keys[layer]
        assert query.shape == key.shape == (2, 4, 11, 8)
        scores = (query @ key.mT / 8**0.5).masked_fill(inputs["attention_mask"][:, None, None] == 0, -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), shown.attentions[layer - 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_the_weights(family: str) -> None:
    model = _model(family).train()
    with capture(model, hidden_states=[1], queries=[1], keys=[1], values=[1]) as captured:
        model(**_inputs())
    for tensors in (captured.hidden_states, captured.queries, captured.keys, captured.values):
        assert tensors[1].requires_grad
    (captured.queries[1].sum() + captured.keys[1].square().sum()).backward()
    grad = model.embeddings.word_embeddings.weight.grad
    assert grad is not None and float(grad.abs().sum()) > 0


def test_sdpa_keeps_running(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs),
    )
    model = _model("bert")
    with capture(model, queries=[2]):
        model(**_inputs())
    assert len(calls) == 3


def _state(model: torch.nn.Module) -> tuple[object, ...]:
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return model.config._attn_implementation, hooks, model.config.to_dict(), [sorted(vars(m)) for m in model.modules()]


def test_nothing_stays_behind_even_after_an_exception() -> None:
    model = _model("bert", head=True)
    before = _state(model)
    with capture(model, hidden_states=[0, 3], queries=[1], keys=[2], values=[3]):
        model(**_inputs())
    assert _state(model) == before
    with pytest.raises(RuntimeError, match="stop"), capture(model, hidden_states=[0], queries=[1]):
        raise RuntimeError("stop")
    assert _state(model) == before
    with pytest.raises(ValueError, match="layer 9"), capture(model, hidden_states=[0], queries=[1, 9]):
        pass
    assert _state(model) == before


def test_a_pass_that_fails_shows_nothing_and_a_copied_model_is_not_heard() -> None:
    model, inputs = _model("bert"), _inputs()
    with capture(model, queries=[1]) as captured:
        with pytest.raises(IndexError):
            model(inputs["input_ids"] + 1000)
        assert not captured.queries
        copy.deepcopy(model)(**inputs)
        assert not captured.queries
        model(**inputs)
        assert list(captured.queries) == [1]


def test_two_models_do_not_mix() -> None:
    inputs = _inputs()
    teacher, student = _model("bert"), _model("bert", blocks=2)
    student.embeddings.word_embeddings.weight.data += 0.1
    with capture(teacher, queries=[1]) as alone:
        teacher(**inputs)
    with capture(student, queries=[1]) as alone_student:
        student(**inputs)
    with capture(teacher, queries=[1], hidden_states=[3]) as of_teacher, capture(student, queries=[1]) as of_student:
        teacher(**inputs)
        student(**inputs)
    assert torch.equal(of_teacher.queries[1], alone.queries[1])
    assert torch.equal(of_student.queries[1], alone_student.queries[1])
    assert not of_student.hidden_states and list(of_teacher.hidden_states) == [3]


def test_two_models_that_share_a_configuration_may_close_in_any_order() -> None:
    first = _model("bert")
    second = type(first)(first.config).eval()
    a, b = capture(first, queries=[1]), capture(second, queries=[1])
    captured_a, captured_b = a.__enter__(), b.__enter__()
    first(**_inputs())
    assert captured_a.queries and not captured_b.queries
    a.__exit__(None, None, None)
    second(**_inputs())
    assert captured_b.queries
    b.__exit__(None, None, None)
    assert first.config._attn_implementation == "sdpa"


def test_a_configuration_copied_inside_of_a_capture_gets_its_own_name_back() -> None:
    model = _model("bert")
    with capture(model, queries=[1]):
        student = type(model)(copy.deepcopy(model.config)).eval()
        student.load_state_dict(model.state_dict())
        model(**_inputs())
    with capture(student, queries=[1]) as of_student, capture(model, queries=[1]) as captured:
        student(**_inputs())
        model(**_inputs())
    assert torch.equal(of_student.queries[1], captured.queries[1])
    assert student.config._attn_implementation == "sdpa"


def test_a_block_that_attends_twice_is_named() -> None:
    """Its own keys and the encoder's: neither is silently taken for the other."""
    size = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(d_model=16, encoder_layers=2, decoder_layers=2, **size, **SIZES)
    model = transformers.BartModel(config).eval()
    with capture(model.encoder, queries=[1], keys=[2]), capture(model.decoder, hidden_states=[0, 1, 2]) as captured:
        model(**_inputs())
    assert list(captured.hidden_states) == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"capture: keys of layer 2 of BartDecoder cannot .* twice in one pass"):  # noqa: SIM117
        with capture(model.decoder, keys=[2]) as captured:
            model(**_inputs())
    assert not captured.keys


def test_two_captures_on_one_model() -> None:
    model = _model("distilbert")
    with capture(model, queries=[1]) as outer:
        with capture(model, queries=[1], keys=[2]) as inner:
            model(**_inputs())
        seen = outer.queries[1]
        model(input_ids=torch.full((1, 4), 7))
    assert torch.equal(inner.queries[1], seen)
    assert outer.queries[1].shape[2] == 4 and inner.queries[1].shape[2] == 11
    assert model.config._attn_implementation == "sdpa"


BAD = [
    ({"hidden_states": [4]}, ValueError, "capture: hidden_states asks for layer 4, expected 0 to 3: BertModel has 3 "),
    ({"queries": [0]}, ValueError, "capture: queries asks for layer 0, expected 1 to 3: BertModel has 3 blocks"),
    ({"keys": [1, -1]}, ValueError, "capture: keys asks for layer -1, expected 1 to 3"),
    ({"values": [1.0]}, TypeError, "capture: values holds 1.0, expected whole numbers"),
    ({"values": [True]}, TypeError, "capture: values holds True, expected whole numbers"),
    ({"queries": 1}, TypeError, "capture: queries is int, expected a list of layers"),
    ({"queries": "12"}, TypeError, "capture: queries is str, expected a list of layers"),
]


@pytest.mark.parametrize(("layers", "error", "message"), BAD)
def test_bad_layers(layers: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised, capture(_model("bert"), **layers):  # type: ignore[arg-type]
        pass
    assert message in str(raised.value)


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"capture: model is str, expected a transformers model"), capture("bert"):  # type: ignore[arg-type]
        pass
    message = r"capture: model is Linear, expected a transformers model, whose config names its attention"
    with pytest.raises(ValueError, match=message), capture(torch.nn.Linear(2, 2), queries=[1]):
        pass
    config = transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=2, num_heads=2, vocab_size=9)
    both = transformers.T5Model(config)
    with pytest.raises(
        ValueError, match="capture: model is T5Model, which has 2 lists of 2 blocks, expected one; of an"
    ):
        capture(both, queries=[1]).__enter__()
