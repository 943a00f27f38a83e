"""XtremeDistil's schedule on a BiLSTM: nine sub-stages, what each of them trains, early stopping, kill and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdistil.batches import Shuffled
from fastdistil.models.student import with_blocks
from fastdistil.recipes import bistil, minilm, terms, tinybert, xtremedistil
from fastdistil.recipes.stages import Stage, run_stages
from fastdistil.recipes.terms import Distillation
from fastdistil.train import Options, train

transformers = pytest.importorskip("transformers")
NAMES = [
    "states",
    *(f"{what}-{group}" for what in ("logits", "labels") for group in ("head", "projection", "lstm", "embeddings")),
]


def student() -> Any:
    from fastdistil.models.bilstm import BiLstmConfig, BiLstmForTokenClassification

    torch.manual_seed(0)
    config = BiLstmConfig(vocab_size=30, embedding_size=6, lstm_size=5, projection_size=8, dropout=0.2, num_labels=3)
    return BiLstmForTokenClassification(config)


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    """A teacher that says of each token what its number tells."""
    ids = torch.stack([torch.randint(1, 30, (7,), generator=torch.Generator().manual_seed(row)) for row in rows])
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids % 3
    logits = 4 * nn.functional.one_hot(labels, 3).float()
    states = torch.cat([logits, ids[..., None].float().expand(-1, -1, 2) / 30, logits], -1) + 1
    words = mask.float()
    labelled = words * (torch.tensor(rows) % 2 == 0).float()[:, None]
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "words": words, "labelled_words": labelled,
        "teacher_logits": logits, "teacher_hidden_7": states,
    }  # fmt: skip


def schedule(model: Any, **more: Any) -> list[Stage]:
    states = xtremedistil.representation(7, model.bilstm.projection)
    learn, held_out = xtremedistil.split(range(40), 0.2)
    return xtremedistil.stages(
        states, model.groups(), learn, [row for row in learn if row % 2 == 0], lr=0.02, batch_size=8, seed=3,
        held_out_unlabelled=held_out, held_out_labelled=held_out, evaluate_every=2, patience=2, **{"steps": 4, **more},
    )  # fmt: skip


def test_a_split_of_the_training_data() -> None:
    learn, held_out = xtremedistil.split(range(40), 0.2, seed=1)
    assert len(held_out) == 8 and sorted([*learn, *held_out]) == list(range(40)) and held_out == sorted(held_out)
    assert xtremedistil.split(range(40), 0.2, seed=2)[1] != held_out
    assert [len(x) for x in xtremedistil.split([1, 2], 0.01)] == [1, 1]
    with pytest.raises(ValueError, match="data has 1 examples, expected at least 2"):
        xtremedistil.split([1])


def test_nine_stages_of_a_bilstm() -> None:
    model = student()
    made = schedule(model)
    assert [stage.name for stage in made] == NAMES
    assert [len(stage.fresh) for stage in made] == [0] * 5 + [1] + [0] * 3
    options = made[3].options
    assert (options.final_lr, options.warmup, options.weight_decay, options.schedule) == (1e-8, 0, 0.0, "cosine")
    assert (options.metric, options.greater_is_better, options.patience) == ("loss", False, 2)
    assert len({stage.options.seed for stage in made}) == 9
    tables = [stage.terms[0].name for stage in made]
    assert tables == ["hidden_-1_7", *["logits"] * 4, *["labels"] * 4]
    assert made[1].terms[0] == terms.logits(divergence="mse")
    moved: dict[str, set[str]] = {}
    for stage in made:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        history = run_stages(model, [stage], collate)[stage.name]
        assert {"eval_loss", f"eval_{stage.terms[0].name.replace('-1', '1')}"} <= history[1].keys()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        moved[stage.name] = {
            next(k for k, v in model.groups().items() if any(part in name for part in v)) for name in changed
        }
    body = ["projection", "lstm", "embeddings"]
    assert moved["states"] == set(body)
    for what in ("logits", "labels"):
        for i in range(4):
            assert moved[f"{what}-{['head', *body][i]}"] == {"head", *body[:i]}
    assert all(p.requires_grad for p in model.parameters())


def test_without_unfreezing_three_stages_and_a_schedule_of_one() -> None:
    model = student()
    made = schedule(model, unfreeze=False, label_steps=7, divergence="forward_kl")
    assert [stage.name for stage in made] == ["states", "logits", "labels"]
    assert [stage.frozen for stage in made[1:]] == [(), ()] and made[2].fresh == ("classifier.",)
    assert [stage.options.steps for stage in made] == [4, 4, 7]
    (joint,) = xtremedistil.joint(xtremedistil.representation(7), range(40), Options(5))
    assert [term.name for term in joint.terms] == ["hidden_-1_7", "logits", "labels"]
    short = xtremedistil.short_stages(xtremedistil.representation(7), range(40), steps=100)
    assert [stage.options.steps for stage in short] == [20, 70, 10] and short[1].terms[0].scale == 0.3
    with pytest.raises(ValueError, match="steps is 2, which leaves a stage of .* without a step"):
        xtremedistil.short_stages(xtremedistil.representation(7), range(40), steps=2)
    with pytest.raises(ValueError, match="groups is empty"):
        xtremedistil.stages(xtremedistil.representation(7), {}, [1], [1], steps=1)


class Killed(BaseException):
    pass


def test_killed_in_any_stage_the_student_is_the_same(tmp_path: Path) -> None:
    whole = student()
    history = run_stages(whole, schedule(whole), collate, evaluate=lambda model: {"share": float(not model.training)})
    assert all(records[-1]["eval_share"] == 1.0 for records in history.values())
    calls, kills = [0], [3, 15, 27, 44, 55, 71]

    def killing(rows: list[int]) -> Any:
        calls[0] += 1
        if calls[0] in kills:
            raise Killed
        return collate(rows)

    for _ in kills:
        model = student()
        with pytest.raises(Killed):
            run_stages(model, schedule(model), killing, out=tmp_path, evaluate=lambda model: {"share": 1.0})
    assert len(list(tmp_path.iterdir())) > 4
    model = student()
    assert run_stages(model, schedule(model), collate, out=tmp_path, evaluate=lambda model: {"share": 1.0}) == history
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


def bert(layers: int, width: int = 16, labels: int = 3) -> Any:
    torch.manual_seed(layers)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=width, intermediate_size=16, num_attention_heads=2, num_hidden_layers=layers,
        num_labels=labels,
    )  # fmt: skip
    return transformers.BertForTokenClassification(config).eval()


def test_bistils_second_phase() -> None:
    teacher = bert(4)
    model = with_blocks(teacher, [1, 3])
    nn.init.normal_(model.classifier.weight)
    objective = Distillation(model, bistil.task_terms(model, teacher), teacher)
    batch = collate([0, 1, 2])
    del batch["teacher_logits"]
    found = objective(batch, objective.counts(batch))
    assert list(found) == [
        *(f"prob_mse_{l}_{2 * l}" for l in (1, 2)),
        *(f"hidden_{l}_{2 * l}" for l in range(3)),
        "logits",
    ]
    keep = batch["labelled_words"].bool()
    with torch.no_grad():
        own, target = (m(batch["input_ids"], batch["attention_mask"]).logits[keep] / 2 for m in (model, teacher))
    expected = nn.functional.kl_div(own.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(found["logits"], expected)

    def live(rows: list[int]) -> Any:
        made = collate(rows)
        return {name: x for name, x in made.items() if not name.startswith("teacher")}

    history = train(objective, range(8), live, bistil.options(12, lr=0.01, batch_size=4))
    assert history[-1]["logits"] < 0.5 * history[0]["logits"]


@pytest.mark.parametrize("recipe", ["minilm", "tinybert"])
def test_the_small_recipes_learn(recipe: str) -> None:
    teacher, model = bert(4), bert(2, 8)
    with torch.no_grad():  # random weights make relations that are all alike
        for name, p in (*teacher.named_parameters(), *model.named_parameters()):
            if any(x in name for x in ("query.weight", "key.weight", "value.weight")):
                p.mul_(30)
    chosen = minilm.terms(heads=4) if recipe == "minilm" else tinybert.terms(model, teacher)
    objective = Distillation(model, chosen, teacher)
    history = train(objective, range(8), collate, Options(25, lr=0.01, batch_size=4, warmup=0))
    losses = [sum(x for name, x in record.items() if name not in ("step", "lr")) for record in history]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    (soft,) = tinybert.prediction_terms()
    assert soft == terms.logits(temperature=1.0, scale_by_t2=False, weight="words")
    assert minilm.options(1000).lr == 6e-4 and minilm.options(1000).warmup == 10


def test_a_stage_of_a_dataset_and_one_that_makes_its_own_batches() -> None:
    datasets = pytest.importorskip("datasets")

    def of_rows(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return collate([row["number"] for row in rows])

    rows = datasets.Dataset.from_dict({"number": list(range(8))})
    options = Options(2, batch_size=4, metric="loss", greater_is_better=False)
    chosen = [terms.logits()]
    one = student()
    made = Shuffled(rows, of_rows, 4, 0)
    history = run_stages(one, [Stage("a", chosen, rows, options, held_out=rows)], of_rows)
    held_out = [of_rows([{"number": i} for i in range(first, first + 4)]) for first in (0, 4)]
    for mixed in (None, of_rows):  # the other stages' collate is none of its business
        two = student()
        assert run_stages(two, [Stage("a", chosen, made, options, held_out=held_out)], mixed) == history
    assert history["a"][1]["eval_loss"] == history["a"][1]["eval_logits"]
