# SPDX-License-Identifier: Apache-2.0
"""OPT's tokenizer: byte-level BPE that begins every text, and each text of a pair, with `</s>`.

Ids and strings equal those of the slow GPT2Tokenizer of transformers 4.37.2. What differs: a text that
cannot be cut to max_length is an error here (there a log line), return_overflowing_tokens gives further
rows (as fast tokenizers do), not a list of leftovers, and ids that no token has decode to nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken

from opt_core import encodings, tokenizer_files
from opt_core.arguments import one_of, refuse_unknown
from opt_core.encodings import BatchEncoding, Token
from opt_core.errors import InputError
from opt_core.tokenizer_files import NAMED_SPECIAL_TOKENS, TokenizerFiles
from opt_core.vocabulary import TokenLike, Vocabulary

_NO_LIMIT = int(1e30)
_SIDES = ("left", "right")
_PADDING = {
    False: None,
    True: "longest",
    "longest": "longest",
    "max_length": "max_length",
    "do_not_pad": None,
}
_TRUNCATION = {
    False: None,
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
    "do_not_truncate": None,
}

# What clean_up_tokenization_spaces takes out of English text, in this order (as in transformers).
_CLEAN_UPS = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)


class OPTTokenizer(Vocabulary):
    """Text to token ids and back, the same for all frameworks.

    `vocab` maps tokens to ids, `merges` are pairs of tokens in order of priority, `added_tokens` maps
    ids to tokens that are found in a text before anything else. Special tokens that the vocabulary
    lacks are appended to it. The settings are attributes and may be changed at any time.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        bos_token: TokenLike | None = "</s>",
        eos_token: TokenLike | None = "</s>",
        unk_token: TokenLike | None = "</s>",
        pad_token: TokenLike | None = "<pad>",
        sep_token: TokenLike | None = None,
        cls_token: TokenLike | None = None,
        mask_token: TokenLike | None = None,
        additional_special_tokens: Sequence[TokenLike] = (),
        added_tokens: Mapping[int, AddedToken] | None = None,
        add_bos_token: bool = True,
        add_prefix_space: bool = False,
        clean_up_tokenization_spaces: bool = True,
        errors: str = "replace",
        model_max_length: float = _NO_LIMIT,
        padding_side: str = "right",
        truncation_side: str = "right",
    ) -> None:
        self.add_bos_token = add_bos_token
        self.add_prefix_space = add_prefix_space
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.errors = errors
        self.model_max_length = int(model_max_length)
        self.padding_side = one_of("padding_side", padding_side, _SIDES)
        self.truncation_side = one_of("truncation_side", truncation_side, _SIDES)
        super().__init__(vocab, merges, added_tokens or {}, unk_token)
        named = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        for name, token in zip(NAMED_SPECIAL_TOKENS, named, strict=True):
            if token is not None:
                self.add_special_tokens({name: token})
        self.add_tokens(additional_special_tokens, special_tokens=True)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read a tokenizer from a directory or by its hub name; `overrides` are constructor arguments.

        Raises HubError if it cannot be found, FormatError if a file is damaged, CheckpointError if
        others keep writing to the directory, TypeError for an argument that the constructor does not
        have.
        """
        from opt_core.hub import resolve
        from opt_core.snapshot import read_together

        refuse_unknown(overrides, cls.from_pretrained, cls.__init__)
        folder = resolve(
            name_or_path,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            weights=False,
        )
        files = read_together(folder, lambda _: tokenizer_files.read_tokenizer(folder))
        options = {"added_tokens": files.added_tokens, **files.options, **overrides}
        return cls(files.vocab, files.merges, **options)

    def save_pretrained(self, directory: str | Path) -> list[Path]:
        """Write tokenizer.json, vocab.json, merges.txt and two configuration files; return the paths."""
        options = {name: getattr(self, name) for name in tokenizer_files.SETTINGS}
        options |= {name: self._added[self._ids[token]] for name, token in self._named.items()}
        if self._extra:
            extra = [self._added[self._ids[token]] for token in self._extra]
            options["additional_special_tokens"] = extra
        files = TokenizerFiles(self._base, self._merges, self._added, options)
        return tokenizer_files.write_tokenizer(Path(directory), files, self._engine.to_str())

    # ---- text to ids ------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        **unknown: Any,
    ) -> BatchEncoding:
        """Encode a text, a pair, or a list of either to `input_ids` and `attention_mask` (1 = token).

        `padding`: True or "longest" (of the batch), "max_length". `truncation`: True or "longest_first",
        "only_first", "only_second"; None means True if `max_length` is given without padding. Both take
        `max_length`, by default `model_max_length`. `return_tensors`: "np", "pt", "tf", "jax".
        `return_overflowing_tokens` gives a row per window of a text, `stride` tokens shared between
        neighbours, and `overflow_to_sample_mapping`. Raises InputError, TypeError, ImportError.
        """
        refuse_unknown(unknown, self.__call__)
        strategy = _PADDING[one_of("padding", padding, _PADDING)]
        if truncation is None:
            truncation = max_length is not None and strategy is None
        cut = _TRUNCATION[one_of("truncation", truncation, _TRUNCATION)]
        if max_length is not None and strategy == "longest" and cut is None:
            raise InputError(
                f"max_length={max_length} would do nothing: padding=True pads to the longest text; "
                "add truncation=True, or use padding='max_length'"
            )
        limit = self._limit("truncation", cut, max_length) if cut else None
        is_single, firsts, seconds = encodings.as_pairs(text, text_pair)
        bos = self._bos() if add_special_tokens else []
        overlap = stride if return_overflowing_tokens else None
        samples, rows = self._rows(firsts, seconds, bos, cut, limit, overlap)
        length = self._padded_length(
            [len(r) for r in rows], strategy, max_length, pad_to_multiple_of
        )
        if length is not None:
            side = one_of("padding_side", padding_side or self.padding_side, _SIDES)
            rows = [encodings.pad_tokens(row, length, side, self._pad()) for row in rows]
        data: dict[str, Any] = {"input_ids": [[token.id for token in row] for row in rows]}
        if return_attention_mask:
            data["attention_mask"] = [[int(not token.is_pad) for token in row] for row in rows]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [[int(t.is_special) for t in row] for row in rows]
        if return_offsets_mapping:
            data["offset_mapping"] = [[token.span for token in row] for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        if return_tensors is not None:
            data = encodings.to_tensors(data, return_tensors)
        elif is_single and not return_overflowing_tokens:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data, rows)

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """Return only the ids of one text or pair, a list or an array `[1, T]`; options as in a call."""
        if not isinstance(text, str):
            raise InputError(
                f"encode() takes one text, found {type(text).__name__}; call the tokenizer"
            )
        return self(text, text_pair, return_tensors=return_tensors, **options)["input_ids"]

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text as strings, without special tokens."""
        return [token.text for token in self._split([text], 0)[0]]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens encoding adds to one text, or to a pair."""
        return len(self._bos()) * (2 if pair else 1)

    def pad(
        self,
        encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Pad encodings made earlier: one dict of lists, one dict of a batch, or a list of dicts.

        Keys that do not run along with `input_ids` (labels) are kept as they are.
        """
        if not isinstance(encoded, Mapping):
            keys = list(encoded[0]) if encoded else ["input_ids"]
            encoded = {key: [example[key] for example in encoded] for key in keys}
        if "input_ids" not in encoded:
            raise InputError(f"pad() needs input_ids, found only {list(encoded)}")
        lists = {key: encodings.to_lists(value) for key, value in encoded.items()}
        is_single = bool(lists["input_ids"]) and isinstance(lists["input_ids"][0], int)
        if is_single:
            lists = {key: [value] for key, value in lists.items()}
        if return_attention_mask and "attention_mask" not in lists:
            lists["attention_mask"] = [[1] * len(ids) for ids in lists["input_ids"]]
        strategy = _PADDING[one_of("padding", padding, _PADDING)]
        lengths = [len(ids) for ids in lists["input_ids"]]
        length = self._padded_length(lengths, strategy, max_length, pad_to_multiple_of)
        if length is not None:
            side = one_of("padding_side", padding_side or self.padding_side, _SIDES)
            lists = encodings.pad_lists(lists, length, side, self._pad().id)
        if return_tensors is not None:
            return BatchEncoding(encodings.to_tensors(lists, return_tensors))
        return BatchEncoding({k: v[0] for k, v in lists.items()} if is_single else lists)

    # ---- ids to text ------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the text of an id or a sequence of ids, given as a list or as any framework's array.

        Ids that no token has (the padding rows of OPT's embedding) give nothing. `clean_up_...` (default:
        the setting) removes spaces before punctuation. `spaces_between_special_tokens` puts a space on
        both sides of tokens that were added and are not special, as transformers does.
        """
        ids = encodings.to_lists(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if ids and isinstance(ids[0], list):
            raise InputError(
                f"decode() takes one row, found {len(ids)} of them; use batch_decode()"
            )
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens)
        text = self._text(
            (token for token in tokens if token is not None),
            errors=self.errors,
            spaces_around_added=spaces_between_special_tokens,
        )
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for spaced, clean in _CLEAN_UPS:
                text = text.replace(spaced, clean)
        return text

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Return the text of each row; options as in `decode`."""
        rows = encodings.to_lists(sequences)
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

    # ---- inside -----------------------------------------------------------------------------------

    def _split(self, texts: Sequence[str | None], sequence: int) -> list[list[Token]]:
        """Return the tokens of each text without special ones; `sequence` is 0 or 1 of a pair."""
        shift = int(self.add_prefix_space)
        prefixed = ["" if text is None else " " * shift + text for text in texts]
        try:
            encoded = self._engine.encode_batch(prefixed, add_special_tokens=False)
        except TypeError as error:  # what the extension says of half a surrogate pair
            raise InputError(f"a text is not valid Unicode: {error}") from error
        return [
            [
                Token(
                    index, token, (max(span[0] - shift, 0), span[1] - shift), word, sequence, False
                )
                for index, token, span, word in zip(
                    row.ids, row.tokens, row.offsets, row.word_ids, strict=True
                )
            ]
            for row in encoded
        ]

    def _rows(
        self,
        firsts: Sequence[str],
        seconds: Sequence[str | None],
        bos: list[Token],
        strategy: str | None,
        limit: int | None,
        stride: int | None,
    ) -> tuple[list[int], list[list[Token]]]:
        """Return the rows of a batch, each led by `bos` and cut to `limit`, and the text of each row."""
        samples: list[int] = []
        rows: list[list[Token]] = []
        pieces = zip(self._split(firsts, 0), self._split(seconds, 1), seconds, strict=True)
        for sample, (first, second, second_text) in enumerate(pieces):
            second_bos = [] if second_text is None else bos
            parts = [(first, second)]
            if strategy is not None and limit is not None:
                room = limit - len(bos) - len(second_bos)
                parts = encodings.fit(first, second, room, strategy, self.truncation_side, stride)
            rows += [bos + one + second_bos + two for one, two in parts]
            samples += [sample] * len(parts)
        return samples, rows

    def _bos(self) -> list[Token]:
        if not self.add_bos_token:
            return []
        if self.bos_token is None:
            raise InputError("add_bos_token is on, but there is no bos_token; set one of them")
        return [Token(self.bos_token_id, self.bos_token)]

    def _pad(self) -> Token:
        if self.pad_token is None:
            raise InputError(
                "padding needs a pad_token; set tokenizer.pad_token = tokenizer.eos_token"
            )
        return Token(self.pad_token_id, self.pad_token, is_pad=True)

    def _limit(self, what: str, choice: str, max_length: int | None) -> int | None:
        """Return the length to cut or pad to, or None (with a warning) where nothing names one."""
        if max_length is not None:
            return max_length
        if self.model_max_length < _NO_LIMIT:
            return self.model_max_length
        warnings.warn(
            f"{what}={choice!r} without max_length does nothing: the tokenizer has no model_max_length",
            UserWarning,
            stacklevel=3,
        )
        return None

    def _padded_length(
        self,
        lengths: Sequence[int],
        strategy: str | None,
        max_length: int | None,
        multiple: int | None,
    ) -> int | None:
        """Return the length that rows are padded to, or None to leave them alone."""
        if strategy is None:
            if multiple is not None:
                raise InputError("pad_to_multiple_of needs padding=True or padding='max_length'")
            return None
        if strategy == "longest":
            length: int | None = max(lengths, default=0)
        else:
            length = self._limit("padding", strategy, max_length)
        return length if length is None or multiple is None else -(-length // multiple) * multiple
