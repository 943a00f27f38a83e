"""LightMBERT and BiStil: the student's blocks, the pairs, and that the objective is the textbook one and falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastdistil as fd
from fastdistil.models.student import with_blocks
from fastdistil.recipes import bistil, lightmbert, xtremedistil
from fastdistil.recipes.terms import Distillation, Term, attention, hidden
from fastdistil.train import train

transformers = pytest.importorskip("transformers")


def _teacher(kind: str = "bert") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    more = {"num_key_value_heads": 2, "head_dim": 8} if kind == "qwen3" else {}
    config = {"bert": transformers.BertConfig, "qwen3": transformers.Qwen3Config}[kind](
        num_hidden_layers=4, pad_token_id=0, **sizes, **more
    )
    return transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()


def _batch(examples: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(examples))
    ids = torch.randint(5, 99, (len(examples), 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_student_of_the_teachers_blocks(kind: str) -> None:
    teacher = _teacher(kind)
    student = with_blocks(teacher, [1, 3])
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    own, all_blocks = (m.encoder.layer if kind == "bert" else m.layers for m in (student, teacher))
    for block, original in zip(own, (all_blocks[1], all_blocks[3]), strict=True):
        for a, b in zip(block.parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert student(_batch([1])["input_ids"])[0].shape == (1, 12, 32)
    whole = with_blocks(teacher, range(4))
    assert torch.equal(whole(_batch([1])["input_ids"])[0], teacher(_batch([1])["input_ids"])[0])


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
PER_BLOCK = {  # configurations that say something block by block, and the blocks to keep
    "ModernBert": ({"num_hidden_layers": 6, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}, [0, 3, 5]),
    "SmolLM3": ({"num_hidden_layers": 8, "num_key_value_heads": 2}, [1, 3, 5, 7]),
    "Qwen3Moe": ({"num_hidden_layers": 4, "num_key_value_heads": 2, "mlp_only_layers": [1], **EXPERTS}, [1, 3]),
    "Qwen2Moe": ({"num_hidden_layers": 4, "num_key_value_heads": 2, "decoder_sparse_step": 2, **EXPERTS}, [1, 2]),
    "Longformer": ({"num_hidden_layers": 4, "attention_window": [4, 8, 4, 16]}, [1, 3]),
    "GPTNeo": ({"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4}, [1, 3]),
}


@pytest.mark.parametrize("family", PER_BLOCK)
def test_a_student_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    options, blocks = PER_BLOCK[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    teacher = transformers.AutoModel.from_config(config).eval()
    drawn = torch.get_rng_state()
    student = with_blocks(teacher, blocks).eval()
    assert torch.equal(torch.get_rng_state(), drawn) and teacher.config.num_hidden_layers == config.num_hidden_layers
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(3, 50, (2, 12))
    assert torch.equal(loaded.eval()(ids)[0], student(ids)[0])


UNNAMED = {
    "ModernBert": (PER_BLOCK["ModernBert"][0], r"block 1 at place 0.* a ModernBertModel .*attn_norm is Identity, not LayerNorm"),
    "GPT2": ({"n_layer": 4, "scale_attn_by_inverse_layer_idx": True}, r"block 1 at place 0.* a GPT2Model .*attn.scaling is"),
}  # fmt: skip


@pytest.mark.parametrize("family", UNNAMED)
def test_blocks_that_no_configuration_names_are_refused(family: str) -> None:
    options, message = UNNAMED[family]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    with pytest.raises(ValueError, match=f"with_blocks: blocks has the teacher's {message}"):
        with_blocks(transformers.AutoModel.from_config(config), [1, 3])


DROPOUTS = {
    "Bert": {"num_hidden_layers": 2, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "ModernBert": {"num_hidden_layers": 2, "attention_dropout": 0.5, "mlp_dropout": 0.5, "embedding_dropout": 0.5,
                   "cls_token_id": 1, "sep_token_id": 2},
    "GPT2": {"n_layer": 2, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "OPT": {"num_hidden_layers": 2, "ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.5, "attention_dropout": 0.5},
    "DistilBert": {"n_layers": 2, "n_heads": 2, "dim": 16, "hidden_dim": 16, "dropout": 0.5, "attention_dropout": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("family", DROPOUTS)
def test_bistils_student_has_no_dropout_and_gets_none_by_saving(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **DROPOUTS[family]})
    teacher = transformers.AutoModel.from_config(config).train()
    student = bistil.student(teacher, 1)
    ids = torch.randint(3, 50, (2, 12))
    assert not torch.equal(teacher(ids)[0], teacher(ids)[0]), "the teacher has lost its dropout"
    student.save_pretrained(tmp_path)
    for model in (student, type(student).from_pretrained(tmp_path).train()):
        assert torch.equal(model(ids)[0], model(ids)[0])


def _student_and_terms(recipe: str, teacher: Any) -> tuple[Any, list[Term]]:
    if recipe == "lightmbert":
        return lightmbert.student(teacher), lightmbert.terms()
    student = bistil.student(teacher)
    return student, bistil.terms(student, teacher)


@pytest.mark.parametrize("recipe", ["lightmbert", "bistil"])
def test_the_objective_is_the_textbook_one(recipe: str) -> None:
    teacher = _teacher()
    student, chosen = _student_and_terms(recipe, teacher)
    student.eval()
    assert len(chosen) == {"lightmbert": 2, "bistil": 2 + 3}[recipe]
    objective, batch = Distillation(student, chosen, teacher), _batch([1, 2, 3])
    terms = objective(batch, objective.counts(batch))
    shown = {"output_attentions": True, "output_hidden_states": True}
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    s, t = (model(**batch, **shown) for model in (student, teacher))
    mask = batch["attention_mask"].bool()
    visible = (mask[:, None, :, None] & mask[:, None, None, :]).expand(-1, 4, -1, -1)
    for term in objective.terms:
        i, j = term.student, term.teacher
        assert isinstance(j, int)
        if term.name.startswith("hidden"):
            expected = (s.hidden_states[i] - t.hidden_states[j])[mask].square().mean()
        else:
            expected = (s.attentions[i - 1] - t.attentions[j - 1])[visible].square().mean()
        torch.testing.assert_close(terms[term.name], term.scale * expected, rtol=1e-4, atol=1e-7)
    assert not any(p is q for p in objective.parameters() for q in teacher.parameters())


@pytest.mark.parametrize("recipe", ["lightmbert", "bistil"])
def test_training_brings_the_student_closer(recipe: str) -> None:
    teacher = _teacher()
    module = {"lightmbert": lightmbert, "bistil": bistil}[recipe]
    student, chosen = _student_and_terms(recipe, teacher)
    words = student.get_input_embeddings().weight
    before = words.detach().clone()
    objective = Distillation(student, chosen, teacher)
    history = train(objective, range(8), _batch, module.options(40, lr=3e-3, batch_size=4))
    loss = [sum(v for k, v in record.items() if k not in ("step", "lr")) for record in history]
    assert sum(loss[-5:]) < 0.7 * sum(loss[:5])
    assert torch.equal(words, before) == (recipe == "lightmbert")


@pytest.mark.parametrize("family", ["ModernBert", "Llama", "Bert"])
def test_a_representation_is_what_capture_takes(family: str) -> None:
    """The last block's output, where hidden_states[-1] of ModernBERT and Llama is behind one more norm."""
    more = {"cls_token_id": 1, "sep_token_id": 2} if family == "ModernBert" else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **more, num_hidden_layers=2)
    student = transformers.AutoModelForTokenClassification.from_config(config).eval()
    batch = {**_batch([1]), "teacher_hidden": torch.randn(1, 12, 16)}
    batch["input_ids"] %= 50
    objective = Distillation(student, [xtremedistil.representation("teacher_hidden", torch.nn.Identity())])
    found = objective(batch, objective.counts(batch))["hidden_2"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with fd.capture(student, hidden_states=[2]) as captured:
        shown = student(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(shown, captured.hidden_states[2]) == (family == "Bert")
    difference = (captured.hidden_states[2] - batch["teacher_hidden"])[batch["attention_mask"].bool()]
    torch.testing.assert_close(found, difference.square().mean(), rtol=1e-5, atol=1e-6)


def test_a_run_does_not_continue_with_another_teacher(tmp_path: Path) -> None:
    def run(teacher: Any, share: float = 1.0) -> Any:
        objective = Distillation(with_blocks(_teacher(), [0]), [hidden(1, 4, scale=share)], teacher)
        return train(objective, range(8), _batch, lightmbert.options(1, batch_size=2), out=tmp_path)

    history = run(_teacher())
    assert run(torch.compile(_teacher(), backend="eager")) == history
    other, named = _teacher(), _teacher()
    with torch.no_grad():
        other.encoder.layer[3].output.dense.weight.mul_(1.01)
    named.config.layer_norm_eps = 1e-6
    for teacher in (other, named):
        with pytest.raises(ValueError, match=r"step-1 was written with teacher = '\w+', this run has '\w+'"):
            run(teacher)
    with pytest.raises(
        ValueError, match=r"terms = \['hidden_1_4: scale 1.0, .*'\], this run has \['hidden_1_4: scale 0.5"
    ):
        run(_teacher(), 0.5)


def test_bad_calls() -> None:
    teacher = _teacher()
    with pytest.raises(ValueError, match=r"with_blocks: blocks holds 4, expected 0 to 3"):
        with_blocks(teacher, [0, 4])
    with pytest.raises(ValueError, match=r"with_blocks: blocks is empty"):
        with_blocks(teacher, [])
    with pytest.raises(ValueError, match=r"with_blocks: blocks is \[1, 1\], expected each block once"):
        with_blocks(teacher, [1, 1])
    with pytest.raises(
        ValueError, match=r"bistil.student: reduction is 3, expected a divisor of the teacher's 4 blocks"
    ):
        bistil.student(teacher, 3)
    student = with_blocks(teacher, [0])
    for chosen, message in {
        (): r"terms has the names \[\], expected at least one",
        (hidden(1, 4), hidden(-1, -1)): r"terms has the names \['hidden_1_4', 'hidden_1_4'\], expected .* each once",
        (attention(2, 4),): "prob_mse_2_4 names the student's layer 2, expected 1 to 1, or -1 for the last",
        (attention(0, 4),): "prob_mse_0_4 names the student's layer 0, expected 1 to 1",
        (hidden(0, -6),): "hidden_0_-6 names the teacher's layer -6, expected 0 to 4",
    }.items():
        with pytest.raises(ValueError, match=message):
            Distillation(student, chosen, teacher)
    with pytest.raises(ValueError, match="prob_mse_1_1 needs a teacher that runs along, but none came"):
        Distillation(student, [attention(1, 1)])
    with pytest.raises(ValueError, match="hidden_1_-1 names layer -1 of a teacher, but none came"):
        Distillation(student, [hidden(1, -1)])
    with pytest.raises(ValueError, match="terms: hidden_1_1 has scale 0, expected a finite number above 0"):
        hidden(1, 1, scale=0)
    alone = Distillation(student, [hidden(1, 1)])
    with pytest.raises(ValueError, match="the batch has no teacher_hidden_1, and no teacher that has them came"):
        alone(_batch([1]), alone.counts(_batch([1])))
