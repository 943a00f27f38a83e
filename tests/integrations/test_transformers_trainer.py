"""transformers' Trainer with distillation terms: every task against plain PyTorch in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from trainer_cases import (
    TASKS,
    InOrder,
    aligned,
    arguments,
    collate,
    gradient,
    model,
    plain,
    rows,
    teacher,
    trained,
)

from fastdistil.recipes import terms

BOTH = [terms.logits(temperature=2.0), terms.labels(scale=0.5)]


@pytest.mark.parametrize("heads", [None, False])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("task", TASKS)
def test_step_is_plain_pytorch(task: str, accumulate: int, heads: bool | None, tmp_path: Path) -> None:
    student, other = model(task), teacher(task)
    loss = plain(task, student, other, collate(rows(task)))
    expected = gradient(loss, student)
    options = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    args = arguments(tmp_path, logits_from_heads=heads, **options)
    trainer = InOrder(student, args, collate, rows(task), teacher=other, terms=BOTH)
    assert (trainer.objective.heads is not None) == (heads is None and task in ("masked", "causal"))
    torch.testing.assert_close(trained(trainer), expected, rtol=1e-10, atol=1e-12)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert logged["loss_logits"] + logged["loss_labels"] == pytest.approx(logged["loss"], rel=1e-6)


def test_last_step_of_an_epoch_is_shorter(tmp_path: Path) -> None:
    """Four micro-batches, three to a step: the second step has one."""
    student, other, data = model("token"), teacher("token"), rows("token")
    by_hand = copy.deepcopy(student)
    for part in (data[:6], data[6:]):
        step = gradient(plain("token", by_hand, other, collate(part)), by_hand)
        with torch.no_grad():
            for name, parameter in by_hand.named_parameters():
                parameter -= 0.1 * step[name]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
    args = arguments(tmp_path, learning_rate=0.1, **options)
    InOrder(student, args, collate, data, teacher=other, terms=BOTH).train()
    torch.testing.assert_close(
        dict(student.named_parameters()), dict(by_hand.named_parameters()), rtol=1e-10, atol=1e-12
    )


def test_layers_and_weights(tmp_path: Path) -> None:
    """Hidden states through a projection, maps, relations and logits at weighted rows, over four micro-batches."""
    student, other = model("token"), teacher("token")
    batch = collate(rows("token"))
    weights = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    data = [{**row, "words": weights[i] * row["attention_mask"]} for i, row in enumerate(rows("token"))]
    projection = nn.Linear(8, 12).double()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for x in (student, other):
        x.set_attn_implementation("eager")
    ours = student(**inputs, output_hidden_states=True, output_attentions=True)
    theirs = other(**inputs, output_hidden_states=True, output_attentions=True)
    for x in (student, other):
        x.set_attn_implementation("sdpa")
    mask = batch["attention_mask"].double()
    states = (projection(ours.hidden_states[1]) - theirs.hidden_states[2].detach()).square().mean(-1)
    pairs = mask[:, None, :, None] * mask[:, None, None, :]
    maps = (ours.attentions[0] - theirs.attentions[1].detach()).square() * pairs
    p, q = ours.logits.log_softmax(-1), theirs.logits.detach().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1)
    words = weights * mask
    loss = (states * mask).sum() / mask.sum() + 0.3 * maps.sum() / (2 * pairs.sum()) + (kl * words).sum() / words.sum()
    its = torch.autograd.grad(loss, projection.weight, retain_graph=True)[0]
    expected = gradient(loss, student)
    chosen = [terms.hidden(-1, -1, projection=projection), terms.attention(1, 2, scale=0.3), terms.logits()]
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = InOrder(student, args, collate, data, teacher=other, terms=chosen)
    before = projection.weight.detach().clone()
    torch.testing.assert_close(trained(trainer), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(before - projection.weight.detach(), its, rtol=1e-9, atol=1e-11)
    assert not any(p.grad is not None for p in other.parameters()) and not other.training


def relation_gradient(student: Any, other: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """MiniLM's value relation of the last blocks from the models' own value projections."""
    values = []
    for x, block in ((student, student.bert.encoder.layer[0]), (other, other.bert.encoder.layer[1])):
        seen: list[Tensor] = []
        hook = block.attention.self.value.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        x(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
        values.append(seen[0])
    mask = batch["attention_mask"].bool()
    rows_of = []
    for value in values:
        parts = value.unflatten(-1, (2, -1)).transpose(1, 2)
        scores = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
        rows_of.append(scores.masked_fill(~mask[:, None, None, :], -torch.inf).log_softmax(-1))
    p, q = rows_of[0], rows_of[1].detach()
    kl = torch.where(q > -torch.inf, q.exp() * (q - p), 0.0).sum(-1)
    return gradient((kl * mask[:, None]).sum() / (2 * mask.sum()), student)


def test_relation(tmp_path: Path) -> None:
    student, other = model("sequence"), teacher("sequence")
    expected = relation_gradient(student, other, collate(rows("sequence")))
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    chosen = [terms.relation(1, 2, of="values", heads=2)]
    trainer = InOrder(student, args, collate, rows("sequence"), teacher=other, terms=chosen)
    torch.testing.assert_close(trained(trainer), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["logits", "topk"])
@pytest.mark.parametrize("task", ["token", "causal"])
def test_cached_teacher(task: str, kind: str, tmp_path: Path) -> None:
    """The teacher's outputs as columns of the data, in the place of a teacher: all of its columns make the whole loss."""
    student, other = model(task), teacher(task)
    batch = collate(rows(task))
    expected = gradient(plain(task, student, other, batch), student)
    with torch.no_grad():
        found = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    columns: dict[str, Tensor] = {"teacher_logits": found}
    if kind == "topk":
        values, indices = (found / 2.0).log_softmax(-1).topk(found.shape[-1])
        tail = torch.full(found.shape[:2], -torch.inf, dtype=torch.float64)
        columns = {"teacher_values": values, "teacher_indices": indices, "teacher_tail": tail}
    data = [{**row, **{name: x[i] for name, x in columns.items()}} for i, row in enumerate(rows(task))]
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = InOrder(student, args, collate, data, terms=BOTH)
    torch.testing.assert_close(trained(trainer), expected, rtol=1e-8, atol=1e-10)


