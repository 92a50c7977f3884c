"""The compiled module. Addresses are integers (0: not there); see csrc/cpu/kernels.h."""

cuda_archs: tuple[str, ...]
cuda_reason: str

def cpu_isa() -> str: ...
def use_cpu_isa(isa: str) -> None: ...
def cpu_bn_stats(
    dtype: str,
    n: int,
    c: int,
    hw: int,
    planes: bool,
    threads: int,
    x: int,
    weight: int,
    bias: int,
    eps: float,
    stats: int,
) -> None: ...
def cpu_bn_running_stats(
    c: int, mean: int, var: int, weight: int, bias: int, eps: float, stats: int
) -> None: ...
def cpu_bn_update_running_(c: int, mean: int, var: int, stats: int, count: int, momentum: float) -> None: ...
def cpu_bn_act(
    dtype: str,
    n: int,
    c: int,
    hw: int,
    planes: bool,
    threads: int,
    x: int,
    stats: int,
    residual: int,
    relu: bool,
    z: int,
) -> None: ...
def cpu_bn_act_backward_reduce(
    dtype: str,
    n: int,
    c: int,
    hw: int,
    planes: bool,
    threads: int,
    grad: int,
    x: int,
    z: int,
    stats: int,
    relu: bool,
    du: int,
    sums: int,
) -> None: ...
def cpu_bn_act_backward_apply(
    dtype: str,
    n: int,
    c: int,
    hw: int,
    planes: bool,
    threads: int,
    grad: int,
    x: int,
    stats: int,
    sums: int,
    relu: bool,
    dx: int,
) -> None: ...
def cuda_bn_act(
    dtype: str,
    rows: int,
    channels: int,
    multiprocessors: int,
    x: int,
    stats: int,
    residual: int,
    relu: bool,
    z: int,
    stream: int,
) -> None: ...
