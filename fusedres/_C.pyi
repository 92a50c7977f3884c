"""The compiled module. Addresses are integers (0: not there); see csrc/cpu/kernels.h."""

cuda_archs: tuple[str, ...]
cuda_reason: str
build: dict[str, str]  # compiler, nvcc, openmp ("": without), type

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
    residual_stats: int,
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
    residual: int,
    residual_stats: int,
    relu: bool,
    du: int,
    sums: int,
    residual_sums: int,
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
    residual: int,
    residual_stats: int,
    residual_sums: int,
    relu: bool,
    dx: int,
    dresidual: int,
) -> None: ...
def cpu_bn_relu_maxpool(
    dtype: str,
    n: int,
    c: int,
    h: int,
    w: int,
    planes: bool,
    threads: int,
    x: int,
    stats: int,
    z: int,
    index: int,
) -> None: ...
def cpu_bias_relu_maxpool(
    dtype: str, n: int, c: int, h: int, w: int, planes: bool, threads: int, x: int, bias: int, z: int
) -> None: ...
def cpu_bn_relu_maxpool_backward_reduce(
    dtype: str,
    n: int,
    c: int,
    h: int,
    w: int,
    planes: bool,
    threads: int,
    grad: int,
    index: int,
    x: int,
    stats: int,
    sums: int,
) -> None: ...
def cpu_bn_relu_maxpool_backward_apply(
    dtype: str,
    n: int,
    c: int,
    h: int,
    w: int,
    planes: bool,
    threads: int,
    grad: int,
    index: int,
    x: int,
    stats: int,
    sums: int,
    dx: int,
) -> None: ...
def cuda_bn_workspace(dtype: str, rows: int, channels: int, quantities: int, multiprocessors: int) -> int: ...
def cuda_bn_stats(
    dtype: str,
    rows: int,
    channels: int,
    x: int,
    weight: int,
    bias: int,
    eps: float,
    workspace: int,
    stats: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_running_stats(
    channels: int,
    mean: int,
    var: int,
    weight: int,
    bias: int,
    eps: float,
    stats: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_update_running_(
    channels: int,
    mean: int,
    var: int,
    stats: int,
    count: int,
    momentum: float,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_act(
    dtype: str,
    rows: int,
    channels: int,
    x: int,
    stats: int,
    residual: int,
    residual_stats: int,
    relu: bool,
    z: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_act_backward_reduce(
    dtype: str,
    rows: int,
    channels: int,
    grad: int,
    x: int,
    z: int,
    stats: int,
    residual: int,
    residual_stats: int,
    relu: bool,
    workspace: int,
    du: int,
    sums: int,
    residual_sums: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_act_backward_apply(
    dtype: str,
    rows: int,
    channels: int,
    grad: int,
    x: int,
    stats: int,
    sums: int,
    residual: int,
    residual_stats: int,
    residual_sums: int,
    relu: bool,
    dx: int,
    dresidual: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_relu_maxpool_workspace(
    dtype: str, n: int, height: int, width: int, channels: int, multiprocessors: int
) -> int: ...
def cuda_bn_relu_maxpool(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    x: int,
    stats: int,
    z: int,
    index: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bias_relu_maxpool(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    x: int,
    bias: int,
    z: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_relu_maxpool_backward_reduce(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    grad: int,
    index: int,
    x: int,
    stats: int,
    workspace: int,
    sums: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_bn_relu_maxpool_backward_apply(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    grad: int,
    index: int,
    x: int,
    stats: int,
    sums: int,
    dx: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_global_avg_pool(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    x: int,
    out: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_global_avg_pool_backward(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    grad: int,
    dx: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
def cuda_cast_weights(
    dtype: str, entries: list[tuple[int, int, int, int, int]], multiprocessors: int, stream: int
) -> None: ...
def cuda_conv_dgrad_workspace(
    dtype: str, n: int, height: int, width: int, channels: int, multiprocessors: int
) -> int: ...
def cuda_conv_dgrad(
    dtype: str,
    n: int,
    height: int,
    width: int,
    channels: int,
    filters: int,
    side: int,
    du: int,
    y: int,
    y_stats: int,
    y_sums: int,
    weight: int,
    add: int,
    add_pitch: int,
    compact: bool,
    x: int,
    x_stats: int,
    relu: bool,
    workspace: int,
    dx: int,
    x_sums: int,
    multiprocessors: int,
    stream: int,
) -> None: ...
