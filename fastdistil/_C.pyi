from torch import Tensor

cuda_arches: str

def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    threads: int,
) -> None: ...
def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    threads: int,
) -> None: ...
def logit_fwd_cuda(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    stream: int,
) -> None: ...
def logit_bwd_cuda(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    stream: int,
) -> None: ...
def attention(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    real: Tensor | None,
    row_scale: Tensor,
    rows: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    offsets: list[int],
    kind: int,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    low_rank: bool,
    threads: int,
) -> None: ...
def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    rows: Tensor,
    gradient: Tensor | None,
    threads: int,
) -> None: ...
