"""What `base/mlx_graph.py` takes for granted of the text that MLX writes for a graph; a new MLX may write another."""

from __future__ import annotations

import mlx.core as mx
import pytest
from compiled_adam.base.mlx_graph import Written, _text, kernels, operations, reached


def evaluated(value: float) -> mx.array:
    array = mx.full((2,), value)
    mx.eval(array)
    return array


def test_an_operation_is_a_rectangle_and_an_array_that_has_a_value_is_none() -> None:
    a = evaluated(1.0)
    assert operations([a]) == 0
    assert operations([mx.exp(a)]) == 1 and operations([mx.square(mx.exp(a))]) == 2
    assert operations([a, mx.exp(a), mx.sin(a)]) == 2


def test_an_edit_in_place_is_an_operation_of_the_same_object() -> None:
    found = []

    def traced(a: mx.array) -> mx.array:
        before = operations([a])
        same = a
        a += same
        assert same is a
        found.append((before, operations([a])))
        return a

    mx.eval(mx.compile(traced)(evaluated(1.0)))
    assert found == [(0, 1)]


def test_one_array_has_the_last_of_its_names() -> None:
    a, b = evaluated(1.0), evaluated(2.0)
    text = _text([a, b], ["first", "second"], [a, b])
    assert text == _text([a, b], ["first", "second"], [a[...], b])  # another object, the same array
    assert text != _text([a, b], ["first", "second"], [a, evaluated(2.0)])
    assert "first" in text and "second" in text


def test_a_fused_kernel_has_the_names_of_its_operations() -> None:
    assert dict(kernels([mx.compile(lambda a: mx.exp(a) * a)(evaluated(1.0))])) == {"CompiledExpMultiply": 1}
    assert dict(kernels([evaluated(1.0).reshape(1, 2)])) == {}


@pytest.mark.parametrize("edit", ["replace", "in place", "slice"])
def test_what_was_written_is_told_from_what_is_there(edit: str) -> None:
    a, b = evaluated(1.0), evaluated(2.0)
    written = Written([a, b])
    assert written.are([a, b])
    if edit == "replace":
        assert not written.are([a, evaluated(2.0)])
        return
    if edit == "in place":
        b += 1
    else:
        b[0] = 7
    mx.eval(b)
    assert not written.are([a, b])


def test_more_arrays_than_mlx_names_at_once_are_looked_for() -> None:
    arrays = [mx.array(float(i)) for i in range(2100)]
    mx.eval(arrays)
    assert [i for i, found in enumerate(reached([arrays[3] + arrays[2050]], arrays)) if found] == [3, 2050]
