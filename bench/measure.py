"""What every part measures with: contenders in turn, memory, kernels, bandwidth; the spread, and when it is noise."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
from compiled_adam.base.mlx_graph import kernels
from compiled_adam.update.kernels import LARGE, of_leaves

from .contenders import COMPILED, EAGER, NOT_MEASURED, Contender, Make, OnMLX, Tree, Unavailable

Row = dict[str, Any]
Clock = Callable[[], float]
WIDE, DRIFT = 0.5, 0.15
NOISY = (
    f"noisy: the p10-p90 range of a ratio is wider than {100 * WIDE:.0f} % of it, or its medians over the first and the"
    f" second half of the rounds are more than {100 * DRIFT:.0f} % apart"
)
__all__ = [
    "NOISY",
    "Here",
    "Row",
    "Runner",
    "Stage",
    "bandwidth",
    "compare",
    "kernels",
    "noisy",
    "ratios",
    "resources",
    "spread",
]


class Stage(NamedTuple):
    """A piece of a part's work: what a person is told meanwhile, and what does it and returns rows."""

    label: str
    rows: Callable[[], list[Row]]


class Runner(Protocol):
    """A contender that has done three updates."""

    figures: Row  # those of `resources`

    def time(self) -> float:
        """The seconds of one update."""

    def traces(self) -> int | None:
        """How often the Python of the update was traced so far; None where nothing is."""

    def close(self) -> None:
        """Frees what it holds."""


