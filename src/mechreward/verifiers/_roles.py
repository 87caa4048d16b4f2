"""The two programs of one check: the judge, which has the tests, and the candidate, which has the completion.

They run in two sandboxes with two pipes between them, so that nothing the completion does can reach the tests, the
values that they expect or the pipe that carries the verdict. All it can send is data, and data count only as the value
of the call that the judge has just made. This text is put in front of a call of ``judge`` or ``candidate`` and sent
into a sandbox (see ``code._judged``); it imports nothing of ours.

On the wire: four bytes of length, then JSON. None, bools, texts, floats and ints below 2**53 stand for themselves; all
else is a list that begins with a tag. The judge builds exact built-in types from it: no subclass, no ``__eq__`` of the
completion's ever gets there.
"""

import builtins
import json
import os
import random
import struct
import symtable
import sys
import types
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

MOST_BYTES = 8 << 20
MOST_ITEMS = 200_000
CONTAINERS: list[tuple[str, type]] = [("l", list), ("t", tuple), ("s", set), ("f", frozenset)]

# A test may catch these. Others, StopIteration above all, would end loops of the test early, without a failure.
ERRORS = {
    error.__name__: error
    for error in (
        ArithmeticError, AssertionError, IndexError, KeyError, LookupError, MemoryError, NameError, NotImplementedError,
        OSError, OverflowError, RecursionError, RuntimeError, TypeError, ValueError, ZeroDivisionError,
    )
}  # fmt: skip


class CompletionError(Exception):
    """What the completion raised, where it is none of the usual exceptions."""


class Gone(BaseException):
    """The completion's process ended, or sent what no reply may be."""


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """JSON for a value; ``other`` gives it for what is not plain data."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < 1 << 53 else ["i", format(value, "x")]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["b" if isinstance(value, bytes) else "a", value.hex()]
    if isinstance(value, dict):
        return ["d", [[encode(key, other), encode(item, other)] for key, item in value.items()]]
    for tag, kind in CONTAINERS:
        if isinstance(value, kind):
            return [tag, [encode(item, other) for item in value]]
    return other(value)


def decode(data: Any, other: Callable[[str, Any], Any]) -> Any:
    """The value; raises on anything that ``encode`` does not make."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is not list or len(data) < 2:
        raise ValueError("not a value")
    tag, body = data[0], data[1]
    if tag == "i":
        return int(body, 16)
    if tag == "c":
        return complex(body, data[2])
    if tag in ("a", "b"):
        return (bytes if tag == "b" else bytearray).fromhex(body)
    if tag == "d":
        return {decode(key, other): decode(item, other) for key, item in body}
    for known, kind in CONTAINERS:
        if tag == known:
            return kind([decode(item, other) for item in body])
    return other(tag, body)


def new_module(name: str) -> dict[str, Any]:
    """The name space of a module that can be imported: dataclasses, among others, look theirs up."""
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name].__dict__


def send(fd: int, message: Any) -> None:
    text = json.dumps(message).encode()
    if len(text) > MOST_BYTES:
        raise ValueError("too long a message")
    left = memoryview(struct.pack(">I", len(text)) + text)
    while left:
        left = left[os.write(fd, left) :]


def receive(fd: int) -> Any:
    (length,) = struct.unpack(">I", read_exactly(fd, 4))
    if length > MOST_BYTES:
        raise ValueError("too long a message")
    return json.loads(read_exactly(fd, length))


def read_exactly(fd: int, count: int) -> bytes:
    text = bytearray()
    while len(text) < count:
        more = os.read(fd, min(1 << 20, count - len(text)))
        if not more:
            raise EOFError
        text += more
    return bytes(text)


# The judge


class Link:
    """The judge's end of the pipes. Once broken it stays so: a test that catches the failure still fails."""

    def __init__(self, requests: int, replies: int):
        self.requests, self.replies = requests, replies
        self.answered, self.broken = 0, False

    def ask(self, kind: str, target: Any, *arguments: Any) -> Any:
        def reference(value: Any) -> Any:
            if type(value) is Remote:
                return object.__getattribute__(value, "_reference")
            raise TypeError(f"a {type(value).__name__} cannot be passed to a completion, only plain data can")

        request = [kind, target, *(encode(argument, reference) for argument in arguments)]
        if self.broken:
            raise Gone
        try:
            send(self.requests, request)
            reply = receive(self.replies)
            how, body, *more = reply
            value = decode(body, lambda tag, number: Remote(self, [tag, int(number)] if tag == "o" else fail()))
            if how not in ("value", "raised"):
                fail()
        except BaseException as error:
            self.broken = True
            raise Gone from error
        self.answered += 1
        if how == "value":
            return value
        message = more[0] if more and type(more[0]) is str else ""
        names = [name for name in value if type(name) is str] if type(value) is list else []
        if kind == "get" and "AttributeError" in names:
            raise AttributeError(message)
        raise next((ERRORS[name] for name in names if name in ERRORS), CompletionError)(message)

    def die(self) -> Any:
        self.broken = True
        raise Gone


