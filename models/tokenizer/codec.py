"""Text to tokens and back, for the tokenizer that comes with a checkpoint.

The `tokenizers` library does the work. A separate module for each kind of file (a folder's
tokenizer.json, a SentencePiece or tiktoken `tokenizer.model`, the metadata of a GGUF file) builds one
of its pipelines. This module makes a `TextCodec` from a pipeline, and decodes a stream of tokens
without ever showing half a character.

What is not here: chat templates (models/chat.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from base.errors import InputError
from models.tokenizer.limits import guarded

_PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


Templates = dict[str, str | InputError]


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer, and what a model's files say about its use.

    `encode(text, whole)` returns token ids. `whole` adds the tokens that the model expects around a
    text (usually a first token), which a chat template has already written. It raises InputError for
    a text that is not valid Unicode. `decode(tokens)` skips special tokens and ids beyond the
    vocabulary. `stream()` returns a function that takes one id at a time and returns the text that has
    become certain, never half a character. With None it ends the text and returns the rest. The
    concatenated pieces equal `decode` of the same tokens.

    `stop_tokens` end an answer. `chat_templates` are by name ("default", "tool_use"); a template that
    cannot be read is an InputError, to be raised only when the template is used. `special` are the
    tokens that templates may use by name ("bos_token", ...). `longest()` is the length of the longest
    token in characters.
    """

    encode: Callable[[str, bool], list[int]]
    decode: Callable[[Sequence[int]], str]
    stream: Callable[[], Callable[[int | None], str]]
    stop_tokens: frozenset[int] = frozenset()
    chat_templates: Mapping[str, str | InputError] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    longest: Callable[[], int] = lambda: 1


