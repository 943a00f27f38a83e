"""TRL's trainers with our losses and with their own: the same data, the same losses, the same weights."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from datasets import Dataset
from small_models import byte_tokenizer, causal_model

from fastdistil.integrations import trl as ours

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WORDS = [("ab", "cdefg"), ("hello", "hi"), ("x", "yz yz"), ("1+1", "two")]
CHATS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in WORDS]
ASKED = [{"prompt": [{"role": "user", "content": q}], "privileged_context": a} for q, a in WORDS]


class Kind(NamedTuple):
    """A trainer of TRL: where it is, our mixin, whether it has a teacher of its own, its rows and its options."""

    module: str
    mixin: type
    teacher: bool
    rows: list[dict[str, Any]]
    options: dict[str, Any]


GENERATE = {"max_completion_length": 6, "num_generations": 2}
KINDS = {
    "GKD": Kind("trl.experimental.gkd", ours.GKDMixin, True, CHATS, {"max_new_tokens": 6, "lmbda": 0.0}),
    "GOLD": Kind(
        "trl.experimental.gold", ours.GOLDMixin, True, CHATS,
        {"max_completion_length": 6, "max_length": 48, "lmbda": 0.0},
    ),
    "Distillation": Kind("trl", ours.DistillationMixin, True, ASKED, {"max_completion_length": 6}),
    "SDFT": Kind("trl.experimental.sdft", ours.SelfDistillationMixin, False, ASKED, GENERATE),
    "SDPO": Kind("trl.experimental.sdpo", ours.SelfDistillationMixin, False, ASKED, GENERATE),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word to the hub, which every trainer of TRL's would send one."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Every second rollout is a success."""
    return [float(i % 2) for i, _ in enumerate(completions)]


