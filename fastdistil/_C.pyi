from torch import Tensor

cuda_arches: str

def isa() -> str: ...
def logit(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor | None,
    stats: Tensor,
    gradient: Tensor | None,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    threads: int,
) -> None: ...
def logit_cuda(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor | None,
    stats: Tensor,
    gradient: Tensor | None,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    stream: int,
) -> None: ...
