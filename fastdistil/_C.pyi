from torch import Tensor
from typing_extensions import Buffer

cuda_arches: str
contracts: dict[str, tuple[str, ...] | int]

def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> None: ...

class PooledMemory(Buffer):
    def __init__(self, bytes: int) -> None: ...

def pool_available() -> bool: ...
def pool_held() -> int: ...
def pool_release() -> None: ...
def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    whole: Tensor | None,
    threads: int,
) -> None: ...
def acceptance(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    levels: Tensor,
    log_acceptance: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    threads: int,
) -> None: ...
def row_moments(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    moments: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    threads: int,
) -> None: ...
def hidden_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    kind: int,
    threads: int,
) -> None: ...
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
    phase: int = 0,
    labels: Tensor | None = None,
    label_scale: Tensor | None = None,
    difference: bool = False,
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
    difference: bool = False,
) -> None: ...
def use_cuda_cluster(blocks: int) -> None: ...
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
    phase: int = 0,
    difference: bool = False,
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
    difference: bool = False,
) -> None: ...
def topk_fwd(
    student: Tensor,
    values: Tensor,
    columns: Tensor,
    rest: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    divergence: int,
    beta: float,
    tail: int,
    temperature: float,
    value_factor: float,
    threads: int,
) -> None: ...
def topk_bwd(
    student: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    temperature: float,
    threads: int,
) -> None: ...
def sparse_histogram(param: Tensor, base: Tensor, counts: Tensor, bucket: int, threads: int) -> bool: ...
def sparse_compact(
    param: Tensor, base: Tensor, out: Tensor | None, threshold: int, ties: int, threads: int
) -> tuple[int, int]: ...
def sparse_take(tensor: Tensor, index: Tensor, values: Tensor, threads: int) -> None: ...
def sparse_put(tensor: Tensor, index: Tensor, values: Tensor, threads: int) -> None: ...
def sparse_update(table: Tensor, constants: Tensor, threads: int) -> None: ...

sparse_select_chunk: int
sparse_update_chunk: int

def sparse_histogram_cuda(
    table: Tensor, chunks: Tensor, counts: Tensor, nan: Tensor, bucket: int, stream: int
) -> None: ...
def sparse_count_cuda(table: Tensor, chunks: Tensor, counts: Tensor, threshold: int, stream: int) -> None: ...
def sparse_write_cuda(
    table: Tensor, chunks: Tensor, offsets: Tensor, keep: Tensor, out: Tensor, threshold: int, stream: int
) -> None: ...
def sparse_update_cuda(table: Tensor, constants: Tensor, chunks: Tensor, stream: int) -> None: ...
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