def test_unlabelled_and_ready_shifted(tmp_path: Path) -> None:
    """Without labels every token counts, of causal models all but the last; shift_labels are taken as they are."""
    student, other = model("causal"), teacher("causal")
    batch = collate(rows("causal"))
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    keep = (mask[:, 1:] * mask[:, :-1]).bool()
    p, q = (x(**inputs).logits[:, :-1][keep].log_softmax(-1) for x in (student, other))
    expected = gradient((q.exp() * (q - p)).sum() / keep.sum(), student)
    bare = [{name: x for name, x in row.items() if name != "labels"} for row in rows("causal")]
    shifted = [
        {**row, "shift_labels": nn.functional.pad(row["labels"][1:], (0, 1), value=-100)} for row in rows("causal")
    ]
    start = {name: x.clone() for name, x in student.state_dict().items()}
    for data in (bare, shifted):
        student.load_state_dict(start)
        args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        trainer = InOrder(student, args, collate, data, teacher=other)
        torch.testing.assert_close(trained(trainer), expected, rtol=1e-9, atol=1e-11)


def test_evaluation(tmp_path: Path) -> None:
    """Means over the data set's rows, whatever the batches; the metrics see logits and labels as Trainer's do."""
    student, other = model("causal"), teacher("causal")
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    args = arguments(tmp_path, per_device_eval_batch_size=3)
    data = rows("causal")
    more = {"teacher": other, "terms": BOTH, "eval_dataset": data, "compute_metrics": metrics}
    trainer = InOrder(student, args, collate, data, **more)
    figures = trainer.evaluate()
    expected = plain("causal", student.eval(), other, collate(data)).item()
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-9)
    assert figures["eval_loss_logits"] + figures["eval_loss_labels"] == pytest.approx(expected, rel=1e-9)
    batch = collate(data)
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.as_tensor(seen[0].predictions), logits.detach())
    assert torch.equal(torch.as_tensor(seen[0].label_ids), batch["labels"]) and 0 <= figures["eval_right"] <= 1
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-9)
    bare = [{name: x for name, x in row.items() if name != "labels"} for row in data]
    assert trainer.predict(bare).predictions.shape == logits.shape


