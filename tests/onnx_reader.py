"""Just enough of ONNX's protobuf to read the node tests: TensorProto, and of ModelProto the nodes of its graph.

Field numbers are those of onnx.proto. A protobuf message is a sequence of (key, value); key = field << 3 | wire type.
"""
from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# TensorProto.DataType -> (name, NumPy type of a full-width element)
DTYPES = {
    1: ("float32", "<f4"), 2: ("uint8", "u1"), 3: ("int8", "i1"), 4: ("uint16", "<u2"), 5: ("int16", "<i2"),
    6: ("int32", "<i4"), 7: ("int64", "<i8"), 10: ("float16", "<f2"), 11: ("float64", "<f8"),
    16: ("bfloat16", "<u2"), 17: ("float8e4m3fn", "u1"), 18: ("float8e4m3fnuz", "u1"), 19: ("float8e5m2", "u1"),
    20: ("float8e5m2fnuz", "u1"), 21: ("uint4", None), 22: ("int4", None), 23: ("float4e2m1", None),
    24: ("float8e8m0", "u1"), 25: ("uint2", None), 26: ("int2", None),
}


@dataclass
class Tensor:
    """`data` is the NumPy array, or the packed bytes (uint8) for elements of less than a byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass
class Node:
    op: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict = field(default_factory=dict)


def fields(buf: bytes):
    """Yield (field number, value): int for varints, bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = buf[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(buf):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else None)
        if size is None or at + size > len(buf):
            raise ValueError(f"malformed protobuf: wire type {kind} at byte {at}")
        yield key >> 3, buf[at : at + size]
        at += size


def signed(value: int) -> int:
    """Varints of int32 and int64 are two's complement of 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def numbers(value) -> list[int]:
    """A repeated varint field: packed bytes, or one entry."""
    if isinstance(value, int):
        return [signed(value)]
    return [signed(v) for _, v in fields(b"".join(b"\x08" + v for v in _varints(value)))]


def _varints(buf: bytes):
    start = 0
    for i, byte in enumerate(buf):
        if byte < 0x80:
            yield buf[start : i + 1]
            start = i + 1


def tensor(buf: bytes) -> Tensor:
    dims, kind, name, raw, ints, floats = [], 0, "", None, [], b""
    for number, value in fields(buf):
        if number == 1:
            dims += numbers(value)
        elif number == 2:
            kind = value
        elif number == 4:
            floats += value
        elif number in (5, 7):
            ints += numbers(value)
        elif number == 8:
            name = value.decode()
        elif number == 9:
            raw = value
    dtype, numpy_type = DTYPES[kind]
    if raw is None and dtype == "float32":
        raw = floats
    if raw is not None:
        data = np.frombuffer(raw, numpy_type or "u1")
    elif numpy_type is None:  # int32_data holds one packed byte per entry
        data = np.array(ints, np.int64).astype(np.uint8)
    elif dtype == "float16":
        data = np.array(ints, np.uint16).view(np.float16)
    else:
        data = np.array(ints, np.int64).astype(numpy_type)
    return Tensor(name, dtype, tuple(dims), data.reshape(dims) if numpy_type else data)


def _attribute(buf: bytes):
    name, value = "", None
    for number, v in fields(buf):
        if number == 1:
            name = v.decode()
        elif number == 2:
            value = struct.unpack("<f", v)[0]
        elif number == 3:
            value = signed(v)
        elif number == 4:
            value = v.decode()
        elif number == 8:
            value = (value or []) + numbers(v)
    return name, value


def _node(buf: bytes) -> Node:
    node = Node("")
    for number, value in fields(buf):
        if number == 1:
            node.inputs.append(value.decode())
        elif number == 2:
            node.outputs.append(value.decode())
        elif number == 4:
            node.op = value.decode()
        elif number == 5:
            name, attribute = _attribute(value)
            node.attributes[name] = attribute
    return node


def nodes(path: Path) -> list[Node]:
    """The nodes of a model's graph, in order."""
    found = []
    for number, graph in fields(path.read_bytes()):
        if number == 7:
            found += [_node(value) for n, value in fields(graph) if n == 1]
    return found


def tensors(folder: Path, kind: str) -> list[Tensor]:
    """input_0.pb, input_1.pb, ... or output_*.pb of a test data set."""
    return [tensor((folder / f"{kind}_{i}.pb").read_bytes()) for i in range(len(list(folder.glob(f"{kind}_*.pb"))))]
