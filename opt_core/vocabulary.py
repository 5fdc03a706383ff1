# SPDX-License-Identifier: Apache-2.0
"""The tokens of a byte-level BPE tokenizer, their ids, and which of them are special."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opt_core.encodings import to_lists
from opt_core.errors import FormatError, InputError
from opt_core.tokenizer_files import NAMED_SPECIAL_TOKENS

TokenLike = str | AddedToken


def _bytes_of_characters() -> dict[str, bytes]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, other bytes are U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + position): bytes([byte]) for position, byte in enumerate(others)}
    return {chr(byte): bytes([byte]) for byte in printable} | shifted


_BYTES = _bytes_of_characters()


def _special_token(name: str) -> property:
    def read(self: Vocabulary) -> str | None:
        return self._named.get(name)

    def write(self: Vocabulary, token: str | None) -> None:
        if token is None:
            self._named.pop(name, None)
        elif token in self._ids:
            self.add_special_tokens({name: token})
        else:
            raise InputError(
                f"{name}={token!r} is not in the vocabulary; "
                f"add it with add_special_tokens({{{name!r}: {token!r}}})"
            )

    return property(read, write, doc=f"The {name.replace('_', ' ')} as text, or None.")


def _special_token_id(name: str) -> property:
    def read(self: Vocabulary) -> int | None:
        token = self._named.get(name)
        return None if token is None else self._ids[token]

    return property(read, doc=f"The id of the {name.replace('_', ' ')}, or None.")


class Vocabulary:
    """Token -> id and back, with tokens added behind the base vocabulary and special ones by name."""

    bos_token = _special_token("bos_token")
    eos_token = _special_token("eos_token")
    unk_token = _special_token("unk_token")
    pad_token = _special_token("pad_token")
    bos_token_id = _special_token_id("bos_token")
    eos_token_id = _special_token_id("eos_token")
    unk_token_id = _special_token_id("unk_token")
    pad_token_id = _special_token_id("pad_token")

    def __init__(
        self,
        base: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        added: Mapping[int, AddedToken],
        unk_token: TokenLike | None,
    ) -> None:
        self._base = dict(base)
        self._merges = list(merges)
        self._ids = dict(base)
        self._tokens = {index: token for token, index in base.items()}
        self._added: dict[int, AddedToken] = {}
        self._named: dict[str, str] = {}
        self._extra: list[str] = []
        self._engine = _build_engine(self._base, self._merges, unk_token)
        for index, token in sorted(added.items()):
            found = self._ids[self._add(token)]
            if found != index:
                raise FormatError(
                    f"added token {token.content!r}: declared as id {index}, but it would be {found}; "
                    f"added tokens must follow the {len(base)} tokens of the vocabulary"
                )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without those that were added behind the vocabulary."""
        return len(self._base)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tokens, {self.special_tokens_map})"

    def get_vocab(self) -> dict[str, int]:
        """Return a copy of the map from token to id, added tokens included."""
        return dict(self._ids)

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The special tokens by name, `{"bos_token": "</s>", ...}`."""
        extra = {"additional_special_tokens": self.additional_special_tokens}
        return dict(self._named) | (extra if self._extra else {})

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that have no name."""
        return list(self._extra)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once; `skip_special_tokens` drops them."""
        named = [self._named[name] for name in NAMED_SPECIAL_TOKENS if name in self._named]
        return list(dict.fromkeys(named + self._extra))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`, in the same order."""
        return [self._ids[token] for token in self.all_special_tokens]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or a list of ids; an unknown token has the id of `unk_token`."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.unk_token_id)
        return [self._ids.get(token, self.unk_token_id) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or a list of tokens; None for an id that no token has."""
        ids = to_lists(ids)
        if isinstance(ids, int):
            return self._tokens.get(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._tokens.get(index) for index in ids if index not in skipped]

    def add_tokens(
        self, new_tokens: TokenLike | Sequence[TokenLike], special_tokens: bool = False
    ) -> int:
        """Append tokens to the vocabulary and return how many were new.

        A token that is there already is from now on found whole in a text. Give the model's embeddings
        `len(tokenizer)` rows afterwards if it has fewer.
        """
        before = len(self)
        for token in [new_tokens] if isinstance(new_tokens, TokenLike) else new_tokens:
            content = self._add(token, special=special_tokens)
            if special_tokens and content not in self.all_special_tokens:
                self._extra.append(content)
        return len(self) - before

    def add_special_tokens(self, special_tokens: Mapping[str, Any]) -> int:
        """Name special tokens, `{"pad_token": "<p>"}`; return how many were new to the vocabulary.

        "additional_special_tokens" takes a list. Raises InputError for any other name.
        """
        before = len(self)
        for name, value in special_tokens.items():
            if name == "additional_special_tokens":
                self.add_tokens(value, special_tokens=True)
            elif name in NAMED_SPECIAL_TOKENS:
                self._named[name] = self._add(value, special=True)
            else:
                raise InputError(
                    f"no special token is called {name!r}; expected one of {NAMED_SPECIAL_TOKENS} "
                    "or additional_special_tokens"
                )
        return len(self) - before

    def _add(self, token: TokenLike, *, special: bool = False) -> str:
        """Make a token be found whole in a text, with the id that it has or the next one; return it."""
        added = AddedToken(token, normalized=True) if isinstance(token, str) else token
        content = str(added.content)
        if not content:
            raise InputError("an added token must not be empty")
        known = self._added.get(self._ids.get(content, -1))
        if known is not None and (known.special or not special):
            return content
        added = _as_special(added) if special else added
        index = self._ids.get(content, len(self._ids))
        if added.special:
            self._engine.add_special_tokens([added])
        else:
            self._engine.add_tokens([added])
        if self._engine.token_to_id(content) != index:
            raise FormatError(
                f"cannot add {content!r} as id {index}: the {len(self._base)} tokens of the vocabulary "
                f"have ids up to {max(self._base.values())}; fill the gaps with unused tokens"
            )
        self._ids[content], self._tokens[index], self._added[index] = index, content, added
        return content

    def _text(self, tokens: Iterable[str], *, errors: str, spaces_around_added: bool) -> str:
        """Join tokens to text: bytes as UTF-8, named special tokens as they are, other added ones apart.

        With `spaces_around_added`, a space stands between the latter and their neighbours, as in the
        slow tokenizers of transformers 4.37.2.
        """
        special = set(self.all_special_tokens)
        appended = {token for token in self._extra if token not in self._base}
        alone = {str(token.content) for token in self._added.values()} - special | appended
        parts: list[str] = []
        pending = b""
        for token in tokens:
            if token in alone:
                parts += [pending.decode("utf-8", errors), token] if pending else [token]
                pending = b""
            elif token in special:
                pending += token.encode("utf-8")
            else:
                pending += b"".join(_BYTES.get(char) or char.encode("utf-8") for char in token)
        if pending:
            parts.append(pending.decode("utf-8", errors))
        return (" " if spaces_around_added else "").join(part for part in parts if part)


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _build_engine(
    base: dict[str, int], merges: list[tuple[str, str]], unk_token: TokenLike | None
) -> Tokenizer:
    unk = unk_token if unk_token is None or isinstance(unk_token, str) else unk_token.content
    try:
        model = models.BPE(base, merges, unk_token=unk if unk in base else None, fuse_unk=False)
    except (
        Exception
    ) as error:  # the extension raises no narrower class for a merge out of vocabulary
        raise FormatError(f"vocabulary and merges do not fit: {error}") from error
    engine = Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine
