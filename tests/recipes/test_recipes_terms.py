"""Terms against plain PyTorch on what the models themselves form: maps, relations, states, logits, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastdistil.models.student import with_blocks
from fastdistil.recipes import distilbert, minilm, terms, tinybert
from fastdistil.recipes.stages import Stage, draw_anew, run_stages
from fastdistil.recipes.terms import Distillation
from fastdistil.train import Options, train

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
# head_dim 8 is scaled by 64 ** -0.5, not by 8 ** -0.5
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 64, "sliding_window": 64}
MODERN = {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("Bert", {}),
    "Llama": ("Llama", {"num_key_value_heads": 1}),
    "ModernBert, layers of 20": ("ModernBert", {**MODERN, "local_attention": 20}),
    "Gemma 3": ("Gemma3Text", GEMMA),
    "OPT, which scales its queries": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
}


def made(family: str, more: dict[str, Any], layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more, "num_hidden_layers": layers})
    implementation = "eager" if family == "Gemma2" else "sdpa"  # which loses its softcap, or is refused
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():  # random weights make maps that are all alike
        for name, p in model.named_parameters():
            if any(x in name for x in ("query", "key", "q_proj", "k_proj", "Wqkv")):
                p.mul_(20)
    return model


def batch_of(length: int = 10, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def eager(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    return out


@pytest.mark.parametrize("student", ["Bert", "DistilBert"])
def test_pairs_keep_their_token_types_where_a_model_knows_them(student: str) -> None:
    models = []
    for name in (student, "Bert"):
        torch.manual_seed(len(models))
        sizes = {"dim": 16, "n_heads": 2, "hidden_dim": 32, "n_layers": 1} if name == "DistilBert" else {**SIZES}
        config = getattr(transformers, f"{name}Config")(
            **{"vocab_size": 50, "num_labels": 3, "initializer_range": 0.3, **sizes}
        )
        models.append(transformers.AutoModelForSequenceClassification.from_config(config).eval())
    batch = batch_of() | {"words": torch.ones(3)}
    batch["token_type_ids"] = (torch.arange(10) >= 5).long().repeat(3, 1)
    own = {k: batch[k] for k in ("input_ids", "attention_mask")}
    theirs = own | {"token_type_ids": batch["token_type_ids"]}
    logits = models[0](**(own if student == "DistilBert" else theirs)).logits
    with torch.no_grad():
        target = models[1](**theirs).logits
        assert (target - models[1](**own).logits).abs().max() > 1e-3
    expected = functional.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="sum") / 3
    objective = Distillation(models[0], [terms.logits()], models[1])
    (found,) = objective(batch, objective.counts(batch)).values()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_that_the_models_form(family: str, layer: int) -> None:
    student, teacher = (made(*FAMILIES[family], seed=seed) for seed in (1, 2))
    batch = batch_of()
    objective = Distillation(student, [terms.attention(layer, layer)], teacher)
    name = f"prob_mse_{layer}_{layer}"
    items = objective.counts(batch)[name]
    found = objective(batch, {name: items.float()})[name]
    found.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    with torch.no_grad():
        target = eager(teacher, batch).attentions[layer - 1]
    real = batch["attention_mask"].bool()
    visible = real[:, :, None] & real[:, None, :]
    if getattr(student.config, "model_type", "") in ("llama", "gemma3_text", "opt"):
        visible = visible.tril()
    assert items == visible.sum()
    own = eager(student, batch).attentions[layer - 1]
    squares = ((own - target).square() * visible[:, None]).sum()
    assert squares > 0.1
    expected = squares / (visible.sum() * 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    expected.backward()
    for n, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-6)


REFUSED = {
    "a window": ("ModernBert", {**MODERN, "local_attention": 4}, r"layer 2 of ModernBertModel sees a window of \d tokens before .* 10 tokens long"),
    "a causal window": ("Gemma3Text", GEMMA | {"sliding_window": 4}, r"layer 2 of Gemma3TextModel sees a window of 3 tokens before and 0 behind"),
    "a softcap": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}, "layer 2 of Gemma2Model has a softcap on its scores"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_maps_that_attention_loss_does_not_form_are_refused_by_layer(why: str) -> None:
    family, more, message = REFUSED[why]
    model = made(family, more)
    objective, batch = Distillation(model, [terms.attention(2, 2)], model), batch_of()
    with pytest.raises((ValueError, RuntimeError), match=message):
        objective(batch, {"prob_mse_2_2": objective.counts(batch)["prob_mse_2_2"]})


def test_a_bias_on_the_scores_is_refused() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    objective = Distillation(model, [terms.attention(2, 2)], model)
    with pytest.raises(
        ValueError, match="layer 2 of T5.* has a bias on its scores .*, which attention_loss does not form"
    ):
        objective.counts(batch_of())


def test_a_causal_map_against_one_that_is_not_is_refused() -> None:
    objective = Distillation(made("Bert", {}), [terms.attention(1, 1)], made("Llama", {}))
    with pytest.raises(ValueError, match="layer 1 of BertModel is not causal, layer 1 of LlamaModel is causal"):
        objective.counts(batch_of())


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_minilms_relations(family: str) -> None:
    student, teacher = made(family, {"hidden_size": 8}, 1, 1), made(family, {}, 3, 2)
    objective, batch = Distillation(student, minilm.terms(-2, heads=4), teacher), batch_of()
    found = objective(batch, {name: x.float() for name, x in objective.counts(batch).items()})
    real = batch["attention_mask"].bool()
    expected = {}
    import fastdistil as fd

    shown = {"queries": [1], "keys": [1], "values": [1]}
    with fd.capture(student, **shown) as s, fd.capture(teacher, **{part: [2] for part in shown}) as t:
        student(**batch), teacher(**batch)
    for part in shown:
        sides = []
        for captured, layer in ((s, 1), (t, 2)):
            x = getattr(captured, part)[layer].transpose(1, 2).flatten(2)
            x = x.unflatten(2, (4, -1)).transpose(1, 2)
            scores = x @ x.mT / x.shape[-1] ** 0.5
            seen = real[:, None, None, :].expand_as(scores)
            seen = seen.tril() if family == "Llama" else seen
            sides.append(scores.masked_fill(~seen, -1e9).log_softmax(-1))
        rows = (sides[1].exp() * (sides[1] - sides[0])).sum(-1)
        expected[f"{part}_1_2"] = (rows * real[:, None]).sum() / real.sum() / 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_tinybert_by_hand() -> None:
    student, teacher = made("Bert", {"hidden_size": 8}, 2, 1), made("Bert", {}, 4, 2)
    chosen = tinybert.terms(student, teacher)
    objective, batch = Distillation(student, chosen, teacher), batch_of()
    found = objective(batch, {name: x.float() for name, x in objective.counts(batch).items()})
    assert len(found) == 2 + 2 + 1
    real = batch["attention_mask"].bool()
    import fastdistil as fd

    shown = {"queries": [1, 2], "keys": [1, 2], "hidden_states": [0, 1, 2]}
    with (
        fd.capture(student, **shown) as s,
        fd.capture(teacher, queries=[2, 4], keys=[2, 4], hidden_states=[0, 2, 4]) as t,
    ):
        student(**batch), teacher(**batch)
    pairs = (real[:, :, None] & real[:, None, :])[:, None].expand(-1, 2, -1, -1)
    for l in (1, 2):
        own, other = (
            captured.queries[i] @ captured.keys[i].mT / captured.queries[i].shape[-1] ** 0.5
            for captured, i in ((s, l), (t, 2 * l))
        )
        torch.testing.assert_close(found[f"score_mse_{l}_{2 * l}"], (own - other)[pairs].square().mean())
    first, second, embedding = (objective.projections[f"hidden_{l}_{2 * l}"] for l in (1, 2, 0))
    assert first is second and first is not embedding
    for l, projection in ((0, embedding), (1, first), (2, first)):
        states = projection(s.hidden_states[l])[real]
        expected = (states - t.hidden_states[2 * l][real]).square().mean()
        torch.testing.assert_close(found[f"hidden_{l}_{2 * l}"], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="student has 3 blocks, expected a divisor of the teacher's 4"):
        tinybert.terms(made("Bert", {}, 3), teacher)


def language_model(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=layers)
    return transformers.BertForMaskedLM(config).eval()


def masked(rows: list[int]) -> dict[str, torch.Tensor]:
    batch = batch_of(rows=len(rows))
    labels = batch["input_ids"].clone()
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    chosen[:, 1::4] = True
    return {**batch, "labels": labels, "labelled_words": (chosen & batch["attention_mask"].bool()).float()}


def test_distilbert_by_hand_and_it_learns() -> None:
    teacher = language_model(4, 1)
    student = distilbert.student(teacher)
    assert student.config.num_hidden_layers == 2
    objective, batch = Distillation(student, distilbert.terms(), teacher), masked([0, 1, 2])
    found = objective(batch, {name: x.float() for name, x in objective.counts(batch).items()})
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s, t = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    real, chosen = batch["attention_mask"].bool(), batch["labelled_words"].bool()
    kl = functional.kl_div(
        (s.logits[real] / 2).log_softmax(-1),
        (t.logits[real] / 2).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    cosine = 1 - functional.cosine_similarity(s.hidden_states[-1][real], t.hidden_states[-1][real], dim=-1)
    expected = {
        "logits": 5 * 4 * kl,
        "labels": 2 * functional.cross_entropy(s.logits[chosen], batch["labels"][chosen]),
        "hidden_2_4": cosine.mean(),
    }
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    history = train(objective, range(6), masked, Options(15, lr=0.01, batch_size=3, warmup=0))
    assert history[-1]["labels"] < 0.8 * history[0]["labels"]


def test_soft_cross_entropy_without_t2_and_half_the_squared_difference() -> None:
    student, teacher = language_model(1, 1), language_model(1, 2)
    batch = masked([0, 1])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    soft = terms.logits(temperature=2.0, scale_by_t2=False, weight="labelled_words")
    half = terms.logits(divergence="mse", weight="labelled_words", scale=0.5)
    keep = batch["labelled_words"].bool()
    with torch.no_grad():
        target = teacher(**inputs).logits[keep]
    for term in (soft, half):
        objective = Distillation(student, [term], teacher)
        student.zero_grad()
        found = objective(batch, objective.counts(batch))["logits"]
        found.backward()
        gradient = student.cls.predictions.bias.grad.clone()
        student.zero_grad()
        own = student(**inputs).logits[keep]
        if term is soft:
            q = (target / 2).softmax(-1)
            expected = -(q * (own / 2).log_softmax(-1)).sum(-1).mean()
            entropy = -(q * q.log()).sum(-1).mean()
            torch.testing.assert_close(found + entropy, expected)
        else:
            expected = 0.5 * 0.5 * (own - target).square().sum(-1).mean()
            torch.testing.assert_close(found, expected)
        expected.backward()
        torch.testing.assert_close(gradient, student.cls.predictions.bias.grad, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="temperature is 2.0 with divergence 'mse', expected 1"):
        terms.logits(divergence="mse", temperature=2.0)


def test_the_teachers_side_is_read_from_the_batch_where_it_is_there() -> None:
    student, teacher = language_model(1, 1), language_model(2, 2)
    chosen = [terms.hidden(-1, 1), terms.logits(weight="attention_mask")]
    batch = masked([0, 1])
    live = Distillation(student, chosen, teacher)
    items = live.counts(batch)
    found = live(batch, items)
    with torch.no_grad():
        out = teacher(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    stored = batch | {"teacher_hidden_1": out.hidden_states[1], "teacher_logits": out.logits}
    torch.testing.assert_close(Distillation(student, chosen)(stored, items), found)
    with pytest.raises(ValueError, match="the batch has no teacher_logits, and no teacher that has them came"):
        Distillation(student, chosen[1:])(batch, items)
    renumbered = batch | {"teacher_input_ids": batch["input_ids"], "input_ids": batch["input_ids"].flip(1)}
    with torch.no_grad():
        own = student(renumbered["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[-1]
    real = batch["attention_mask"].bool()
    expected = (own - out.hidden_states[1])[real].square().mean()
    torch.testing.assert_close(live(renumbered, items)["hidden_1_1"], expected)


def test_sequence_classification() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1, num_labels=3)
    student, teacher = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    batch = batch_of() | {
        "labels": torch.tensor([0, 2, -100]),
        "words": torch.ones(3),
        "labelled_words": torch.tensor([1.0, 1, 0]),
    }
    objective = Distillation(student, [terms.logits(), terms.labels()], teacher)
    found = objective(batch, objective.counts(batch))
    s, t = (model(batch["input_ids"], batch["attention_mask"]).logits for model in (student, teacher))
    kl = functional.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, {"logits": kl, "labels": functional.cross_entropy(s[:2], batch["labels"][:2])})


@pytest.mark.parametrize("kind", ["gelu", "linear", "other"])
def test_projections_train_and_are_saved_once(kind: str, tmp_path: Path) -> None:
    def student() -> Any:
        made_student = made("Bert", {"hidden_size": 8}, 1)
        made_student.projection = nn.Linear(8, 16)
        return made_student

    def objective(model: Any) -> Distillation:
        projection = {
            "gelu": nn.Sequential(model.projection, nn.GELU()), "linear": model.projection,
            "other": nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 16)),
        }[kind]  # fmt: skip
        return Distillation(model, [terms.hidden(-1, "states", projection=projection)])

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = batch_of(rows=len(rows))
        return batch | {"states": batch["input_ids"][..., None].expand(-1, -1, 16) / 50.0}

    torch.manual_seed(3)
    first = objective(student())
    assert list(first.projections) == (["hidden_1"] if kind == "other" else [])
    batch = collate([0, 1])
    states = first.student(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    projected = {
        "gelu": lambda x: functional.gelu(first.student.projection(x)),
        "linear": first.student.projection,
    }.get(kind, first.projections["hidden_1"] if kind == "other" else None)(states)
    expected = (projected - batch["states"])[batch["attention_mask"].bool()].square().mean()
    torch.testing.assert_close(first(batch, first.counts(batch))["hidden_1"], expected, rtol=1e-4, atol=1e-7)
    options = Options(12, lr=0.02, batch_size=2, warmup=0)
    history = train(first, range(4), collate, options, out=tmp_path)
    assert history[-1]["hidden_1"] < 0.7 * history[0]["hidden_1"]
    again = objective(student())
    train(again, range(4), collate, options, out=tmp_path)
    torch.testing.assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_fresh_head_is_drawn_from_the_seed_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    draw_anew(model, ["classifier"], 5)
    first = model.classifier.weight.detach().clone()
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(first, before["classifier.weight"])
    assert 0.005 < first.std() < 0.05  # as the model draws it, not torch's Linear
    draw_anew(model, ["classifier"], 5)
    assert torch.equal(model.classifier.weight, first)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "classifier" not in n)
    with pytest.raises(ValueError, match="fresh holds 'head', which is part of no parameter's name"):
        draw_anew(model, ["head"], 5)
    plain = nn.Sequential(nn.Linear(2, 2))
    draw_anew(plain, ["0."], 1)
    with pytest.raises(ValueError, match=r"stages have the names \['a', 'a'\], expected each once"):
        run_stages(model, [Stage("a", [terms.labels()], [1], Options(1))] * 2)


def test_a_window_of_the_students_own_layer_does_not_hide_short_batches() -> None:
    model = made("ModernBert", {**MODERN, "local_attention": 8})
    objective = Distillation(with_blocks(model, [0, 1]), [terms.attention(2, 2)], model)
    for length, fits in ((5, True), (6, False)):
        batch = batch_of(length)
        batch["attention_mask"][:] = 1
        if fits:
            assert objective(batch, objective.counts(batch))["prob_mse_2_2"] < 1e-10
        else:
            with pytest.raises(ValueError, match="the batch is 6 tokens long.* or at most 5 tokens"):
                objective(batch, objective.counts(batch))


def test_a_head_that_no_term_reads_is_not_run() -> None:
    student, teacher = language_model(1, 1), language_model(2, 2)
    runs = []
    for model in (student, teacher):
        model.cls.register_forward_hook(lambda module, *_: runs.append(module))
    batch = masked([0, 1])
    for chosen, expected in (
        ([terms.hidden(-1, -1), terms.attention(-1, -1)], []),
        ([terms.labels(), terms.hidden(-1, -1)], [student.cls]),
        ([terms.logits(), terms.hidden(-1, -1)], [teacher.cls, student.cls]),
    ):
        runs.clear()
        objective = Distillation(student, chosen, teacher)
        objective(
            batch | {"words": batch["labelled_words"]}, objective.counts({**batch, "words": batch["labelled_words"]})
        )
        assert [id(x) for x in runs] == [id(x) for x in expected]


def test_a_compiled_student() -> None:
    student, teacher = language_model(1, 1), language_model(2, 2)
    batch = masked([0, 1])
    chosen = [terms.hidden(-1, -1), terms.attention(-1, -1), terms.logits(weight="labelled_words")]
    plain = Distillation(student, chosen, teacher)
    items = plain.counts(batch)
    compiled = Distillation(torch.compile(student, backend="eager"), chosen, teacher)
    torch.testing.assert_close(compiled(batch, compiled.counts(batch)), plain(batch, items))
