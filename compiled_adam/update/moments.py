"""The storage of the two moments: encode and decode, as pure functions of arrays.

"float32"   4 bytes per moment. The reference.
"bfloat16"  2 bytes per moment, rounded stochastically: to the upper neighbour with a probability equal to the distance
            from the lower one. With rounding to nearest, an average that changes by less than half a unit in the last
            place per update would never change. With ``beta2 = 0.999`` this holds for every bfloat16 second moment.
"8bit"      1 byte per moment, and a float32 scale for every block of 128 elements in memory order, also rounded
            stochastically. ``m`` is int8, scaled by the largest absolute value. ``v`` is a uint8 code of ``sqrt(v)``,
            which has half the range of ``v`` in decades. The code 0 means half a code, because Adam divides by the
            root and a small ``v`` must not become 0. Leaves of fewer than 4096 elements stay float32.
"param"     the dtype of the parameter, rounded to nearest, as in stock MLX.

Source of the blocks: Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022. The codes here are
linear.
"""

from __future__ import annotations

import math

import mlx.core as mx

POLICIES = ("float32", "bfloat16", "8bit", "param")
STOCHASTIC = ("bfloat16", "8bit")
BLOCK = 128
SMALL = 4096
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

Stored = dict[str, mx.array]


def storage(policy: str, shape: tuple[int, ...], dtype: mx.Dtype) -> str:
    """The storage that a policy gives the moments of a parameter: "float32", "bfloat16", "float16" or "8bit".

    >>> storage("8bit", (64,), mx.bfloat16), storage("param", (64,), mx.float16)
    ('float32', 'float16')
    """
    if policy == "param":
        return next(name for name, its_dtype in _DTYPES.items() if its_dtype == dtype)
    return "float32" if policy == "8bit" and math.prod(shape) < SMALL else policy


def is_stored(state: Stored, kind: str, shape: tuple[int, ...]) -> bool:
    """Whether ``state`` has the moments of a parameter of ``shape``, stored as ``kind``."""
    dtypes = (mx.int8, mx.uint8) if kind == "8bit" else (_DTYPES[kind], _DTYPES[kind])
    blocks = (-(-math.prod(shape) // BLOCK),)
    scales = [("m_scale", mx.float32, blocks), ("v_scale", mx.float32, blocks)] if kind == "8bit" else []
    return all(
        name in state and state[name].dtype == dtype and state[name].shape == its_shape
        for name, dtype, its_shape in [("m", dtypes[0], shape), ("v", dtypes[1], shape), *scales]
    )


def zeros(kind: str, shape: tuple[int, ...]) -> Stored:
    """Zero moments: ``m`` and ``v`` of the parameter's shape, and for "8bit" the scales."""
    zero = mx.zeros(shape, mx.float32)
    return encode(kind, zero, zero)


def decode(state: Stored) -> tuple[mx.array, mx.array]:
    """``m`` and ``v`` in float32, of the parameter's shape, from any stored form."""
    m, v = state["m"], state["v"]
    if m.dtype != mx.int8:
        return m.astype(mx.float32), v.astype(mx.float32)
    m_codes, v_codes = _blocked(m), _blocked(v)
    m_scale, v_scale = (state[name].reshape(*m_codes.shape[:-1], 1) for name in ("m_scale", "v_scale"))
    values = m_codes.astype(mx.float32) * (m_scale / 127)
    roots = mx.maximum(v_codes.astype(mx.float32), 0.5) * (v_scale / 255)
    return _unblocked(values, m.shape), _unblocked(mx.square(roots), v.shape)


def encode(kind: str, m: mx.array, v: mx.array, bits: mx.array | None = None) -> Stored:
    """Encodes float32 ``m`` and ``v``. Random ``bits`` (one uint32 per element) decide the rounding. None: to nearest.

    >>> stored = encode("8bit", mx.array([0.5, -1.0]), mx.array([0.0, 4.0]))
    >>> [f"{x:.3f}" for array in decode(stored) for x in array.tolist()]
    ['0.504', '-1.000', '0.000', '4.000']
    """
    if kind == "8bit":
        # Sixteen bits each, as a number in [0, 1). With one more operation MLX would need more kernels.
        low = 0.5 if bits is None else (_blocked(bits) & 0xFFFF).astype(mx.float32) * 2.0**-16
        high = 0.5 if bits is None else (_blocked(bits) >> 16).astype(mx.float32) * 2.0**-16
        m_blocks, roots = _blocked(m), mx.sqrt(_blocked(v))
        m_scale, v_scale = (x.max(axis=-1, keepdims=True) for x in (mx.abs(m_blocks), roots))
        m_codes = mx.clip(mx.floor(m_blocks * _per_scale(127, m_scale) + low), -127, 127).astype(mx.int8)
        v_codes = mx.minimum(mx.floor(roots * _per_scale(255, v_scale) + high), 255).astype(mx.uint8)
        return {
            "m": _unblocked(m_codes, m.shape),
            "v": _unblocked(v_codes, v.shape),
            "m_scale": m_scale.reshape(-1),
            "v_scale": v_scale.reshape(-1),
        }
    if kind == "bfloat16" and bits is not None:
        return {"m": _stochastic_bfloat16(m, bits), "v": _stochastic_bfloat16(v, bits >> 16)}
    return {"m": m.astype(_DTYPES[kind]), "v": v.astype(_DTYPES[kind])}


def random_bits(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Uniform random uint32 of ``shape``. It splits ``key``: no other function of MLX returns raw bits."""
    size = math.prod(shape)
    return mx.random.split(key, (size + 1) // 2).reshape(-1)[:size].reshape(shape)


def _per_scale(codes: int, scale: mx.array) -> mx.array:
    """``codes / scale`` for each block. 0 for a block of zeros, or if the quotient would be infinite."""
    return mx.where(scale > 2.0**-100, codes / scale, 0.0)


def _stochastic_bfloat16(x: mx.array, bits: mx.array) -> mx.array:
    """Adds sixteen random bits below the mantissa of bfloat16, and cuts the bits there off. A carry rounds up."""
    pattern = (x.view(mx.uint32) + (bits & 0xFFFF)) & 0xFFFF0000
    return pattern.view(mx.float32).astype(mx.bfloat16)


def leading_ones(shape: tuple[int, ...]) -> int:
    """How many axes of length one a shape begins with.

    >>> leading_ones((1, 1, 3, 1)), leading_ones((1,)), leading_ones(())
    (2, 1, 0)
    """
    return next((i for i, size in enumerate(shape) if size != 1), len(shape))


def _blocked(x: mx.array) -> mx.array:
    """``x`` padded with zeros to blocks: (ceil(size / 128), 128), after the leading axes of length one of ``x``."""
    flat = x.reshape(-1)
    if padding := -x.size % BLOCK:
        flat = mx.pad(flat, (0, padding))
    return flat.reshape(*[1] * leading_ones(x.shape), -1, BLOCK)


def _unblocked(blocks: mx.array, shape: tuple[int, ...]) -> mx.array:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)
