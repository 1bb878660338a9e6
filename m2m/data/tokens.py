"""How many CLIP tokens a caption has: exactly, offline and fast enough for twelve million of them.

Belongs here: counting, on all cores too. Not here: what is done with captions that are too long (`m2m.data.captions`).
"""

import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

VOCABULARY = Path(__file__).parent / "clip_tokenizer"
START_AND_END = 2

# CLIP's own pre-tokenization, on lower-case ASCII
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
# Beyond printable ASCII and plain white space the text is normalised first (NFC, Unicode lower case), which changes
# what the words are: such text goes to the tokenizer itself
_NOT_PLAIN = re.compile(r"[^\t-\r -~]")
_SPECIAL = "<|"  # "<|endoftext|>" written out in a caption is one token
_MEMO_LIMIT, _LONGEST = 300_000, 60  # words, letters of one; bounds the memory, the most frequent are met early


class TokenCounter:
    """Counts of CLIP's tokenizer, start and end tokens included.

    A space ends a word whatever stands around it (no character composes with it, and Unicode's lower case is taken
    letter by letter), so a caption's count is the sum over what lies between spaces, remembered.
    """

    def __init__(self, tokenizer) -> None:
        """Args: tokenizer: a `tokenizers.Tokenizer` that adds start and end tokens and truncates nothing."""
        self._tokenizer = tokenizer
        self._memo = _Memo(tokenizer)

    @classmethod
    def for_clip(cls, folder: Path = VOCABULARY) -> "TokenCounter":
        """With CLIP's vocabulary, which comes with this package (`clip_tokenizer/`, MIT)."""
        return cls(_load(folder))

    def __call__(self, caption: str) -> int:
        return self.count([caption])[0]

    def count(self, captions: Sequence[str]) -> list[int]:
        """The number of tokens of each caption."""
        pieces = self._memo.__getitem__
        counts = []
        for caption in captions:
            if _SPECIAL in caption:
                counts.append(len(self._tokenizer.encode(caption).ids))
                continue
            # lower case of ASCII is the same to Python and to the tokenizer, and makes more words the same
            text = caption.lower() if caption.isascii() else caption
            counts.append(sum(map(pieces, text.split(" ")), START_AND_END))
        return counts


class _Memo(dict[str, int]):
    """How many tokens stand for what lies between two spaces."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self._tokenizer, self._model = tokenizer, tokenizer.model

    def __missing__(self, text: str) -> int:
        if _NOT_PLAIN.search(text):
            count = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        else:
            words = _WORD.findall(text.lower())
            # of one lower-case word of ASCII the model alone makes what the whole tokenizer does
            count = len(self._model.tokenize(text)) if words == [text] else sum(map(self.__getitem__, words))
        if len(text) <= _LONGEST and len(self) < _MEMO_LIMIT:
            self[text] = count
        return count


def counted_batches(
    batches: Iterable[Item], texts: Callable[[Item], Sequence[str]], processes: int
) -> Iterator[tuple[Item, list[int]]]:
    """Each batch with its captions' token counts, in order; a few batches are ahead, so memory stays as it is.

    Args:
        processes: that count beside this one, which goes on reading; 0: this one counts.
    """
    if processes == 0:
        counter = TokenCounter.for_clip()
        for batch in batches:
            yield batch, counter.count(texts(batch))
        return
    # spawned, not forked: threads of this process may hold locks
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_end_with_parent) as pool:
        ahead: deque[tuple[Item, Future[list[int]]]] = deque()
        for batch in batches:
            ahead.append((batch, pool.submit(_count, texts(batch))))
            while len(ahead) > 2 * processes:
                first, found = ahead.popleft()
                yield first, found.result()
        for first, found in ahead:
            yield first, found.result()


def _count(captions: Sequence[str]) -> list[int]:
    return _counter().count(captions)


@cache
def _counter() -> TokenCounter:
    return TokenCounter.for_clip()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _load(folder: Path):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns after every fork otherwise
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
