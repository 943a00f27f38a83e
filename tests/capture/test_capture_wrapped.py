"""capture through whatever wraps a model, a block that it never runs in, and captures opened inside of compiled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_capture import _inputs, _model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastdistil.models.capture import capture
from fastdistil.models.student import with_blocks


class Forwarding(nn.Module):
    """As PEFT's tuners and sentence-transformers' modules: unknown attributes, `config` too, are the inner model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Direct(Forwarding):
    """Calls `forward` itself: no hook of the inner model runs."""

    def forward(self, **inputs: Any) -> Any:
        return self.model.forward(**inputs)


class Peft(Forwarding):
    """A PeftModel without a task type: its base_model, the tuner, never runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.base_model = Forwarding(model)

    def forward(self, **inputs: Any) -> Any:
        return self.base_model.model(**inputs)


class Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"encoder": model, "head": nn.Linear(32, 2)})

    def forward(self, **inputs: Any) -> Any:
        return self.inner["head"](self.inner["encoder"](**inputs)[0])


@pytest.mark.parametrize("wrap", [Direct, Peft, Plain])
@pytest.mark.parametrize("head", [False, True])
def test_wrappers(wrap: type[nn.Module], head: bool) -> None:
    if wrap is Plain and head:
        pytest.skip("its head takes hidden states")
    model, inputs = _model("bert", head=head), _inputs()
    parts = {"hidden_states": [0, 2], "queries": [1], "keys": [1]}
    with capture(model, **parts) as expected:
        model(**inputs)
    wrapped = wrap(model)
    before = {name: sorted(vars(module)) for name, module in wrapped.named_modules()}
    for target in (wrapped, model):
        with capture(target, **parts) as captured:
            wrapped(**inputs)
        for name in parts:
            for layer, tensor in getattr(expected, name).items():
                assert torch.equal(getattr(captured, name)[layer], tensor)
    assert before == {name: sorted(vars(module)) for name, module in wrapped.named_modules()}
    assert "forward" not in vars(model)


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_peft(task: str | None) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_model("bert"), peft.LoraConfig(task_type=task, target_modules=["query"]))
    with capture(model, queries=[1], hidden_states=[3]) as captured:
        output = model(**_inputs())[0]
    assert torch.equal(captured.hidden_states[3], output)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_sentence_transformers(family: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    _model(family).save_pretrained(tmp_path)
    words = WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3, "cat": 4}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu").eval()
    features = model.preprocess(["a dog", "a cat a dog"])
    for target in (model, model[0], model[0].auto_model):
        with capture(target, queries=[1], hidden_states=[3]) as captured:
            output = model(dict(features))["token_embeddings"]
        assert captured.queries[1].shape == (2, 4, 4, 8) and torch.equal(captured.hidden_states[3], output)
    with capture(model, hidden_states=[3]) as captured:
        embedding = model.encode(["a dog"], convert_to_tensor=True)
    torch.testing.assert_close(captured.hidden_states[3].mean(1), embedding)


def test_several_models_in_one_wrapper() -> None:
    both = nn.ModuleDict({"student": _model("bert"), "teacher": _model("distilbert")})
    message = (
        r"capture: model is ModuleDict, which holds 2 transformers models \(BertModel, DistilBertModel\), expected"
    )
    with pytest.raises(ValueError, match=message), capture(both, queries=[1]):
        pass
    student = with_blocks(Plain(_model("bert")), [0, 2])
    assert len(student.inner["encoder"].encoder.layer) == 2


def test_a_forward_that_somebody_replaced_is_called_and_comes_back() -> None:
    model, inputs = _model("bert"), _inputs()
    calls = []
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:  # as accelerate does
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = forward
    with capture(model, queries=[1]) as captured:
        model(**inputs)
    assert calls == [1] and list(captured.queries) == [1] and vars(model)["forward"] is forward


def test_a_model_that_never_runs_is_named() -> None:
    model, other = _model("bert"), _model("bert")
    message = r"capture: no forward pass of BertModel ran to its end inside of the with block on this thread"
    with pytest.raises(RuntimeError, match=message), capture(model, queries=[1]):
        other(**_inputs())
    assert model.config._attn_implementation == "sdpa" and "forward" not in vars(model)
    with pytest.raises(KeyError, match="first"), capture(model, queries=[1]):
        raise KeyError("first")
    with capture(model):
        pass


def test_opened_inside_of_one_graph() -> None:
    torch._dynamo.reset()
    model, inputs = _model("bert", blocks=2), _inputs()
    before = model.config._attn_implementation

    def step(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with capture(model, hidden_states=[0, 2], queries=[1, 2], keys=[2]) as captured:
            model(input_ids=ids, attention_mask=mask)
        return captured.hidden_states[0], captured.hidden_states[2], captured.queries[1], captured.keys[2]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    expected = step(*inputs.values())
    for _ in range(2):
        found = compiled(*inputs.values())
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert model.config._attn_implementation == before
    sum(x.square().sum() for x in found).backward()
    weight = model.get_input_embeddings().weight
    gradient, weight.grad = weight.grad.clone(), None
    sum(x.square().sum() for x in step(*inputs.values())).backward()
    torch.testing.assert_close(gradient, weight.grad)
    with capture(model, queries=[1]) as captured:  # and from outside, as ever
        model(**inputs)
    torch.testing.assert_close(captured.queries[1], expected[2])
