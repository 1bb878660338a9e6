"""Token counts are those of CLIP's tokenizer, to the token."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from m2m.data.tokens import VOCABULARY, TokenCounter

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "captions" / "alt_texts_10k.tsv"
TOKENIZER = CLIPTokenizer.from_pretrained(VOCABULARY)
COUNTER = TokenCounter.for_clip()

WORDS = [
    "don't",
    "I'LL",
    "<PERSON>",
    "<|endoftext|>",
    "<|startoftext|>",
    "2021",
    "&amp;",
    "'S",
    "co-op",
    "!!!",
    "...",
    "'",
]
# control characters, exotic spaces, characters that NFC expands or lower case changes
ODD = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x00\x7f\x85\xa0\u0130\U0001d160\u0344\u03a3\xdf\u200b\u2028\ufeff😀中\ufb1d\u0958"
CAPTIONS = st.one_of(
    st.text(),
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=45).map(" ".join),
    st.text(st.one_of(st.characters(min_codepoint=32, max_codepoint=126), st.sampled_from(ODD)), max_size=140),
)


def reference(captions):
    return [len(ids) for ids in TOKENIZER(list(captions))["input_ids"]]


def test_a_known_caption():
    assert TOKENIZER("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert COUNTER("a photo of a cat") == 7


@settings(max_examples=300, deadline=None)
@given(captions=st.lists(CAPTIONS, min_size=1, max_size=5))
def test_counts_equal_the_tokenizers(captions):
    assert COUNTER.count(captions) == reference(captions)


@pytest.mark.parametrize("caption", ["\U0001d160" * 18, "Ⱥ" * 37, "", " ", "a" * 5000, "İ" * 80])
def test_texts_whose_normal_form_is_longer(caption):
    assert COUNTER(caption) == reference([caption])[0]


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_counts_of_real_captions():
    with REAL.open(encoding="utf-8", newline="\n") as f:
        captions = [line.rstrip("\n").split("\t", 1)[1] for line in f]
    counts = COUNTER.count(captions)
    assert sum(count > 77 for count in counts) == 57
    sample = range(0, len(captions), 5)
    assert [counts[i] for i in sample] == reference(captions[i] for i in sample)