def fail() -> Any:
    raise ValueError("not a reply")


class Remote:
    """Something in the completion's process that is not plain data: a function, a class, an instance.

    It can be called, and its attributes can be read. What would let it decide about itself is refused: a comparison or
    a truth value ends the test.
    """

    def __init__(self, link: Link, reference: list[Any]):
        self._link, self._reference = link, reference

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._link.ask("call", self._reference, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("get", self._reference, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._special("list", list))

    def __len__(self) -> int:
        return self._special("len", int)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("getitem", self._reference, key)

    def __str__(self) -> str:
        return self._special("str", str)

    def __repr__(self) -> str:
        return self._special("repr", str)

    def _special(self, name: str, kind: type) -> Any:
        value = self._link.ask(name, self._reference)
        return value if type(value) is kind else self._link.die()

    def __bool__(self) -> bool:
        return self._link.die()

    def __eq__(self, other: object) -> bool:
        return self is other or self._link.die()

    def __ne__(self, other: object) -> bool:
        return self is not other and self._link.die()

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def free_names(script: str) -> set[str]:
    """Names that a script takes from elsewhere."""
    top = symtable.symtable(script, "<test>", "exec")
    tables, used = [top], set[str]()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    used |= {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    own = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return used - own - set(dir(builtins))


def judge(requests: int, replies: int, results: int, prompt: str, test: str, entry_point: str | None) -> None:
    """Run a test against the completion and write ``pass``, ``fail`` or ``broken: ...`` to ``results``.

    What goes wrong before the completion has answered once is the test's own fault: ``broken``.
    """
    link = Link(requests, replies)
    try:
        random.seed(0)
        run_test(link, prompt, test, entry_point)
        verdict = "pass" if link.answered else "broken: it never calls the completion"
        if link.broken:
            verdict = "fail"
    except BaseException as error:
        verdict = "fail"
        if not link.answered and not link.broken:
            verdict = f"broken: {type(error).__name__}: {error}"[:500]
    os.write(results, verdict.encode(errors="replace"))


def run_test(link: Link, prompt: str, test: str, entry_point: str | None) -> None:
    namespace = new_module("__test__")
    # Helpers that a prompt defines are the prompt's, whatever the completion makes of them.
    exec(compile(prompt, "<prompt>", "exec", optimize=0), namespace)
    for name in free_names(test) - namespace.keys():
        namespace[name] = Remote(link, ["n", name])
    if entry_point:
        namespace[entry_point] = namespace["candidate"] = Remote(link, ["n", entry_point])
    new_module("solution")["__getattr__"] = lambda name: (
        Remote(link, ["n", name]) if name[:2] != "__" else getattr(None, name)
    )
    exec(compile(test, "<test>", "exec", optimize=0), namespace)
    if entry_point and isinstance(namespace.get("check"), types.FunctionType):
        namespace["check"](namespace[entry_point])
    for name, function in list(namespace.items()):
        if name.startswith("test") and isinstance(function, types.FunctionType) and not function.__code__.co_argcount:
            function()


# The candidate. Nothing that follows is trusted once the completion runs; nothing depends on it.


def candidate(requests: int, replies: int, program: str) -> None:
    """Run the completion's program and then answer the judge's calls until it hangs up."""
    namespace = new_module("solution")
    try:
        exec(compile(program, "<completion>", "exec"), namespace)
    except BaseException:
        os._exit(1)
    objects: list[Any] = []

    def remember(value: Any) -> Any:
        objects.append(value)
        return ["o", len(objects) - 1]

    def look_up(tag: str, body: Any) -> Any:
        if tag == "o":
            return objects[body]
        if body not in namespace:
            raise NameError(f"name {body!r} is not defined")
        return namespace[body]

    while True:
        try:
            kind, target, *rest = receive(requests)
        except EOFError:
            os._exit(0)
        try:
            value = encode(perform(kind, look_up(*target), [decode(item, look_up) for item in rest]), remember)
            reply = ["value", value]
        except Exception as error:
            names = [cls.__name__ for cls in type(error).__mro__]
            reply = ["raised", ["l", names], str(error.args[0])[:1000] if error.args else ""]
        except BaseException:
            os._exit(1)
        send(replies, reply)


def perform(kind: str, target: Any, rest: list[Any]) -> Any:
    if kind == "call":
        return target(*rest[0], **rest[1])
    if kind == "get":
        return getattr(target, rest[0])
    if kind == "getitem":
        return target[rest[0]]
    if kind == "list":
        return list(islice(iter(target), MOST_ITEMS))
    return {"len": len, "str": str, "repr": repr}[kind](target)