@dataclass(frozen=True)
class Ends:
    """The ids that the model expects before and after a whole text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def named_templates(given: object, where: str) -> Templates:
    """The chat templates in a model's settings: a string, an object of strings by name, or a list of
    objects with "name" and "template". `where` names the settings in errors. An entry of another type
    becomes an InputError in the result."""
    if given is None:
        return {}
    entries: list[tuple[object, object]]
    if isinstance(given, dict):
        entries = list(given.items())
    elif isinstance(given, list):
        pairs = [entry if isinstance(entry, dict) else {} for entry in given]
        entries = [(pair.get("name"), pair.get("template")) for pair in pairs]
    else:
        entries = [("default", given)]
    found: Templates = {}
    for name, template in entries:
        if isinstance(name, str) and isinstance(template, str):
            found[name] = template
            continue
        found[name if isinstance(name, str) else "default"] = InputError(
            f"{where}: chat_template must be a template, an object of them by name, or a list of "
            f"objects with 'name' and 'template', not {str(given)[:100]}"
        )
    return found


def within_vocabulary(
    codec: TextCodec, vocab_size: int, report: Callable[[str], None] = lambda line: None
) -> TextCodec:
    """The codec for a model whose embedding has `vocab_size` rows. Tokenizers may have more tokens
    (usually added ones): `encode` raises InputError for a text with such tokens. Stop tokens that the
    model cannot generate are left out, which is passed to `report`."""

    def encode(text: str, whole: bool) -> list[int]:
        tokens = codec.encode(text, whole)
        largest = max(tokens, default=0)
        if largest >= vocab_size:
            raise InputError(
                f"a token of the text has id {largest}, and the model has a vocabulary of {vocab_size} "
                f"(ids 0 to {vocab_size - 1}): the tokenizer has tokens that are not in the weights; "
                "leave them out of the text, or use the tokenizer that belongs to these weights"
            )
        return tokens

    stops = frozenset(token for token in codec.stop_tokens if token < vocab_size)
    if beyond := sorted(codec.stop_tokens - stops):
        ids = ", ".join(map(str, beyond))
        rest = "" if stops else "; none is left, so answers continue to max_new_tokens"
        report(f"stop tokens beyond the vocabulary of {vocab_size} are left out: {ids}{rest}")
    return replace(codec, encode=encode, stop_tokens=stops)


def byte_codec(vocab_size: int) -> TextCodec:
    """A codec for random weights, which have no tokenizer: each byte is a token (modulo `vocab_size`).
    Tokens that are not printable ASCII are shown as their number."""

    def show(token: int | None) -> str:
        if token is None:
            return ""
        return chr(token) if 32 <= token < 127 else f"<{token}>"

    return TextCodec(
        encode=lambda text, whole: [byte % vocab_size for byte in _utf8(text)],
        decode=lambda tokens: "".join(map(show, tokens)),
        stream=lambda: show,
        chat_templates={"default": _PLAIN_TEMPLATE},
    )


def make_codec(
    tokenizer: Tokenizer,
    ends: Ends | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    chat_templates: Mapping[str, str | InputError] | None = None,
    special: Mapping[str, str] | None = None,
    doubled_space: bool = False,
) -> TextCodec:
    """A codec of a pipeline. `ends` None: the pipeline's own post-processor adds the tokens around a
    text. `doubled_space` adds a space before a text that begins with one (see
    models/tokenizer/spm.py)."""
    around = ends or Ends()

    def encode(text: str, whole: bool) -> list[int]:
        _utf8(text)
        if doubled_space and text.startswith((" ", "\u2581")):
            text = " " + text
        tokens: list[int] = guarded(
            lambda: tokenizer.encode(text, add_special_tokens=whole and ends is None).ids,
            lambda why: InputError(
                f"the tokenizer cannot take a text of {len(text)} characters ({why}); shorten the text"
            ),
        )
        return [*around.before, *tokens, *around.after] if whole else tokens

    def decode(tokens: Sequence[int]) -> str:
        text: str = guarded(
            lambda: tokenizer.decode(list(tokens), skip_special_tokens=True),
            lambda why: InputError(f"the tokenizer cannot turn {len(tokens)} tokens into text ({why})"),
        )
        return text

    byte_tokens = _byte_tokens(tokenizer, decode)
    silent = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def is_silent(token: int) -> bool:
        return token in silent or tokenizer.id_to_token(token) is None

    return TextCodec(
        encode,
        decode,
        lambda: _stream(decode, byte_tokens, is_silent),
        stop_tokens,
        chat_templates or {},
        special or {},
        lambda: max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1),
    )


def _stream(
    decode: Callable[[Sequence[int]], str],
    byte_tokens: frozenset[int],
    is_silent: Callable[[int], bool],
) -> Callable[[int | None], str]:
    """Decodes piece by piece. A window of recent tokens is decoded with and without its last tokens;
    the difference is the new text. The window begins where a piece began, because decoders treat the
    first token of a text differently (they drop its space).

    A piece is held back while its text ends in U+FFFD, which may be half a character. It is also held
    back during a run of byte tokens (`<0xE4>`): the library decodes such a run to characters if all of
    it is UTF-8, and else to one U+FFFD per byte, so nothing is certain before the run ends.
    """
    window: list[int] = []
    shown = 0  # tokens of the window whose text has been returned
    in_run = False

    def step(token: int | None) -> str:
        nonlocal shown, in_run
        if token is None:
            last = decode(window).removeprefix(decode(window[:shown]))
            window.clear()
            shown, in_run = 0, False
            return last
        if is_silent(token):
            return ""
        window.append(token)
        in_run = token in byte_tokens
        if in_run:
            return ""
        before, text = decode(window[:shown]), decode(window)
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        del window[:shown]
        shown = len(window)
        return text[len(before) :]

    return step


def _byte_tokens(tokenizer: Tokenizer, decode: Callable[[Sequence[int]], str]) -> frozenset[int]:
    """The tokens that stand for one byte each; none if a trial shows that the pipeline does not decode
    them to bytes."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letter = ids[ord("A")]
    if letter is None or decode([letter]) != "A":
        return frozenset()
    return frozenset(i for i in ids if i is not None)


def _utf8(text: str) -> bytes:
    """A text's UTF-8 bytes. Raises InputError for a text with half of a surrogate pair, which Python
    makes from command-line bytes that are not UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not Unicode: {text[error.start]!r} at position {error.start} "
            "is not a character; give it as UTF-8"
        ) from error