class Here:
    """A contender in this process. The ``parameters`` become its own."""

    def __init__(self, make: Make, parameters: Tree, gradients: Tree, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._contender, self.figures = resources(make, parameters, gradients, clock)

    def time(self) -> float:
        begin = self._clock()
        self._contender.update()
        seconds = self._clock() - begin
        if not isinstance(self._contender, OnMLX):
            settle()
        return seconds

    def traces(self) -> int | None:
        return self._contender.traces

    def close(self) -> None:
        del self._contender


def compare(
    contenders: Mapping[str, Callable[[], Runner]],
    seconds: float,
    times_anew: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Row]:
    """Measures one update of each contender: for each, a dictionary of figures by name.

    All are made ``times_anew`` times, and each time measured for a part of the ``seconds``: two processes of the same
    contender differ by a tenth, because their memory lies elsewhere.

    Of a contender that cannot be made the only figure is why (`NOT_MEASURED`). Of the others: those of `resources`;
    ``median_ms``, ``p10_ms``, ``p90_ms``, ``rounds``; ``ratio``, ``ratio_p10``, ``ratio_p90`` and ``ratio_noisy`` of
    the ratios within a round to stock MLX called eagerly (or the first contender, if that is not among them), and
    ``compiled_ratio`` and so on to it under ``mx.compile``; ``traces`` after all.
    """
    figures: dict[str, Row] = {}
    times: dict[str, list[float]] = {}
    for _ in range(times_anew):
        running: dict[str, Runner] = {}
        try:
            for name, make in contenders.items():
                try:
                    running[name] = make()
                except Unavailable as error:
                    figures[name] = {NOT_MEASURED: str(error)}
            for name, taken in _in_turn(running, seconds / times_anew, clock).items():
                times.setdefault(name, []).extend(taken)
                figures[name] = {**running[name].figures, "traces": running[name].traces()}
        finally:
            for runner in running.values():
                runner.close()
    references = {"ratio": times.get(EAGER, times[next(iter(times))])}
    if COMPILED in times:
        references["compiled_ratio"] = times[COMPILED]
    for name, values in times.items():
        p10, median, p90 = spread(values)
        figures[name] |= {"median_ms": 1e3 * median, "p10_ms": 1e3 * p10, "p90_ms": 1e3 * p90, "rounds": len(values)}
        for key, reference in references.items():
            within = ratios(values, reference)
            p10, median, p90 = spread(within)
            figures[name] |= {key: median, f"{key}_p10": p10, f"{key}_p90": p90, f"{key}_noisy": noisy(within)}
    return figures


def _in_turn(running: Mapping[str, Runner], seconds: float, clock: Clock) -> dict[str, list[float]]:
    """The times of updates that take turns until ``seconds`` have passed and at least five rounds.

    Each round has a new order: whatever slows the machine meets all, and so does what another contender left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    shuffle = random.Random(0).shuffle
    start = clock()
    while clock() - start < seconds or len(times[names[0]]) < 5:
        shuffle(names)
        for name in names:
            times[name].append(running[name].time())
    return times


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


def resources(make: Make, parameters: Tree, gradients: Tree, clock: Clock = time.perf_counter) -> tuple[Contender, Row]:
    """A contender that has done three updates (tracing, compiling, memory), and what they took besides time.

    Figures: ``state_bytes`` of the optimizer and ``traces`` so far; ``first_call_ms`` (the first update, compilers
    included unless they kept what they made); of contenders on MLX, and None of others: ``peak_extra_bytes`` allocated
    during an update beyond what exists before it; of lazy ones, and None of others: ``trace_ms`` (building the first
    update, which traces it) and ``kernels`` of an update.
    """
    contender = make(parameters, gradients)
    del parameters  # the contender's alone, or they could not be updated in place
    trace = count = extra = None
    if isinstance(contender, OnMLX) and contender.lazy:
        mx.eval(contender.changed())
        mx.synchronize()
        begin = clock()
        contender.build()
        trace = 1e3 * (clock() - begin)
        mx.eval(contender.changed())
        first = clock() - begin
        contender.build()
        count = sum(kernels(contender.changed()).values())
        mx.eval(contender.changed())
    else:
        begin = clock()
        contender.update()
        first = clock() - begin
        for _ in range(2):
            contender.update()
    if isinstance(contender, OnMLX):
        extra = _extra_bytes(contender)
    return contender, {
        "trace_ms": trace,
        "first_call_ms": 1e3 * first,
        "kernels": count,
        "peak_extra_bytes": extra,
        "state_bytes": contender.state_bytes(),
        "traces": contender.traces,
    }


def _extra_bytes(contender: OnMLX) -> int:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    contender.update()
    return max(0, mx.get_peak_memory() - before)


def bandwidth(size: int = 1 << 25, rounds: int = 3, chain: int = 4) -> dict[str, float]:
    """Bytes per second that kernels of MLX move between memory and themselves, on arrays of ``size`` float32.

    They are divided among the streams that an update uses: a core alone moves half of what two do.
    "scale" is ``a = -a`` (one read, one write) and "triad" ``a = a + b / 2`` (two and one), both in place, so that no
    new memory is asked for; the best of the rounds, and "best" of the two. ``chain`` of them are evaluated together:
    a GPU needs about as long for one as its launch takes, and a bandwidth that is too low makes all look good.
    """
    streams = list(dict.fromkeys(how.stream for how in of_leaves("auto", [LARGE, LARGE])))
    parts = [(mx.ones((size // len(streams),)), mx.ones((size // len(streams),))) for _ in streams]
    mx.eval(parts)
    triad = mx.compile(lambda a, b: a + 0.5 * b)
    found = {"scale": 0.0, "triad": 0.0}
    kernels_and_reads = {"scale": (lambda a, b: -a, 2), "triad": (triad, 3)}
    for _ in range(rounds + 1):
        for name, (kernel, moved) in kernels_and_reads.items():
            begin = time.perf_counter()
            for _ in range(chain):
                for i, stream in enumerate(streams):
                    with mx.stream(stream):
                        parts[i] = kernel(*parts[i]), parts[i][1]
            mx.eval(parts)
            nbytes = chain * moved * sum(a.nbytes for a, _ in parts)
            found[name] = max(found[name], nbytes / (time.perf_counter() - begin))
    return {**found, "best": max(found.values())}


class Spread(NamedTuple):
    p10: float
    median: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """The deciles are interpolated, so that they exist for few values too."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(deciles[0], statistics.median(values), deciles[-1])


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Within each round, because what slows a round down slows both."""
    return [a / b for a, b in zip(values, reference, strict=True)]


def noisy(values: Sequence[float]) -> bool:
    """Whether ratios, in the order measured, say too little: see `NOISY`. Another run would give another median."""
    p10, median, p90 = spread(values)
    half = len(values) // 2
    if half == 0:
        return True
    first, second = statistics.median(values[:half]), statistics.median(values[half:])
    return p90 - p10 > WIDE * median or abs(first - second) > DRIFT * median
