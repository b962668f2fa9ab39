"""Find out what the pickle inside a PyTorch file describes, without running it.

A pickle is a program for a small stack machine. It is interpreted here, from the operations that
`pickletools` lists: containers, strings and numbers are built; calls of the few functions that rebuild
tensors become descriptions of tensors; any other function is rejected by its name. Nothing is imported
or called, and no size that the program claims is allocated.

`torch.load(weights_only=True)` does not run foreign code either, but it calls some harmless functions
with the file's arguments: a `bytearray(3 * 10**9)` in a file of 1 KB costs 3 GB there.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

LEGACY_HINT = (
    "convert it where you trust it: python -c \"import torch; torch.save(torch.load('OLD', "
    "weights_only=True), 'NEW')\""
)


class CodeError(ValueError):
    """The pickle refers to a function or an operation that no checkpoint needs."""


@dataclass(frozen=True)
class Storage:
    """A record `data/<key>` of the archive: `count` elements of `dtype` (None: bytes)."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage: dtype in safetensors' spelling, offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True)
class _Name:
    """A function or class that the program refers to, by its full name."""

    full: str


OPERATION_LIMIT = 500_000  # of a program; a tensor takes about 30, and a file has some hundred tensors
_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_DTYPES = {"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2"}
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")
_TENSOR, _TENSOR_V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_KNOWN = {*_STORAGES, *_UNTYPED, *_DTYPES, *_DICTS[:1], _TENSOR, _TENSOR_V3, _PARAMETER}

_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "INT", "LONG"),
    *("UNICODE", "FLOAT"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MEMO_PUTS, _MEMO_GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_SINCE_MARK = ("TUPLE", "APPENDS", "SETITEMS")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_program(program: bytes) -> Any:
    """What the pickle describes: dicts, lists, tuples, strings, numbers, PickledTensor. Raises
    CodeError for a function that no checkpoint needs, and another Exception for a damaged program."""
    stacks: list[list[Any]] = [[]]
    memo: dict[int, Any] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(program)):
        name = operation.name
        if number == OPERATION_LIMIT:
            raise ValueError(f"its pickle has more than {OPERATION_LIMIT} operations")
        if name == "STOP":
            return stacks[-1].pop()
        _step(name, argument, stacks, memo)
    raise ValueError("its pickle has no end")


def _step(name: str, argument: Any, stacks: list[list[Any]], memo: dict[int, Any]) -> None:
    """Interpret one operation. A mark starts a new stack above the others, so the items since the mark
    are found at once: searching for marks would take quadratic time."""
    if name in ("PROTO", "FRAME"):
        return
    if name == "MARK":
        stacks.append([])
        return
    items = _since_mark(stacks) if name in _SINCE_MARK else []
    stack = stacks[-1]
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _MEMO_PUTS or name == "MEMOIZE":
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in _MEMO_GETS:
        stack.append(memo[argument])
    elif name in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if name == "EMPTY_DICT" else [])
    elif name == "TUPLE" or name in _TUPLES:
        stack.append(tuple(items if name == "TUPLE" else _top(stack, _TUPLES[name])))
    elif name in ("APPEND", "APPENDS"):
        items = items if name == "APPENDS" else _top(stack, 1)
        _typed(stack[-1], list).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = items if name == "SETITEMS" else _top(stack, 2)
        _set_items(_typed(stack[-1], dict), items)
    elif name == "GLOBAL":
        stack.append(_known(str(argument).replace(" ", ".", 1)))
    elif name == "STACK_GLOBAL":
        module, attribute = _top(stack, 2)
        stack.append(_known(f"{module}.{attribute}"))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        function, arguments = _top(stack, 2)
        stack.append(_reduce(_typed(function, _Name).full, _typed(arguments, tuple)))
    elif name == "BUILD":
        stack.pop()  # attributes of a state dict (its "_metadata"), not needed here
        _typed(stack[-1], dict)
    else:
        raise CodeError(f"its pickle uses {name}, which no checkpoint needs")


def _since_mark(stacks: list[list[Any]]) -> list[Any]:
    if len(stacks) == 1:
        raise ValueError("its pickle refers to a mark that it did not set")
    return stacks.pop()


def _top(stack: list[Any], number: int) -> list[Any]:
    items = stack[-number:]
    if len(items) < number:
        raise ValueError("its pickle pops more items than it pushed")
    del stack[-number:]
    return items


def _typed(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle has {type(value).__name__} where {kind.__name__} belongs")
    return value


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Strings and integers only: hashing nested tuples can take exponential time.
        if type(key) not in (str, int):
            raise ValueError(f"its pickle has a key of type {type(key).__name__}")
        if key in target:
            raise ValueError(f"the name {key!r} occurs twice")
        target[key] = value


def _known(full: str) -> _Name:
    if full not in _KNOWN:
        raise CodeError(f"it asks to call {full!r} when it is loaded")
    return _Name(full)


def _storage(saved: Any) -> Storage:
    tag, kind, key, _, count = _typed(saved, tuple)
    name = _typed(kind, _Name).full
    if tag != "storage" or (name not in _STORAGES and name not in _UNTYPED):
        raise ValueError("its pickle refers to an object that is not a storage")
    if type(count) is not int or not 0 <= count < 1 << 60:
        raise ValueError("its pickle has a storage of impossible size")
    return Storage(_typed(key, str), _STORAGES.get(name), count)


def _reduce(function: str, arguments: tuple[Any, ...]) -> Any:
    if function in _DICTS and not arguments:
        return {}
    if function == _TENSOR:
        storage, offset, shape, strides = arguments[:4]
        _typed(storage, Storage)
        if storage.dtype is None:
            raise ValueError("its pickle has a tensor without a dtype")
        return PickledTensor(storage, storage.dtype, offset, shape, strides)
    if function == _TENSOR_V3:  # for dtypes that have no storage class of their own
        storage, offset, shape, strides, _, _, dtype = arguments[:7]
        name = _DTYPES[_typed(dtype, _Name).full]
        return PickledTensor(_typed(storage, Storage), name, offset, shape, strides)
    if function == _PARAMETER:
        return _typed(arguments[0], PickledTensor)
    raise CodeError(f"it asks to call {function!r} when it is loaded")
