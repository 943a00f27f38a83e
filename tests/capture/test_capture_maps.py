"""captured.attention: from the queries, the keys and the record of a layer comes the map that eager attention shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_capture import SIZES, _inputs, _model
from test_capture_anywhere import _decoder

from fastdistil.models.capture import capture

transformers = pytest.importorskip("transformers")


def _build(family: str, blocks: int = 3) -> torch.nn.Module:
    """The part of a tiny model that has one list of three (or two) blocks."""
    if family in ("bert", "xlm-roberta", "distilbert"):
        return _model(family)
    if family in ("modernbert", "llama", "qwen3", "gemma", "gemma3"):
        return _decoder(family, blocks)
    torch.manual_seed(0)
    size = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, **size}
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    narrow = {**wide, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, **SIZES}
    if family == "opt":
        config = transformers.OPTConfig(
            hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16, **SIZES
        )
    elif family == "bart":
        config = transformers.BartConfig(**layers, **SIZES)
    elif family == "whisper":
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = transformers.WhisperConfig(**layers, num_mel_bins=8, max_source_positions=20, vocab_size=99, **tokens)
    elif family == "t5":
        sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
        config = transformers.T5Config(**sizes, relative_attention_num_buckets=8, relative_attention_max_distance=6)
    elif family == "gemma2":
        config = transformers.Gemma2Config(**narrow, attn_logit_softcapping=0.5, sliding_window=4)
    elif family == "mistral":
        config = transformers.MistralConfig(**narrow, sliding_window=4)
    elif family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=99)
        config.scale_attn_by_inverse_layer_idx = True
    implementation = "eager" if family == "gemma2" and not GEMMA2_HAS_SDPA else "sdpa"
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():  # maps that are far from flat, and biases that are far from 0
        for p in model.parameters():
            p.mul_(4.0)
    return model.encoder if family in ("bart", "whisper", "t5") else model


def _call(family: str, padding: str | None) -> dict[str, torch.Tensor]:
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))}
    inputs = _inputs()
    if padding is None:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    elif padding == "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


# transformers 5.17 has it, without the softcap; 5.24 refuses it.
GEMMA2_HAS_SDPA = transformers.models.gemma2.modeling_gemma2.Gemma2PreTrainedModel._supports_sdpa
BIDIRECTIONAL = ["bert", "xlm-roberta", "distilbert", "modernbert", "bart", "t5", "whisper"]
CAUSAL = ["opt", "llama", "qwen3", "gemma", "gemma3", "gemma2", "mistral", "gpt2"]


def _rebuilt(captured: Any, layer: int) -> torch.Tensor:
    return captured.attention[layer].map(captured.queries[layer], captured.keys[layer])


@pytest.mark.parametrize("family", BIDIRECTIONAL + CAUSAL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_map_of_eager_attention_is_rebuilt(family: str, implementation: str) -> None:
    if family == "gemma2" and implementation == "sdpa" and not GEMMA2_HAS_SDPA:
        pytest.skip("this transformers refuses it")
    model = _build(family)
    for padding in (None, "right", "left"):
        inputs = _call(family, padding)
        if family == "whisper" and padding:
            continue
        model.set_attn_implementation("eager")
        shown = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation(implementation)
        if family == "gemma2" and implementation == "sdpa":
            config = copy.deepcopy(model.config)
            config.attn_logit_softcapping = None  # which SDPA leaves out
            uncapped = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
            uncapped.load_state_dict(model.state_dict())
            shown = uncapped(**inputs, output_attentions=True).attentions
        layers = range(1, len(shown) + 1)
        with capture(model, queries=layers, keys=layers) as captured:
            model(**inputs)
        assert list(captured.attention) == list(layers)
        rows = torch.ones(2, shown[0].shape[-1], dtype=torch.bool)
        if family != "whisper":
            rows = inputs["attention_mask"].bool()
        for layer in layers:
            found, keep = _rebuilt(captured, layer), rows[:, None, :, None]
            torch.testing.assert_close(found.masked_fill(~keep, 0.0), shown[layer - 1].masked_fill(~keep, 0.0))
            record = captured.attention[layer]
            assert record.causal is (family in CAUSAL)
            if record.mask is not None:
                assert record.mask.dtype == torch.bool and record.mask.shape[-2] == 1 and padding


@pytest.mark.parametrize(("family", "scale"), [("opt", 1.0), ("whisper", 1.0), ("t5", 1.0), ("llama", 8**-0.5)])
def test_scales(family: str, scale: float) -> None:
    model = _build(family)
    with capture(model, keys=[2]) as captured:
        model(**_call(family, None))
    assert captured.attention[2].scale == scale and list(captured.attention) == [2]


def test_windows_biases_and_caps() -> None:
    def record(family: str, layer: int, implementation: str = "sdpa") -> Any:
        model = _build(family)
        model.set_attn_implementation(implementation)
        with capture(model, queries=[layer]) as captured:
            model(**_call(family, "right"))
        return captured.attention[layer]

    assert record("modernbert", 1).window is None and record("modernbert", 2).window == (2, 2)
    assert record("mistral", 1).window == (3, 0) and record("llama", 1).window is None
    for implementation, softcap in (("sdpa", None), ("eager", 0.5)):
        if implementation == "eager" or GEMMA2_HAS_SDPA:
            first, second = (record("gemma2", layer, implementation) for layer in (1, 2))
            assert first.softcap == softcap and first.window == (3, 0) and second.window is None
    bias = record("t5", 2).bias
    assert bias.shape == (1, 2, 11, 11) and bias.requires_grad and record("bert", 1).bias is None


def test_a_mask_that_causal_and_window_do_not_explain() -> None:
    """A prefix that attends to itself both ways."""
    model, inputs = _build("llama"), _call("llama", None)
    visible = torch.ones(11, 11, dtype=torch.bool).tril()
    visible[:4, :4] = True
    mask = visible.expand(2, 1, 11, 11)
    with capture(model, queries=[1], keys=[1]) as captured:
        model(inputs["input_ids"], attention_mask=mask)
    record = captured.attention[1]
    assert not record.causal and record.window is None and torch.equal(record.mask, mask)
    model.set_attn_implementation("eager")
    added = torch.zeros(2, 1, 11, 11).masked_fill(~mask, torch.finfo(torch.float32).min)
    shown = model(inputs["input_ids"], attention_mask=added, output_attentions=True).attentions[0]
    torch.testing.assert_close(_rebuilt(captured, 1), shown)
    tilted = added + torch.linspace(-1, 1, 11)
    with capture(model, queries=[1], keys=[1]) as captured:
        shown = model(inputs["input_ids"], attention_mask=tilted, output_attentions=True).attentions[0]
    torch.testing.assert_close(_rebuilt(captured, 1), shown)


def test_what_cannot_be_rebuilt_is_refused_when_it_is_asked_for() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GptOssConfig(
        **sizes, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, **SIZES
    )
    model = transformers.GptOssModel._from_config(config, attn_implementation="eager").eval()
    with capture(model, queries=[1]) as captured:
        model(**_inputs())
    assert captured.queries[1].shape == (2, 4, 11, 8)
    message = r"capture: the attention map of layer 1 of GptOssModel cannot be rebuilt: its call has attention sinks"
    with pytest.raises(RuntimeError, match=message):
        captured.attention[1]
    with pytest.raises(KeyError):
        captured.attention[2]
    model = _model("bert")

    def own(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> Any:
        return value.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("of_my_own", own)
    model.set_attn_implementation("of_my_own")
    with capture(model, queries=[1]) as captured:
        model(**_inputs())
    with pytest.raises(RuntimeError, match=r"its attention is 'of_my_own', expected 'sdpa' or 'eager'"):
        captured.attention[1]


def test_records_of_compiled_models() -> None:
    torch._dynamo.reset()
    model = _build("modernbert", blocks=2)  # the second looks through a window
    inputs = _call("modernbert", "right")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    layers = [1, 2]
    with capture(model, queries=layers, keys=layers) as expected:
        model(**inputs)
    with capture(compiled, queries=layers, keys=layers) as captured:
        compiled(**inputs)
    for layer in layers:
        ours, theirs = captured.attention[layer], expected.attention[layer]
        assert (ours.scale, ours.causal, ours.window) == (theirs.scale, theirs.causal, theirs.window)
        torch.testing.assert_close(_rebuilt(captured, layer), _rebuilt(expected, layer))
