"""Text to tokens and back, for the tokenizer that comes with a checkpoint.

The work is done by the `tokenizers` library. Each kind of file (a folder's tokenizer.json, a
SentencePiece or tiktoken `tokenizer.model`, the metadata of a GGUF file) is turned into one of its
pipelines by a module of its own; what is here makes a `TextCodec` of that, and turns a stream of
tokens into text that never shows half a character. Chat templates: models/chat.py.
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
    """A tokenizer and what a model's files say of its use.

    `encode(text, whole)` gives token ids; `whole` adds the tokens that the model wants around a text
    (a first one, mostly), which a chat template has already written. It raises InputError for what
    is no Unicode text. `decode(tokens)` leaves out special tokens and ids beyond the vocabulary.
    `stream()` gives a function that takes one id at a time and returns the text that has become
    certain, never half a character; given None, it ends the text and returns what it held back. Its
    pieces together are `decode` of the same tokens.

    `stop_tokens` end an answer. `chat_templates` by name ("default", "tool_use"), empty where there
    are none, an InputError in the place of one that cannot be read: it matters to those who ask for it;
    `special` is what they may call by name ("bos_token", ...). `longest()` is the length of the longest
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
    """The ids that the model wants before and after a whole text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def named_templates(given: object, where: str) -> Templates:
    """The chat templates that a model's settings hold: a text, an object of texts by name, or a list of
    objects with "name" and "template". `where` names the settings in errors."""
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
    codec: TextCodec, vocab_size: int, tell: Callable[[str], None] = lambda line: None
) -> TextCodec:
    """The codec for a model whose embedding has `vocab_size` rows: `encode` refuses a text with other
    tokens, which tokenizers may have (added ones, mostly). Stop tokens that the model cannot make are
    left out, of which it tells."""

    def encode(text: str, whole: bool) -> list[int]:
        tokens = codec.encode(text, whole)
        largest = max(tokens, default=0)
        if largest >= vocab_size:
            raise InputError(
                f"a token of the text has id {largest}, and the model has a vocabulary of {vocab_size} "
                f"(ids 0 to {vocab_size - 1}): its tokenizer has tokens that the weights do not know; "
                "leave them out of the text, or use the tokenizer that belongs to these weights"
            )
        return tokens

    stops = frozenset(token for token in codec.stop_tokens if token < vocab_size)
    if beyond := sorted(codec.stop_tokens - stops):
        ids = ", ".join(map(str, beyond))
        rest = "" if stops else "; none is left, so answers go on to max_new_tokens"
        tell(f"stop tokens beyond the vocabulary of {vocab_size} are left out: {ids}{rest}")
    return replace(codec, encode=encode, stop_tokens=stops)


def byte_codec(vocab_size: int) -> TextCodec:
    """For random weights, which have no tokenizer: a byte is a token, and a token that is not a byte
    is shown by its number."""

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
    """A codec of a pipeline. `ends` None: its own post-processor adds what belongs around a text.
    `doubled_space` puts a space before a text that begins with one (see models/tokenizer/spm.py)."""
    around = ends or Ends()

    def encode(text: str, whole: bool) -> list[int]:
        _utf8(text)
        if doubled_space and text.startswith((" ", "\u2581")):
            text = " " + text
        tokens: list[int] = guarded(
            lambda: tokenizer.encode(text, add_special_tokens=whole and ends is None).ids,
            lambda why: InputError(
                f"the tokenizer cannot take a text of {len(text)} characters ({why}); shorten it"
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
    """Text piece by piece: what is new is the difference of decoding a few tokens with and without the
    last ones. The few begin where a piece began, as decoders treat the first token of a text unlike
    others (they drop its space).

    A piece waits while its text ends in U+FFFD, which may be half a character. It also waits through a
    run of byte tokens (`<0xE4>`): the library's decoder shows such a run as characters if all of it is
    UTF-8, and else as U+FFFD for each byte, so nothing of it is certain before it ends.
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
    """The tokens that stand for one byte each, if the pipeline takes them as such: found by trying."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letter = ids[ord("A")]
    if letter is None or decode([letter]) != "A":
        return frozenset()
    return frozenset(i for i in ids if i is not None)


def _utf8(text: str) -> bytes:
    """A text's bytes. Raises InputError for one that has none: half a surrogate pair, as Python reads
    a byte of a command line that is not UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not Unicode: {text[error.start]!r} at position {error.start} "
            "is no character; give it as UTF-8"
        ) from error
