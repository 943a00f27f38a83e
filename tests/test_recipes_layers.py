"""LightMBERT and BiStil: the student's blocks, the pairs, and that the objective is the textbook one and falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistil.models.student import with_blocks
from fastdistil.recipes import bistil, lightmbert
from fastdistil.recipes.layers import LayerObjective, LayerPair
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


@pytest.mark.parametrize("recipe", ["lightmbert", "bistil"])
def test_the_objective_is_the_textbook_one(recipe: str) -> None:
    teacher = _teacher()
    module = {"lightmbert": lightmbert, "bistil": bistil}[recipe]
    student = module.student(teacher).eval()
    pairs = module.pairs(student, teacher)
    assert len(pairs) == {"lightmbert": 2, "bistil": 2 + 3}[recipe]
    objective, batch = LayerObjective(student, teacher, pairs), _batch([1, 2, 3])
    terms = objective(batch, objective.counts(batch))
    shown = {"output_attentions": True, "output_hidden_states": True}
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    s, t = (model(**batch, **shown) for model in (student, teacher))
    mask = batch["attention_mask"].bool()
    visible = (mask[:, None, :, None] & mask[:, None, None, :]).expand(-1, 4, -1, -1)
    for pair in pairs:
        if pair.kind == "hidden":
            expected = (s.hidden_states[pair.student] - t.hidden_states[pair.teacher])[mask].square().mean()
        else:
            expected = (s.attentions[pair.student - 1] - t.attentions[pair.teacher - 1])[visible].square().mean()
        torch.testing.assert_close(terms[pair.name], pair.scale * expected, rtol=1e-4, atol=1e-7)
    assert not any(p is q for p in objective.parameters() for q in teacher.parameters())


@pytest.mark.parametrize("recipe", ["lightmbert", "bistil"])
def test_training_brings_the_student_closer(recipe: str) -> None:
    teacher = _teacher()
    module = {"lightmbert": lightmbert, "bistil": bistil}[recipe]
    student = module.student(teacher)
    words = student.get_input_embeddings().weight
    before = words.detach().clone()
    objective = LayerObjective(student, teacher, module.pairs(student, teacher))
    history = train(objective, range(8), _batch, module.options(40, lr=3e-3, batch_size=4))
    loss = [sum(v for k, v in record.items() if k not in ("step", "lr")) for record in history]
    assert sum(loss[-5:]) < 0.7 * sum(loss[:5])
    assert torch.equal(words, before) == (recipe == "lightmbert")


def test_bad_calls() -> None:
    teacher = _teacher()
    with pytest.raises(ValueError, match=r"with_blocks: blocks holds 4, expected 0 to 3"):
        with_blocks(teacher, [0, 4])
    with pytest.raises(ValueError, match=r"with_blocks: blocks is empty"):
        with_blocks(teacher, [])
    with pytest.raises(
        ValueError, match=r"bistil.student: reduction is 3, expected a divisor of the teacher's 4 blocks"
    ):
        bistil.student(teacher, 3)
    with pytest.raises(ValueError, match=r"LayerObjective: pairs is empty"):
        LayerObjective(teacher, teacher, [])
    objective = LayerObjective(with_blocks(teacher, [0]), teacher, [LayerPair("prob_mse", 2, 4)])
    with pytest.raises(ValueError, match=r"capture: queries asks for layer 2, expected 1 to 1: BertModel has 1 blocks"):
        objective(_batch([1]), {"prob_mse_2_4": torch.tensor(1.0)})
