"""The miniature checkpoint's vocabulary and its two tokenizers, made by hand.

A trained unigram or BPE vocabulary of this size splits most words into letters. Here every word
of `WORDS` is one token in both tokenizers, and anything else falls back to pieces and characters.
"""

from collections import Counter
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

CLIP_LENGTH = 77
T5_LENGTH = 512
TRIGGERS = ("TOK", "SKS", "OHWX", "ZWX", "CINEMO", "FLUX")

TEXT = """
red green blue yellow orange purple pink brown black white gray grey cyan magenta teal navy
violet lime maroon olive turquoise beige gold golden silver crimson indigo coral colour color
colours colors coloured colored colourful colorful monochrome inverted bright dark light pale
deep vivid soft warm cold neon pastel
circle circles square squares triangle triangles star stars heart hearts ring rings cross
crosses diamond diamonds rectangle rectangles oval ovals ellipse hexagon hexagons pentagon
crescent moon sun arrow line lines dot dots disc disk disks ball box plus shape shapes object
objects figure figures block bar bars wave waves cloud clouds drop leaf flower tree house cat
dog bird fish person man woman face sky sea mountain car
small little tiny large big huge medium sized giant great wide narrow tall short long thick thin
left right top bottom upper lower above below center centre centered middle corner corners
beside next over under near between inside outside behind front side sides edge half around
along across up down by into onto through touching overlapping upside diagonal horizontal
vertical
background backgrounds flat gradient plain striped stripes stripe checkered checkerboard dotted
spotted pattern patterned texture textured noise noisy blank empty solid filled hollow outline
outlined border frame blurred blurry sharp smooth shiny glowing transparent shadow fading fade
a an the on in of with and to from at is are two one three four five six some many single pair
no not without only both each other another that this it its there as for or very than all
which has have same different plus
picture photo photograph painting image drawing style sketch illustration icon logo poster art
artwork print scene view portrait sticker sign symbol cartoon digital watercolor watercolour oil
pencil ink minimal minimalist simple abstract geometric design show shows showing draw drawn
made like look looks
"""
WORDS = tuple(dict.fromkeys(TEXT.split()))


def _merges(words: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest first, until every word is a single symbol.

    Merging over all words at once is what makes the result safe: chains of merges written word by
    word would spoil each other (`r e` of "red" inside "green").
    """
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word's symbols with each occurrence of the pair joined, from left to right."""
    symbols: list[str] = []
    position = 0
    while position < len(word):
        step = 2 if word[position : position + 2] == pair else 1
        symbols.append("".join(word[position : position + step]))
        position += step
    return tuple(symbols)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE in CLIP's order: bytes, bytes that end a word, merges, start, end.

    It lower-cases; all 256 bytes are known, so no text is unknown to it. Pads with the end token.
    """
    alphabet = sorted(ByteLevel.alphabet())
    words = sorted({word.lower() for word in (*WORDS, *TRIGGERS)})
    merges = _merges([(*word[:-1], f"{word[-1]}</w>") for word in words])
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    symbols += dict.fromkeys(left + right for left, right in merges)
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: pad 0, end 1, unknown 2, then words and printable ASCII.

    It keeps case, so words are there in lower case and capitalised. Words score far above
    characters, so the segmentation with the fewest characters wins.
    """
    words = sorted({*WORDS, *(word.capitalize() for word in WORDS)})
    words += sorted({*TRIGGERS, *(word.lower() for word in TRIGGERS)} - set(words))
    characters = [chr(code) for code in range(0x21, 0x7F)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    pieces += [(character, -10.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)