def trainer(kind: str, fused: bool, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A trainer over small random models, always the same ones."""
    found = KINDS[kind]
    module = importlib.import_module(found.module)
    base = getattr(module, f"{kind}Trainer")
    members, tied = options.pop("members", {}), options.pop("model", {})
    built: Any = type(f"Fused{kind}", (found.mixin, base), members) if fused else base
    arguments = getattr(module, f"{kind}Config")(
        str(path), **{
            "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd",
            "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none",
            "save_strategy": "no", "use_cpu": True, "bf16": False, "logging_steps": 1, "disable_tqdm": True,
            "gradient_checkpointing": False, **found.options, **options,
        },
    )  # fmt: skip
    student, more = causal_model(32, 1, 2, **tied).to(dtype), dict[str, Any]()
    if found.teacher:
        more["teacher_model"] = causal_model(48, 2, 1, **tied).to(dtype)
    else:  # whose teacher is the student as it is on the disk
        student.save_pretrained(path / "student")
        student = type(student).from_pretrained(path / "student", dtype=dtype)
    if kind == "SDPO":
        more["reward_funcs"] = reward
    return built(
        student, args=arguments, train_dataset=Dataset.from_list(found.rows * 4),
        processing_class=byte_tokenizer(), **more,
    )  # fmt: skip


def run(kind: str, fused: bool, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """(losses of the steps, the update of all weights as one vector)."""
    made = trainer(kind, fused, path, dtype, **options)
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    after = made.model.state_dict()
    losses = torch.tensor([x["loss"] for x in made.state.log_history if "loss" in x], dtype=torch.float64)
    return losses, torch.cat([(after[name] - x).double().flatten() for name, x in before.items()])


def same(kind: str, path: Path, dtype: torch.dtype, limit: float, **options: Any) -> None:
    """Both runs agree, and there is something to agree on."""
    theirs, update = run(kind, False, path, dtype, **options)
    losses, mine = run(kind, True, path, dtype, **options)
    assert len(theirs) == 2 and theirs.min() > 1e-4 and update.norm() > 1e-3
    assert ((losses - theirs).abs() / theirs).max() < limit, (losses, theirs)
    assert (mine - update).norm() / update.norm() < limit


WIDE = [torch.float32, torch.float64]
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
SCALED = {"logit_scale": 0.5, "final_logit_softcapping": 3.0}
TAILED = {"distillation_topk": 20, "distillation_add_tail": True}
FULL = {"distillation_mode": "full_logits"}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GKD", {"beta": 0.0}),
        ("GKD", {"beta": 0.3, "lmbda": 1.0}),  # on what the student says
        ("GKD", {"beta": 1.0, "seq_kd": True}),  # on what the teacher says
        ("GOLD", {"beta": 0.0, "temperature": 2.0}),
        ("GOLD", {"beta": 0.7, "lmbda": 1.0}),
        ("GKD", {"beta": 0.5, "members": {"two_heads": True, "chunk_bytes": 1 << 15}}),
        ("GOLD", {"beta": 0.0, "temperature": 2.0, "members": {"two_heads": True}}),
        ("SDFT", {**FULL, "distillation_alpha": 0.0, "num_loss_tokens_to_skip": 2}),
        ("SDFT", {"distillation_topk": 20, "temperature": 1.5}),
        ("SDFT", {**TAILED, "distillation_alpha": 1.0, "num_iterations": 2}),  # the second one off its policy: clipped
        ("SDFT", {**FULL, "teacher_model_kind": "live"}),
        ("SDPO", {**FULL, "distillation_weight": 0.5}),
        (
            "SDPO",
            {**TAILED, "distillation_mode": "topk_logits", "distillation_alpha": 0.5, "teacher_model_kind": "base"},
        ),
    ],
)
def test_steps_are_theirs(kind: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    same(kind, tmp_path, dtype, LIMITS[dtype], **options)


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"beta": 0.5, "temperature": 2.0}, {"beta": 1.0, "model": {"tie_word_embeddings": True}},
     {"model": SCALED, "temperature": 0.8}],
)  # fmt: skip
def test_two_heads_are_theirs(options: dict[str, Any], tmp_path: Path) -> None:
    """TRL's kernel computes in float32, whatever the models are."""
    same("Distillation", tmp_path, torch.float32, 1e-5, **options)


@pytest.mark.parametrize("kind", ["GKD", "GOLD"])
def test_two_heads_form_no_logits(kind: str, tmp_path: Path) -> None:
    """The heads are never called; an evaluation that asks for outputs has whole logits, and the same loss."""
    made = trainer(kind, True, tmp_path, members={"two_heads": True}, max_steps=1)
    calls = list[int]()
    for model in (made.model, made.teacher_model):
        model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    made.train()
    assert not calls
    batch = made.data_collator([made.train_dataset[i] for i in range(2)])
    loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    assert len(calls) == 2 and outputs.logits.shape[-1] == 261
    torch.testing.assert_close(made.compute_loss(made.model, batch), loss, rtol=1e-5, atol=0)
    assert len(calls) == 2


def test_two_heads_see_adapters(tmp_path: Path) -> None:
    """LoRA in the backbone has the gradient of the whole logits; on the head, or as a prompt, it is refused."""
    made = trainer("GKD", True, tmp_path, members={"two_heads": True})
    batch = made.data_collator([made.train_dataset[i] for i in range(2)])
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student, gradients = peft.get_peft_model(causal_model(32, 1, 2), config), list[torch.Tensor]()
    for made.two_heads in (True, False):
        student.zero_grad()
        made.compute_loss(student, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.requires_grad]))
    assert gradients[1].norm() > 1e-3 and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    made.two_heads = True
    on_head = peft.get_peft_model(causal_model(32, 1, 2), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for model, message in (
        (on_head, "the student's head has a PEFT adapter"),
        (peft.get_peft_model(causal_model(32, 1, 2), prompt), "two_heads is True with prompt learning"),
    ):
        with pytest.raises(ValueError, match=message):
            made.compute_loss(model, batch)


def test_entropy_is_theirs(tmp_path: Path) -> None:
    """What the trainer logs beside the loss."""
    found = []
    for fused in (False, True):
        made = trainer("Distillation", fused, tmp_path, temperature=2.0)
        made.train()
        found.append([x["entropy"] for x in made.state.log_history if "entropy" in x])
    torch.testing.assert_close(*map(torch.tensor, found))
    assert len(found[0]) == 2 and min(found[0]) > 0.1


def test_adapters(tmp_path: Path) -> None:
    """The frozen head of a student with LoRA has no gradient to pay for, and the adapters have TRL's."""
    updates = []
    for fused in (False, True):
        kind = KINDS["Distillation"]
        made = trainer("Distillation", fused, tmp_path)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        student = peft.get_peft_model(causal_model(32, 1, 2), config)
        made = type(made)(
            student, made.teacher_model, made.args, train_dataset=Dataset.from_list(kind.rows * 4),
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        before = [p.detach().clone() for p in student.parameters() if p.requires_grad]
        made.train()
        after = [p.detach() for p in student.parameters() if p.requires_grad]
        updates.append(torch.cat([(x - y).double().flatten() for x, y in zip(after, before, strict=True)]))
    assert updates[0].norm() > 1e-3 and (updates[1] - updates[0]).norm() < 1e-5 * updates[0].norm()


def test_autocast_projects_in_its_dtype(tmp_path: Path) -> None:
    """Under bfloat16 autocast the update is as close to float32's as that of TRL's kernel is."""
    exact = run("Distillation", True, tmp_path)[1]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = (run("Distillation", fused, tmp_path)[1] for fused in (False, True))
    assert (theirs - exact).norm() > 1e-4 * exact.norm()  # it was on
    assert (mine - exact).norm() < 2 * (theirs - exact).norm()


def test_autocast_reaches_two_heads(tmp_path: Path) -> None:
    """bf16=True is a matter of the forward pass that two_heads goes round: it is on all the same, and as exact."""
    exact = run("GKD", False, tmp_path)[1]
    whole, mine = (
        run("GKD", True, tmp_path, bf16=True, members={"two_heads": two_heads})[1] for two_heads in (False, True)
    )
    assert (mine - exact).norm() > 1e-4 * exact.norm()
    assert (mine - exact).norm() < 2 * (whole - exact).norm()


@pytest.mark.parametrize("fused", [False, True])
def test_bf16_option_leaves_float32(fused: bool, tmp_path: Path) -> None:
    """What docs/trainers/trl.md warns of: in one process bf16=True does not reach this trainer's models."""
    made, seen = trainer("Distillation", fused, tmp_path, bf16=True, max_steps=1), set[torch.dtype]()
    states = made._get_last_hidden_state

    def listen(*args: Any, **more: Any) -> torch.Tensor:
        found: torch.Tensor = states(*args, **more)
        seen.add(found.dtype if not torch.is_autocast_enabled("cpu") else torch.get_autocast_dtype("cpu"))
        return found

    made._get_last_hidden_state = listen
    made.train()
    assert made.accelerator.mixed_precision == "bf16" and seen == {torch.float32}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 3.0}, {"reduction": "sum"}, {"reduction": "mean"}, {"num_items_in_batch": 7},
     {"num_items_in_batch": torch.tensor(5), "reduction": "mean"}, {"labels": None}, {"labels": None, "reduction": "mean"}],
)  # fmt: skip
def test_function_is_theirs(dtype: torch.dtype, beta: float, options: dict[str, Any]) -> None:
    """generalized_jsd_loss, in value and gradient, with what both GKD and GOLD can say."""
    gold = importlib.import_module("trl.experimental.gold").GOLDTrainer.generalized_jsd_loss
    gkd = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    student, teacher = torch.randn(3, 5, 40, dtype=dtype), torch.randn(3, 5, 40, dtype=dtype)
    labels = torch.where(torch.rand(3, 5) < 0.5, -100, 1)
    given = {"labels": labels, "beta": beta, **options}
    found = []
    for function in (ours.generalized_jsd_loss, gold, gkd):
        x = student.clone().requires_grad_()
        loss = function(x, teacher, **given)
        loss.backward()
        assert x.grad is not None
        found.append((loss.detach(), x.grad))
    for value, gradient in found[1:]:
        assert (found[0][0] - value).abs() < LIMITS[dtype] * value.abs()
        assert (found[0][1] - gradient).norm() < LIMITS[dtype] * gradient.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"logits_are_probs": True}, "logits_are_probs is True"),
        ({"beta": 1.5}, "beta is 1.5, expected 0 <= beta <= 1"),
    ],
)
def test_function_refuses(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.generalized_jsd_loss(torch.randn(2, 5), torch.randn(2, 5), **call)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "SDFT",
            {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
            "distillation_mode is 'sampled_token'",
        ),
        ("SDFT", {"distillation_topk": None}, "distillation_topk is None"),
        ("SDPO", {"distillation_weight": 0.0, **FULL}, "distillation_weight is 0"),
    ],
)
def test_trainers_refuse(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "teacher_tokenizer_name_or_path" in options:
        byte_tokenizer().save_pretrained(tmp_path)
        options = {**options, "teacher_tokenizer_name_or_path": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        trainer(kind, True, tmp_path, **options)


class Given:
    """A trainer's place in the mixin's line, which keeps what it got."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)


def test_what_needs_a_server_or_a_cluster_is_refused() -> None:
    """Options that no trainer can be built with here."""
    options = Given(distillation_mode="topk_logits", distillation_topk=5, use_teacher_server=True)
    with pytest.raises(ValueError, match="use_teacher_server is True"):
        type("Fused", (ours.SelfDistillationMixin, Given), {})(args=options)
    with pytest.raises(ValueError, match="teacher_model is None"):
        type("Fused", (ours.DistillationMixin, Given), {})(teacher_model=None)
    student = causal_model(32, 1, 2)
    student.get_output_embeddings().weight.ds_id = 0  # what ZeRO-3 puts on a parameter
    with pytest.raises(ValueError, match="the student's head is split by DeepSpeed's ZeRO-3"):
        ours.head_arguments("Fused", "student", student, torch.zeros(1, 1, 32))


def test_gkd_says_what_its_temperature_is(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="GKDConfig.temperature = 0.9 is the temperature of sampling alone"):
        trainer("GKD", True, tmp_path)
    assert trainer("GKD", True, tmp_path, temperature=1.0)._loss_temperature() == 1


@pytest.mark.parametrize(
    ("given", "scale"),
    [({}, 1.0), ({"logit_scale": 0.25}, 0.25), ({"logit_scale": None, "logits_scaling": 8.0}, 0.125),
     ({"output_multiplier": 0.5}, 0.5), ({"lm_head_multiplier": 2.0}, 2.0),
     ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0)],
)  # fmt: skip
def test_logit_scale(given: dict[str, Any], scale: float) -> None:
    config = Given(**{"model_type": "llama", **given})
    assert ours.logit_scale(config) == scale


def test_gkd_divides_by_the_labels_of_the_data_set(tmp_path: Path) -> None:
    """What docs/trainers/trl.md warns of: on the student's own answers GKD divides by the length of those it replaced."""
    made, seen = trainer("GKD", True, tmp_path, lmbda=1.0, max_steps=1), list[tuple[int, int]]()
    compute = made.compute_loss

    def listen(model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
        seen.append((int(num_items_in_batch), int((inputs["labels"][:, 1:] != -100).sum())))
        return compute(model, inputs, *args, num_items_in_batch=num_items_in_batch, **more)

    made.compute_loss = listen
    made.train()
    assert len(seen) == 2 and seen[0][0] != sum(compared for _, compared in seen)
