"""XtremeDistil's student (Mukherjee & Awadallah 2020, arXiv 2004.05686) as a transformers model: word embeddings, a
bidirectional LSTM, optionally a projection GELU(W h + b) to the teacher's width, and a head.

    import fastdistil.models  # registers the model; then, as any other:
    model = AutoModelForTokenClassification.from_pretrained("runs/student")

`bilstm_student` makes one from a teacher. `hidden_states` of the output, with output_hidden_states=True:

| index | what | shape |
|---|---|---|
| 0 | word embeddings | (B, S, embedding_size) |
| l = 1 .. num_hidden_layers | output of BiLSTM l | (B, S, 2 lstm_size) |
| num_hidden_layers + 1, with a projection | projected states, which the head reads | (B, S, projection_size) |

`fastdistil.capture` counts the first two kinds in the same way: its last layer is the BiLSTM's output. Against it,
`hidden_loss(states, teacher, projection=weight, bias=bias, activation="gelu")` with the projection's own parameters
compares the projected states without forming them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from fastdistil.models._check import labels_and_padding, vocabulary_rows
from fastdistil.models.capture import base_model
from fastdistil.models.student import svd_basis


class BiLstmConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a BiLSTM: `embedding_size` E, `lstm_size` H in each direction, `projection_size` D of the projected
    states or None for no projection. `dropout` acts on the embeddings and on the output of each BiLSTM;
    `initializer_range` is the standard deviation that word embeddings are drawn with, large enough for the gates.

    Raises ValueError for a size below 1 and a dropout outside of 0 to 1.
    """

    model_type = "fastdistil-bilstm"

    def __init__(
        self,
        vocab_size: int = 30_522,
        embedding_size: int = 300,
        lstm_size: int = 600,
        projection_size: int | None = None,
        num_hidden_layers: int = 1,
        dropout: float = 0.2,
        pad_token_id: int | None = 0,
        initializer_range: float = 1.0,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "lstm_size": lstm_size,
            "num_hidden_layers": num_hidden_layers,
            "projection_size": 1 if projection_size is None else projection_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"BiLstmConfig: {name} is {size}, expected at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"BiLstmConfig: dropout is {dropout}, expected 0 to less than 1")
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise ValueError(f"BiLstmConfig: pad_token_id is {pad_token_id}, expected 0 to {vocab_size - 1} or None")
        self.vocab_size, self.embedding_size, self.lstm_size = vocab_size, embedding_size, lstm_size
        self.projection_size, self.num_hidden_layers, self.dropout = projection_size, num_hidden_layers, dropout
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the states that a head reads."""
        return 2 * self.lstm_size if self.projection_size is None else int(self.projection_size)


class _Embeddings(nn.Module):
    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        found: Tensor = self.dropout(self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        return found


class BiLstmLayer(nn.Module):
    """A bidirectional LSTM over the tokens that are no padding, wherever they stand in their row."""

    def __init__(self, config: BiLstmConfig, input_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, config.lstm_size, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, keep: Tensor) -> Tensor:
        """hidden_states (B, S, E), keep (B, S) bool -> (B, S, 2 H), 0 where keep is False, in the parameters' dtype."""
        lengths = keep.sum(1).cpu()
        compact = keep[:, 1:] <= keep[:, :-1]  # padded at the end
        order = None if bool(compact.all()) else (~keep).to(torch.uint8).argsort(dim=1, stable=True)[..., None]
        x = hidden_states if order is None else hidden_states.gather(1, order.expand_as(hidden_states))
        # Autocast on a CPU would give bfloat16 or float32 as the lengths happen to be equal or not.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(next(self.lstm.parameters()).dtype)
            # An LSTM refuses a row without tokens: one padding token stands in, and its output is dropped below.
            packed = pack_padded_sequence(x, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        if order is not None:
            x = torch.zeros_like(x).scatter(1, order.expand_as(x), x)
        found: Tensor = self.dropout(x.masked_fill(~keep[..., None], 0))
        return found


class BiLstmPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the BiLSTM models have in common."""

    config_class = BiLstmConfig
    base_model_prefix = "bilstm"
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        """As Keras, with which the paper was written: Glorot, orthogonal recurrent weights, forget gates open (1)."""
        super()._init_weights(module)  # Glorot in the LSTM, zeros in biases
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        if not isinstance(module, nn.LSTM):
            return
        for name, parameter in module.named_parameters():
            if "weight_hh" in name:
                init.orthogonal_(parameter)
            elif "bias_ih" in name and not getattr(parameter, "_is_hf_initialized", False):
                init.ones_(parameter[module.hidden_size : 2 * module.hidden_size])  # gates: input, forget, cell, output

    def groups(self) -> dict[str, tuple[str, ...]]:
        """The model's parts from the top to the bottom, {name: parts of its parameters' names}, in the order in which
        XtremeDistil unfreezes them: head, projection, lstm, embeddings, without what the model does not have."""
        parts = {"head": "classifier", "projection": "projection", "lstm": "layers", "embeddings": "embeddings"}
        names = [name for name, _ in self.named_parameters()]
        return {group: (f"{part}.",) for group, part in parts.items() if any(f"{part}." in name for name in names)}


class BiLstmModel(BiLstmPreTrainedModel):
    """Embeddings, BiLSTM and projection, without a head."""

    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        widths = [config.embedding_size, *[2 * config.lstm_size] * (config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList([BiLstmLayer(config, width) for width in widths])
        self.projection: nn.Sequential | None = None
        if config.projection_size is not None:
            self.projection = nn.Sequential(nn.Linear(2 * config.lstm_size, config.projection_size), nn.GELU())
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """A BaseModelOutput with last_hidden_state (B, S, D), what a head reads.

        Args:
            input_ids: (B, S) int64, or inputs_embeds (B, S, E) in their place.
            attention_mask: (B, S), 0 for padding, on either side or in between; by default all ones. Padding changes
                nothing about the other tokens; its BiLSTM outputs are 0. A row of padding alone is allowed.
            token_type_ids: ignored; some tokenizers make them.

        Raises ValueError where both or neither of input_ids and inputs_embeds came, and for a mask of another shape.
        """
        if (input_ids is None) is (inputs_embeds is None):
            raise ValueError("BiLstmModel: expected either input_ids or inputs_embeds")
        states = self.embeddings(input_ids, inputs_embeds)
        shape = states.shape[:2]
        mask = torch.ones(shape, device=states.device) if attention_mask is None else attention_mask
        if mask.shape != shape:
            raise ValueError(f"BiLstmModel: attention_mask has shape {tuple(mask.shape)}, expected {tuple(shape)}")
        if 0 in shape:
            raise ValueError(f"BiLstmModel: input_ids has shape {tuple(shape)}, expected at least one row and token")
        keep = mask.to(states.device) != 0
        found = [states]
        for layer in self.layers:
            found.append(layer(found[-1], keep))
        if self.projection is not None:
            found.append(self.projection(found[-1]))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(last_hidden_state=found[-1], hidden_states=tuple(found) if wanted else None)
        return output.to_tuple() if return_dict is False else output


class BiLstmForTokenClassification(BiLstmPreTrainedModel):
    """A class for every token."""

    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__(config)
        self.bilstm = BiLstmModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """A TokenClassifierOutput: logits (B, S, C), and the cross entropy of labels (B, S) int64, -100 for none."""
        states = self.bilstm(input_ids, attention_mask, token_type_ids, inputs_embeds, output_hidden_states)
        logits = self.classifier(states.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.to(logits.device).flatten())
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)
        return output.to_tuple() if return_dict is False else output


class BiLstmForSequenceClassification(BiLstmPreTrainedModel):
    """A class for every row, from the mean of the states of its tokens that are no padding (0 where it has none)."""

    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__(config)
        self.bilstm = BiLstmModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """A SequenceClassifierOutput: logits (B, C), and the cross entropy of labels (B,) int64."""
        states = self.bilstm(input_ids, attention_mask, token_type_ids, inputs_embeds, output_hidden_states)
        last = states.last_hidden_state
        keep = last.new_ones(last.shape[:2]) if attention_mask is None else (attention_mask != 0).to(last)
        mean = (last * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
        logits = self.classifier(mean)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)
        return output.to_tuple() if return_dict is False else output


_TASKS = {"token": BiLstmForTokenClassification, "sequence": BiLstmForSequenceClassification}


def bilstm_student(
    teacher: nn.Module,
    rows: Tensor,
    *,
    pad_token_id: int,
    labels: Sequence[str],
    task: str = "token",
    embedding_size: int = 300,
    lstm_size: int = 600,
    layers: int = 1,
    dropout: float = 0.2,
    projection: bool = True,
) -> Any:
    """A BiLSTM for `task` ("token" or "sequence" classification) over the teacher's vocabulary rows `rows` (V_s,)
    int64: student id i reads the teacher's piece rows[i].

    Word embeddings are the teacher's in the basis of `svd_basis` over these rows, scaled so that their entries have a
    mean square of 1: the teacher's own, often 0.05 in size, give the gates next to no signal at first. The rest is
    drawn from torch's generator. `projection`: whether the states are projected to the teacher's width. float32, CPU,
    train mode. `pad_token_id` counts in the new ids.

    Raises TypeError or ValueError for a teacher that is no transformers model, for another task, and where
    `embedding_size` is larger than the width of the teacher's table.
    """
    if task not in _TASKS:
        raise ValueError(f"bilstm_student: task is {task!r}, expected one of {sorted(_TASKS)}")
    base: Any = base_model(teacher, "bilstm_student", "teacher")
    words = base.get_input_embeddings().weight.detach()
    rows = vocabulary_rows("bilstm_student", rows, len(words))
    labels = labels_and_padding("bilstm_student", labels, pad_token_id, len(rows))
    table = words[rows.to(base.device)].cpu()  # (V_s, D)
    if not 1 <= embedding_size <= table.shape[1]:
        raise ValueError(
            f"bilstm_student: embedding_size is {embedding_size}, expected 1 to {table.shape[1]}, the width of the "
            "teacher's word embeddings"
        )
    config = BiLstmConfig(
        vocab_size=len(rows),
        embedding_size=embedding_size,
        lstm_size=lstm_size,
        num_hidden_layers=layers,
        projection_size=int(base.config.hidden_size) if projection else None,
        dropout=dropout,
        pad_token_id=pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    student = _TASKS[task](config)
    mean, basis = svd_basis(table, embedding_size)
    embeddings = (table.float() - mean) @ basis
    scale = embeddings.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(embeddings / scale)
        student.get_input_embeddings().weight[pad_token_id] = 0
    return student


AutoConfig.register(BiLstmConfig.model_type, BiLstmConfig, exist_ok=True)
AutoModel.register(BiLstmConfig, BiLstmModel, exist_ok=True)
AutoModelForTokenClassification.register(BiLstmConfig, BiLstmForTokenClassification, exist_ok=True)
AutoModelForSequenceClassification.register(BiLstmConfig, BiLstmForSequenceClassification, exist_ok=True)
