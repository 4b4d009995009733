"""What an update takes: time in turns with others, memory, kernels, bytes, traces; and the memory's bandwidth."""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from compiled_adam.base.mlx_graph import kernels

from .contenders import COMPILED, EAGER, NOT_MEASURED, Contender, Make, OnMLX, Tree, Unavailable
from .graph import Kernel, traffic
from .spread import noisy, ratios, spread
from .workloads import hollow

Clock = Callable[[], float]
__all__ = ["bandwidth", "compare", "graph_of", "kernels", "resources"]


def compare(
    contenders: Mapping[str, Make],
    parameters: Callable[[], Tree],
    gradients: Tree,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Measures one update of each contender: for each, a dictionary of figures by name.

    The contenders take turns until ``seconds`` have passed and at least five rounds, in a new order each round:
    whatever slows the machine meets all of them, and so does what another one left behind. The first three updates of
    each (tracing, compiling, warming up, memory) do not count. Of one that cannot be made the only figure is why
    (`NOT_MEASURED`); of the others: those of `resources`; ``median_ms``, ``p10_ms``, ``p90_ms``,
    ``rounds``; ``ratio``, ``ratio_p10``, ``ratio_p90`` and ``ratio_noisy`` of the ratios within a round to stock MLX
    called eagerly (or the first contender, if that is not among them), and ``compiled_ratio`` and so on to it under
    ``mx.compile``; ``traces`` after all.
    """
    running: dict[str, Contender] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, make in contenders.items():
        try:
            running[name], figures[name] = resources(make, parameters(), gradients, clock)
        except Unavailable as error:
            figures[name] = {NOT_MEASURED: str(error)}
    times: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    shuffle = random.Random(0).shuffle
    start = clock()
    while clock() - start < seconds or len(times[names[0]]) < 5:
        shuffle(names)
        for name in names:
            begin = clock()
            running[name].update()
            times[name].append(clock() - begin)
            if not isinstance(running[name], OnMLX):
                settle()
    references = {"ratio": times.get(EAGER, times[next(iter(running))])}
    if COMPILED in times:
        references["compiled_ratio"] = times[COMPILED]
    for name, values in times.items():
        p10, median, p90 = spread(values)
        figures[name] |= {"median_ms": 1e3 * median, "p10_ms": 1e3 * p10, "p90_ms": 1e3 * p90, "rounds": len(values)}
        for key, reference in references.items():
            within = ratios(values, reference)
            p10, median, p90 = spread(within)
            figures[name] |= {key: median, f"{key}_p10": p10, f"{key}_p90": p90, f"{key}_noisy": noisy(within)}
        figures[name]["traces"] = running[name].traces
    return figures


def settle() -> None:
    """Waits until this process computes nothing: for half a second at most.

    The threads of another framework's pool go on spinning when they have nothing to do, and take a core from whoever
    is next: stock MLX needs up to half as long again right after PyTorch with two threads on two cores.
    """
    for _ in range(50):
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.002:
            return


def resources(
    make: Make, parameters: Tree, gradients: Tree, clock: Clock = time.perf_counter
) -> tuple[Contender, dict[str, Any]]:
    """A contender that has done three updates, and what they took besides time.

    Figures: ``trace_ms`` (building the first update, which traces it; None where nothing is lazy), ``first_call_ms``
    (that and computing it, compilers included unless they kept their results), ``peak_extra_bytes`` allocated by MLX
    during an update beyond what exists before it (None of others), ``state_bytes`` of the optimizer, and
    ``traces`` so far.
    """
    contender = make(parameters, gradients)
    del parameters  # the contender's alone, or they could not be updated in place
    on_mlx = isinstance(contender, OnMLX)
    if isinstance(contender, OnMLX):
        mx.eval(contender.changed())
    mx.synchronize()
    begin = clock()
    trace = None
    if isinstance(contender, OnMLX):
        contender.build()
        trace = clock() - begin
        mx.eval(contender.changed())
    else:
        contender.update()
    first = clock() - begin
    contender.update()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    contender.update()
    return contender, {
        "trace_ms": None if trace is None else 1e3 * trace,
        "first_call_ms": 1e3 * first,
        "peak_extra_bytes": max(0, mx.get_peak_memory() - before) if on_mlx else None,
        "state_bytes": contender.state_bytes(),
        "traces": contender.traces,
    }


def graph_of(make: Make, parameters: Tree, gradients: Tree) -> dict[str, Any]:
    """The kernels of one update of a contender on MLX, and the bytes they move.

    Nothing is computed and almost nothing allocated: `hollow` arrays have shapes and dtypes only. Figures: ``kernels``;
    ``kernel_bytes`` read and written by all together; ``estimated_kernels`` as `mlx_graph.Kernel` has it;
    ``by_kernel``, a list of name, count, bytes read and bytes written, the greatest first.
    """
    contender = make(hollow(parameters), hollow(gradients))
    if not isinstance(contender, OnMLX):
        raise TypeError(f"{type(contender).__name__} builds no graph of MLX's")
    inputs, build = contender.graph()
    found = traffic(inputs, build)
    groups: dict[str, list[Kernel]] = collections.defaultdict(list)
    for kernel in found:
        groups[kernel.name].append(kernel)
    rows = [
        {"kernel": name, "count": len(g), "read": sum(k.read for k in g), "written": sum(k.written for k in g)}
        for name, g in groups.items()
    ]
    return {
        "kernels": len(found),
        "kernel_bytes": sum(kernel.read + kernel.written for kernel in found),
        "estimated_kernels": sum(kernel.estimated for kernel in found),
        "by_kernel": sorted(rows, key=lambda row: -(row["read"] + row["written"])),
    }


def bandwidth(size: int = 1 << 25, rounds: int = 3, chain: int = 4) -> dict[str, float]:
    """Bytes per second that kernels of MLX move between memory and themselves, on arrays of ``size`` float32.

    "scale" is ``a = -a`` (one read, one write) and "triad" ``a = a + b / 2`` (two and one), both in place, so that no
    new memory is asked for; the best of the rounds, and "best" of the two. ``chain`` of them are evaluated together:
    a GPU needs about as long for one as its launch takes, and a bandwidth that is too low makes all look good.
    """
    a, b = mx.ones((size,)), mx.ones((size,))
    mx.eval(a, b)
    triad = mx.compile(lambda a, b: a + 0.5 * b)
    found = {"scale": 0.0, "triad": 0.0}
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(chain):
            a = -a
        mx.eval(a)
        middle = time.perf_counter()
        for _ in range(chain):
            a = triad(a, b)
        mx.eval(a)
        end = time.perf_counter()
        found["scale"] = max(found["scale"], chain * 2 * a.nbytes / (middle - begin))
        found["triad"] = max(found["triad"], chain * 3 * a.nbytes / (end - middle))
    return {**found, "best": max(found.values())}