def test_continued_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """With dropout, AdamW and a projection; checkpoints hold no teacher, and are refused to another one."""

    def make(folder: str, steps: int, seed: int = 1, **more: Any) -> InOrder:
        torch.manual_seed(5)
        student = model("token", dtype=torch.float32, hidden_dropout_prob=0.1)
        other = teacher("token", dtype=torch.float32, seed=seed)
        chosen = [terms.hidden(1, 2, projection=nn.Linear(8, 12)), *BOTH]
        options = {"per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2, **more}
        args = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=2, **options)
        return InOrder(student, args, collate, rows("token"), teacher=other, terms=chosen)

    whole = make("whole", 6)  # Trainer seeds itself when it is made
    whole.train()
    make("parts", 2).train()
    second = make("parts", 6)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    for one, other in ((whole.model, second.model), (whole.objective.projections, second.objective.projections)):
        for name, x in one.state_dict().items():
            assert torch.equal(x, other.state_dict()[name]), name
    saved = tmp_path / "parts" / "checkpoint-6"
    weights = torch.load(saved / "optimizer.pt")["state"]
    assert len(weights) == sum(1 for _ in second.objective.parameters())
    assert type(second.model).from_pretrained(saved).config.hidden_size == 8
    from safetensors.torch import load_file

    assert load_file(saved / "model.safetensors").keys() == second.model.state_dict().keys()
    with pytest.raises(ValueError, match="whose teacher is .*, expected .* as in this run"):
        make("parts", 8, seed=9).train(resume_from_checkpoint=True)


def test_peft_base_is_the_teacher(tmp_path: Path) -> None:
    base = model("causal", layers=2)
    batch = collate(rows("causal"))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        target, _ = aligned("causal", base(**inputs).logits, batch["labels"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    student = peft.get_peft_model(base, config).double()
    logits, _ = aligned("causal", student(**inputs).logits, batch["labels"])
    p, q = logits.log_softmax(-1), target.log_softmax(-1)
    loss = (q.exp() * (q - p)).sum() / len(p)
    assert loss > 1e-4
    names = [name for name, x in student.named_parameters() if x.requires_grad]
    expected = torch.autograd.grad(loss, [x for x in student.parameters() if x.requires_grad])
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = InOrder(student, args, collate, rows("causal"), teacher="base", terms=[terms.logits()])
    found = trained(trainer)
    assert trainer.objective.heads is not None
    torch.testing.assert_close(
        {n: found[n] for n in names}, dict(zip(names, expected, strict=True)), rtol=1e-8, atol=1e-10
    )
    assert all(bool((x == 0).all()) for name, x in found.items() if name not in names)
    trainer.save_model(str(tmp_path / "saved"))
    saved = {path.name for path in (tmp_path / "saved").glob("*.safetensors")}
    assert saved == {"adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("how", "task"),
    [(how, task) for how in ("bf16", "checkpointing") for task in ("token", "causal")] + [("compile", "causal")],
)
def test_other_ways_to_run(how: str, task: str, tmp_path: Path) -> None:
    """Two steps each: the losses are those of the plain run, of bfloat16 but for its rounding."""
    options = {
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
        "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }[how]
    chosen = [*BOTH, terms.hidden(1, 2, kind="cosine"), terms.attention(1, 2)]
    losses = []
    for more in ({}, options):
        student, other = (make(task, width=16, dtype=torch.float32) for make in (model, teacher))
        common = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
        args = arguments(tmp_path, max_steps=2, **common, **more)
        trainer = InOrder(student, args, collate, rows(task), eval_dataset=rows(task), teacher=other, terms=chosen)
        trainer.train()
        losses.append([x["loss"] for x in trainer.state.log_history[:2]] + [trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=3e-2 if how == "bf16" else 1e-5)
    assert losses[0][1] < losses[0][0]
